"""Where a run stands, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pet_finetune.config import EarlyStopping

from .metrics import Metrics


@dataclass
class Progress:
    """Part of the saved state of a run.

    Attributes:
        epoch: epochs done.
        batch: batches done of the epoch under way.
        step: updates done.
        loss_sum, extra_sums, structures, seconds, epoch_metrics: of the epoch under way, for when
            it is interrupted.
        recent: the metrics of the last epochs, as many as the mean is taken over.
        best_metric, best_epoch: of the best model.
        reference, waited: the metric last seen to improve by enough, and the epochs since.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    extra_sums: dict[str, float] = field(default_factory=dict)
    structures: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    best_metric: float = math.inf
    best_epoch: int = 0
    reference: float = math.inf
    waited: int = 0
    epoch_metrics: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def structures_per_second(self) -> float:
        """Throughput of the epoch under way."""
        return self.structures / max(self.seconds, 1e-9)

    def metrics(self, targets: list[str]) -> dict[str, Metrics]:
        """Errors of the epoch under way to go on with."""
        return {name: Metrics(name, self.epoch_metrics.get(name)) for name in targets}

    def next_epoch(self) -> None:
        """Count an epoch as done."""
        self.epoch += 1
        self.batch, self.loss_sum, self.epoch_metrics = 0, 0.0, {}
        self.extra_sums, self.structures, self.seconds = {}, 0, 0.0

    def averaged(self, metric: float, window: int) -> float:
        """Take an epoch's metric in; its mean over the last ``window`` epochs."""
        self.recent = [*self.recent, metric][-window:]
        return sum(self.recent) / len(self.recent)

    def is_best(self, metric: float, window: int) -> bool:
        """Whether the epoch just done is the best so far, given its :meth:`averaged` metric.

        Until a window is full each epoch takes the place of the one before: with a single
        validation structure the first could meet its energy by chance and never be beaten.
        """
        return self.epoch <= window or metric < self.best_metric

    def count_patience(self, metric: float, window: int, early: EarlyStopping | None) -> None:
        """Take an epoch's averaged metric in; too small improvements add up until they count."""
        least = early.min_delta if early else 0.0
        if self.epoch <= window or metric < self.reference * (1.0 - least):
            self.reference, self.waited = metric, 0
        else:
            self.waited += 1

    def patience_ran_out(self, early: EarlyStopping | None) -> bool:
        """Whether training should stop."""
        return early is not None and self.waited >= early.patience
