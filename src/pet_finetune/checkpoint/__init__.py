"""Checkpoints: our format, metatrain's (read only, nothing executed), and the oldest start."""

from __future__ import annotations

from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.oldest import load_oldest_start
from pet_finetune.checkpoint.opening import (
    Checkpoint,
    load,
    load_checkpoint,
    open_adapted,
    open_committee,
    open_potential,
)
from pet_finetune.model.fingerprint import weights_fingerprint

__all__ = [
    "Checkpoint",
    "load",
    "load_checkpoint",
    "load_oldest_start",
    "open_adapted",
    "open_committee",
    "open_potential",
    "save_checkpoint",
    "weights_fingerprint",
]
