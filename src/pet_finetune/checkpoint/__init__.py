"""Checkpoints: our format, metatrain's (read only, nothing executed), and the oldest start."""

from __future__ import annotations

from pet_finetune.checkpoint.load import (
    Checkpoint,
    load_checkpoint,
    open_committee,
    open_potential,
)
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.oldest import load_oldest_start
from pet_finetune.model.fingerprint import weights_fingerprint

__all__ = [
    "Checkpoint",
    "load_checkpoint",
    "load_oldest_start",
    "open_committee",
    "open_potential",
    "save_checkpoint",
    "weights_fingerprint",
]
