"""A look at data before a run: numbers, findings, what a run takes, and options that fit."""
