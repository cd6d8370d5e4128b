"""What changes over a run: the learning rate and the weights of the loss."""

from __future__ import annotations

import math

from pet_finetune.config import LossStage, TrainingOptions, first_epoch


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


def averages_weights(options: TrainingOptions, epoch: int) -> bool:
    """Whether the weights of an epoch, from 0, go into the mean of ``swa``."""
    swa = options.swa
    return swa is not None and epoch >= first_epoch(swa.start, options.num_epochs)


def rate_at(options: TrainingOptions, highest: float, epoch: int, step: int, total: int) -> float:
    """The learning rate of a step.

    Args:
        options: scheduler, warm-up, and the constant rate of ``swa`` where it has one.
        highest: of the run.
        epoch: from 0.
        step: as for :func:`learning_rate_factor`.
        total: likewise.
    """
    swa = options.swa
    if swa is not None and swa.learning_rate is not None and averages_weights(options, epoch):
        return swa.learning_rate
    return highest * learning_rate_factor(step, total, options.warmup_fraction, options.scheduler)


def loss_stage(options: TrainingOptions, epoch: int) -> LossStage | None:
    """The stage of ``loss_schedule`` that an epoch, from 0, belongs to; None before the first."""
    begun = [
        stage
        for stage in options.loss_schedule
        if first_epoch(stage.start, options.num_epochs) <= epoch
    ]
    return begun[-1] if begun else None
