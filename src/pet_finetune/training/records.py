"""What the loop tells of a run: an epoch's line, the end, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pet_finetune.model import Potential

from .metrics import Metrics


class StepResult(NamedTuple):
    """What an update was made of.

    Attributes:
        losses: sums over its batches: the loss and, one by one, the extra losses that are part
            of it.
        batches, structures: how many.
    """

    losses: list[float]
    batches: int
    structures: int


@dataclass
class EpochRecord:
    """One line of ``train.csv``.

    Attributes:
        epoch: from 1.
        learning_rate: of the last step.
        loss: mean training loss, extra losses included.
        train, validation: errors by target, during the epoch and after it.
        metric: what picks the best model (lower is better), a mean over the last epochs.
        best: whether this epoch is the best so far.
        seconds: of training and validation; waiting between two parts of a run does not count.
        structures_per_second: training throughput.
        extra: mean of each extra loss, by name.
        retention: errors on the retention set by target, where they were due.
    """

    epoch: int
    learning_rate: float
    loss: float
    train: dict[str, Metrics]
    validation: dict[str, Metrics]
    metric: float
    best: bool
    seconds: float
    structures_per_second: float
    extra: dict[str, float] = field(default_factory=dict)
    retention: dict[str, Metrics] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        finished: False when it was interrupted.
        epochs: epochs completed.
        best_epoch, best_metric: of the best model.
        stopped_early: whether patience ran out.
    """

    finished: bool
    epochs: int
    best_epoch: int
    best_metric: float
    stopped_early: bool


@dataclass
class Callbacks:
    """What the loop tells its surroundings; each may be left out.

    Attributes:
        step: after each step, with batches done, batches in the epoch, the epoch's mean loss
            and metrics so far, and structures per second.
        epoch: after each epoch.
        best: after an epoch that is the best so far, with the model to keep.
        save: when the state should be written.
        retention: gives the errors on the retention set of the model after an epoch (from 1),
            or nothing where they are not due.
    """

    step: Callable[[int, int, float, Mapping[str, Metrics], float], None] = lambda *a: None
    epoch: Callable[[EpochRecord], None] = lambda record: None
    best: Callable[[Potential, EpochRecord], None] = lambda model, record: None
    save: Callable[[], None] = lambda: None
    retention: Callable[[Potential, int], dict[str, Metrics]] = lambda model, epoch: {}
