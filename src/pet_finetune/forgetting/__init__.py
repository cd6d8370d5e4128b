"""What watches and keeps what the foundation knew: retention, replay, anchors, dimer curves."""

from __future__ import annotations

from pet_finetune.training.feature import Feature

from .anchor import Anchor
from .dimers import DimerReport
from .replay import Replay
from .retention import RetentionReport

__all__ = ["Anchor", "DimerReport", "Replay", "RetentionReport", "features"]


def features() -> list[Feature]:
    """The features of this room; each does nothing where the options do not ask for it."""
    return [RetentionReport(), Replay(), Anchor(), DimerReport()]
