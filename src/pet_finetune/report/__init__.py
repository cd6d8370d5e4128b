"""What a run found, for people: plots (the extra ``plots``) and the page ``report.html``."""
