"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, warmup_fraction: float, scheduler: str) -> float:
    """Factor on the highest learning rate at a step: linear warm-up, then cosine or constant.

    Args:
        step: number of steps taken before this one, from 0.
        total: steps in the whole run.
        warmup_fraction: part of the run that warms up.
        scheduler: ``cosine`` or ``constant``.
    """
    warmup = int(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if scheduler == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))
