"""Molecular dynamics with ASE's integrators: watched, logged, and resumed to the last bit."""

from __future__ import annotations

from .files import MDFiles
from .run import Outcome, simulate
from .settings import MDSettings
from .summary import Summary, summarize

__all__ = ["MDFiles", "MDSettings", "Outcome", "Summary", "simulate", "summarize"]
