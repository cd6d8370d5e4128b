"""Records of the training loop: a step, an epoch, the end and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from .metrics import Errors, Metrics


class StepResult(NamedTuple):
    """What an update was made of.

    Attributes:
        loss: sum over its batches, with the terms of features.
        extra: the same of each term of a feature, by name.
        batches, structures: how many, on all processes together.
        stop: whether any process was asked to stop.
    """

    loss: float
    extra: dict[str, float]
    batches: int
    structures: int
    stop: bool


class StepProgress(NamedTuple):
    """Where an epoch stands after an update.

    Attributes:
        done, total: batches of the epoch.
        loss: mean over those that are done.
        metrics: errors of those that are done, by target.
        rate: structures per second.
    """

    done: int
    total: int
    loss: float
    metrics: Mapping[str, Metrics]
    rate: float


class Measured(NamedTuple):
    """What a feature measured after an epoch.

    Attributes:
        columns: of ``train.csv``.
        line: added to the epoch's line in the log.
    """

    columns: Mapping[str, float]
    line: str


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
        extra: mean of each term that features add to the loss, by name.
        columns: what features measured after the epoch, by column of ``train.csv``.
        lines: the same in words.
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
    columns: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


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


@dataclass(frozen=True)
class TrainOutcome:
    """What a run gave.

    Attributes:
        folder: its files.
        result: how it ended; of an ensemble, how its last member did.
        before, after: errors of the starting model and the best one (or the committee), by set and
            target; empty for an interrupted run, or without ``final_eval``.
        table: of these errors, as it was printed; None where there are none.
    """

    folder: Path
    result: TrainingResult
    before: Errors
    after: Errors
    table: Table | None = None
