"""Showing how a run goes: a progress bar on a terminal, plain lines anywhere else.

A long epoch writes a line each minute, so that a run that goes wrong is seen before its epoch ends;
beside a bar these lines go to the log file only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.progress import TaskID, TextColumn

from pet_finetune.log import FILE_ONLY, get_logger
from pet_finetune.progress import REDRAWS_PER_SECOND, progress_bar, start_bar, stop_bar

from .feature import Feature
from .metrics import Metrics
from .records import EpochRecord, StepProgress

_logger = get_logger(__name__)

_SECONDS_BETWEEN_LINES = 60.0


def describe(metrics: Mapping[str, Metrics]) -> str:
    """The mean absolute errors of all targets in short."""
    parts = []
    for target, errors in metrics.items():
        prefix = f"{target} " if len(metrics) > 1 else ""
        for kind in errors.kinds:
            name, factor, unit = errors.shown(kind)
            name = name if kind == "value" else f"{prefix}{name}"
            digits = "4g" if kind == "value" else "2f"
            parts.append(f"{name} {errors.mae(kind) * factor:.{digits}} {unit}".rstrip())
    return ", ".join(parts)


class RunDisplay(Feature):
    """The feature that shows steps and epochs of a run.

    Args:
        num_epochs: in all.
        log_interval: epochs between two lines.
        epochs_done: where a resumed run goes on.
    """

    def __init__(self, num_epochs: int, log_interval: int, epochs_done: int = 0) -> None:
        self._num_epochs = num_epochs
        self._log_interval = log_interval
        self._epoch = epochs_done
        self._moved = -math.inf
        self._line_at = time.monotonic()
        self._task: TaskID | None = None
        self._bar = progress_bar(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            TextColumn("loss {task.fields[loss]:.3g}  forces {task.fields[forces]} meV/A"),
            TextColumn("{task.fields[rate]:.0f} structures/s"),
        )

    name = "display"

    def _begin(self) -> None:
        """Show the bar; not before the first step, so that what is logged before stays whole."""
        if self._bar is not None and self._task is None:
            start_bar(self._bar)
            self._task = self._bar.add_task(
                "train", epoch=1, epochs=self._num_epochs, loss=math.nan, forces="-", rate=0.0
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            stop_bar(self._bar)

    def step_ended(self, progress: StepProgress) -> None:
        """Move the bar, unless it has only just been moved, and write a line each minute."""
        done, total, loss, metrics, rate = progress
        self._begin()
        now = time.monotonic()
        if done < total and now - self._line_at >= _SECONDS_BETWEEN_LINES:
            self._line_at = now
            self._line(done, total, loss, metrics, rate)
        if (
            self._bar is None
            or self._task is None
            or (done < total and now - self._moved < 1 / REDRAWS_PER_SECOND)
        ):
            return
        self._moved = now
        forces = [m.mae("forces") for m in metrics.values() if "forces" in m.kinds]
        self._bar.update(
            self._task,
            total=total * self._num_epochs,
            completed=total * self._epoch + done,
            epoch=self._epoch + 1,
            loss=loss,
            forces=f"{forces[0] * 1000:.1f}" if forces else "-",
            rate=rate,
        )

    def _line(
        self, done: int, total: int, loss: float, metrics: Mapping[str, Metrics], rate: float
    ) -> None:
        _logger.info(
            "epoch %*d/%d, batch %*d of %d | loss %.4g | train %s | %.0f structures/s",
            len(str(self._num_epochs)), self._epoch + 1, self._num_epochs,
            len(str(total)), done, total, loss, describe(metrics), rate,
            extra=FILE_ONLY if self._bar else None,
        )  # fmt: skip

    def epoch_ended(self, record: EpochRecord) -> None:
        """A line in the log."""
        self._epoch = record.epoch
        self._line_at = time.monotonic()
        last = record.epoch == self._num_epochs
        if record.epoch % self._log_interval and not last and record.epoch > 1:
            return
        _logger.info(
            "epoch %*d/%d | loss %.4g%s | train %s | validation %s%s%s | %.1f s, %.0f structures/s",
            len(str(self._num_epochs)),
            record.epoch,
            self._num_epochs,
            record.loss,
            "".join(f", {name} {value:.3g}" for name, value in record.extra.items()),
            describe(record.train),
            describe(record.validation),
            " (best)" if record.best else "",
            "".join(f" | {line}" for line in record.lines),
            record.seconds,
            record.structures_per_second,
        )
