"""The report of a run: plots (extra ``plots``) and the page ``report.html``."""
