"""Exported models: TorchScript files for every engine with metatomic's interface.

Importing it needs the extra ``export`` (metatomic-torch and metatensor-torch).
"""

from __future__ import annotations

from .check import ModelCheck
from .interface import ExportedPotential
from .outputs import choose_outputs
from .write import interaction_range, write_model

__all__ = [
    "ExportedPotential",
    "ModelCheck",
    "choose_outputs",
    "interaction_range",
    "write_model",
]
