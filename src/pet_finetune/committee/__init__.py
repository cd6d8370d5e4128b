"""Committees: several adapters of one base, evaluated in one pass, their spread calibrated."""
