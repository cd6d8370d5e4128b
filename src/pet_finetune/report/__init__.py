"""Plots of what a run found. They need matplotlib, the extra ``plots``."""
