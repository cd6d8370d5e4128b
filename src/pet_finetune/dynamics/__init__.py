"""Molecular dynamics with ASE's integrators: watched, logged, and resumed to the last bit."""
