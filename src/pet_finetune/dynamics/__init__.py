"""Molecular dynamics with ASE's integrators: watched, logged, and resumed to the last bit."""

from __future__ import annotations

from .loop import Outcome, simulate
from .md_files import MDFiles
from .measure import Summary, summarize
from .settings import MDSettings

__all__ = ["MDFiles", "MDSettings", "Outcome", "Summary", "simulate", "summarize"]
