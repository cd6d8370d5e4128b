"""Checkpoints: our format, metatrain's (read only, nothing executed), and the oldest start."""

from __future__ import annotations

from pet_finetune.model.fingerprint import weights_fingerprint

from .build import Checkpoint
from .legacy_state_dict import load_oldest_start
from .native import save_checkpoint
from .opening import load, load_checkpoint, open_adapted, open_committee, open_potential

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
