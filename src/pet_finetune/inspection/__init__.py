"""A look at data before a run: numbers, findings, what a run takes, and options that fit."""

from __future__ import annotations

from .evidence import Declared
from .finding import Finding, Frames
from .inspection import Foundation, inspect_sets
from .overview import Inspection, as_dict, render

__all__ = [
    "Declared",
    "Finding",
    "Foundation",
    "Frames",
    "Inspection",
    "as_dict",
    "inspect_sets",
    "render",
]
