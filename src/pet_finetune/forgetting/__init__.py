"""Forgetting: retention, replay, anchors, dimer curves."""

from __future__ import annotations

from pet_finetune.training.feature import Feature

from .anchor import AnchorFeature
from .dimers import DimerReport
from .replay import ReplayFeature
from .retention import RetentionReport


def features() -> list[Feature]:
    """The features of this room; each is inactive unless the options enable it."""
    return [RetentionReport(), ReplayFeature(), AnchorFeature(), DimerReport()]
