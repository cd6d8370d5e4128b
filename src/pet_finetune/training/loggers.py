"""Showing how a run goes: a bar or lines of the log, TensorBoard, Weights & Biases, Trackio.

A long epoch writes a line each minute, so that a run that goes wrong is seen before its epoch ends;
beside a bar these lines go to the log file only. The loggers get the numbers of ``train.csv`` after
each epoch, under the names of its columns. A run goes on where one of them fails on the way: a
service that is down is no reason to lose a training.
"""

from __future__ import annotations

import importlib
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import TaskID, TextColumn

from pet_finetune import processes
from pet_finetune.config.run_options import Options
from pet_finetune.errors import ConfigError
from pet_finetune.installation import missing_extra
from pet_finetune.log import FILE_ONLY, get_logger
from pet_finetune.terminal import REDRAWS_PER_SECOND, progress_bar, start_bar, stop_bar

from .feature import Feature, Plan, TrainingRun
from .metrics import Metrics
from .run_files import RunFiles, columns_of
from .step import EpochRecord, StepProgress

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


def loggers(options: Options, files: RunFiles) -> Iterator[Feature]:
    """The loggers that the options ask for."""
    wanted = list(options.training.log)
    if options.wandb is not None and "wandb" not in wanted:
        wanted.append("wandb")
    for name in wanted:
        if name in _KINDS:
            yield _KINDS[name](options, files)


class Logger(Feature):
    """Hands the numbers of each epoch to one library; made for the first process of a run."""

    library: str

    def __init__(self, options: Options, files: RunFiles) -> None:
        self.options, self.folder = options, Path(files.folder)
        self._open = False

    def check(self, plan: Plan) -> None:
        """Make sure that the library is there."""
        self._check_library()

    def _check_library(self) -> None:
        problem = missing_extra(self.library, self.name)
        if problem is not None:
            raise ConfigError(f"architecture.training.log: {self.name} {problem}")

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Open it in the process that writes the run's files."""
        if not processes.first():
            return
        self._check_library()  # of a run that goes on elsewhere, too
        self._open = self._tried(self.begin)

    def epoch_ended(self, record: EpochRecord) -> None:
        """Hand over the numbers of an epoch."""
        if self._open:
            numbers = {name: float(value) for name, value in columns_of(record).items()}
            del numbers["epoch"]
            self._open = self._tried(lambda: self.add(numbers, record.epoch))

    def close(self) -> None:
        """Close it."""
        if self._open:
            self._open = False
            self._tried(self.end)

    def _tried(self, action: Any) -> bool:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever a service raises, the run goes on)
            said = (str(error).splitlines() or [type(error).__name__])[0]
            _logger.warning("%s gets nothing more of this run: %s", self.name, said)
            return False
        return True

    @abstractmethod
    def begin(self) -> None:
        """Open the log of this run."""

    @abstractmethod
    def add(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Write the numbers of an epoch, from 1."""

    @abstractmethod
    def end(self) -> None:
        """Write what is left."""


class TensorBoard(Logger):
    """Event files in the folder ``tensorboard`` of the run."""

    name = library = "tensorboard"

    def begin(self) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self.folder / "tensorboard"))

    def add(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Write one scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def end(self) -> None:
        """Close the event file."""
        self._writer.close()


class _Service(Logger):
    """What Weights & Biases and Trackio have in common: ``init``, ``log`` and ``finish``."""

    def begin(self) -> None:
        """Open a run, called as the folder is where its settings do not name it."""
        self._library: Any = importlib.import_module(self.library)
        self._run = self._library.init(**self.settings())

    def settings(self) -> dict[str, Any]:
        """The arguments of ``init``."""
        given = dict(self.options.wandb or {})
        named = {"project": "pet-finetune", "name": self.folder.name, **given}
        return {**named, "config": self.options.resolved()}

    def add(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Log one step."""
        self._library.log(dict(numbers), step=epoch)

    def end(self) -> None:
        """Finish the run."""
        self._library.finish()


class WeightsAndBiases(_Service):
    """Weights & Biases; its files are in the folder ``wandb`` of the run."""

    name = library = "wandb"

    def settings(self) -> dict[str, Any]:
        """The block ``wandb`` of the options, with the folder of the run."""
        return {"dir": str(self.folder), **super().settings()}


class Trackio(_Service):
    """Trackio, which keeps its runs on this machine (``TRACKIO_DIR``)."""

    name = library = "trackio"

    def settings(self) -> dict[str, Any]:
        """Project and name; a run that goes on adds to the same one."""
        both = super().settings()
        own = {name: both[name] for name in ("project", "name", "config")}
        return {**own, "resume": "allow", "embed": False}


_KINDS: Mapping[str, type[Logger]] = {
    kind.name: kind for kind in (TensorBoard, WeightsAndBiases, Trackio)
}
