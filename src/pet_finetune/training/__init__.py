"""Training: loss, metrics, schedule, one step, the loop, and going on where a run stopped."""

from __future__ import annotations

from .baselines import prepare_baselines
from .consistency import Spread, rotational_spread
from .metrics import Metrics, evaluate
from .records import TrainingResult
from .trainer import Trainer

__all__ = [
    "Metrics",
    "Spread",
    "Trainer",
    "TrainingResult",
    "evaluate",
    "prepare_baselines",
    "rotational_spread",
]
