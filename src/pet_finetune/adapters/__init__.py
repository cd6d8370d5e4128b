"""Low-rank adapters: where they go, how they train, merge, and how they are kept on disk."""

from __future__ import annotations

from .adapted import AdaptedPotential
from .adapter_config import AdapterConfig
from .at_rest import Adapter, capture, install
from .combine import combine
from .inject import (
    AdapterTarget,
    TrainableReport,
    active_adapter,
    eject,
    freeze,
    inject,
    trainable_report,
)
from .layers import LoraLinear
from .merge import adapters_disabled, merge, merged_copy, unmerge
from .peft_files import load_adapter, read_adapter, save_adapter, write_adapter

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
