"""Low-rank adapters: where they go, how they train, merge, and how they are kept on disk."""

from __future__ import annotations

from .adapted import AdaptedPotential
from .adapter import Adapter, capture, install
from .combine import combine
from .config import AdapterConfig
from .files import load_adapter, read_adapter, save_adapter, write_adapter
from .inject import AdapterTarget, active_adapter, eject, inject
from .lora import LoraLinear
from .merge import adapters_disabled, merge, merged_copy, unmerge
from .trainable import TrainableReport, freeze, trainable_report

__all__ = [
    "AdaptedPotential",
    "Adapter",
    "AdapterConfig",
    "AdapterTarget",
    "LoraLinear",
    "TrainableReport",
    "active_adapter",
    "adapters_disabled",
    "capture",
    "combine",
    "eject",
    "freeze",
    "inject",
    "install",
    "load_adapter",
    "merge",
    "merged_copy",
    "read_adapter",
    "save_adapter",
    "trainable_report",
    "unmerge",
    "write_adapter",
]
