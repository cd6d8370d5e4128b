"""Low-rank adapters: where they go, how they train, merge, and how they are kept on disk."""

from __future__ import annotations

from .files import load_adapter, save_adapter
from .inject import AdapterConfig, active_adapter, inject
from .lora import LoraLinear
from .merge import adapters_disabled, merge, merged_copy, unmerge
from .trainable import TrainableReport, freeze, trainable_report

__all__ = [
    "AdapterConfig",
    "LoraLinear",
    "TrainableReport",
    "active_adapter",
    "adapters_disabled",
    "freeze",
    "inject",
    "load_adapter",
    "merge",
    "merged_copy",
    "save_adapter",
    "trainable_report",
    "unmerge",
]
