"""Clipping the gradient, and refusing numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pet_finetune.errors import TrainingError


def check_and_clip(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    losses: Tensor,
    where: Sequence[str],
    epoch: int,
    batch: int,
) -> list[float]:
    """Clip the gradient of an update, once it and the losses are known to be finite.

    Args:
        parameters: with their gradients.
        max_norm: the longest gradient; None leaves it.
        losses: [batches of the update, kinds of loss].
        where: the structures of each batch.
        epoch: from 0.
        batch: the first one, from 0.

    Returns:
        The sum of each kind of loss over the batches.

    Raises:
        TrainingError: a loss or the gradient is not a number.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    # All at once: reading a number makes the CPU wait until the GPU has done all before it.
    *values, length = torch.cat([losses.flatten(), norm.to(losses).view(1)]).tolist()
    rows = [values[i : i + losses.shape[1]] for i in range(0, len(values), losses.shape[1])]
    for index, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            place = f"batch {batch + index + 1}: {where[index]}"
            raise TrainingError(_not_finite("loss", epoch, place))
    if not math.isfinite(length):
        last = batch + len(rows)
        batches = f"batch {last}" if len(rows) == 1 else f"batches {batch + 1} to {last}"
        place = f"{batches}: {'; '.join(where)}"
        raise TrainingError(_not_finite("gradient of the loss", epoch, place))
    return [sum(column) for column in zip(*rows, strict=True)]


def _not_finite(what: str, epoch: int, place: str) -> str:
    return (
        f"The {what} is not a finite number in epoch {epoch + 1}, {place}. Look at the labels and "
        "the closest distances of these structures; if they are sound, lower learning_rate. The "
        "state of the last save is untouched."
    )
