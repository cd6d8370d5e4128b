"""Showing how a run goes: tables, a bar or lines of the log, TensorBoard and other services.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pet_finetune import processes
from pet_finetune.committee.calibration import Curves, Deviations, miscalibration_area
from pet_finetune.config.run_options import Options
from pet_finetune.errors import ConfigError
from pet_finetune.installation import missing_extra
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch, table_text

from .baselines import BaselineTable
from .feature import Feature, Plan, TrainingRun
from .loss_features import Spread
from .metrics import Metrics
from .run_files import RunFiles, columns_of
from .step import EpochRecord, StepProgress

_logger = get_logger(__name__)


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

    name = "display"

    def __init__(self, num_epochs: int, log_interval: int, epochs_done: int = 0) -> None:
        self._num_epochs = num_epochs
        self._log_interval = log_interval
        self._epoch = epochs_done
        self._told, self._text = -math.inf, ""
        self._watch = Watch(lambda: self._text)
        self._begun = False

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._begun:
            self._watch.__exit__()

    def step_ended(self, progress: StepProgress) -> None:
        """Move the bar, and say once a second how it goes: numbers make the CPU wait for a GPU."""
        done, total, loss, metrics, rate = progress
        if not self._begun:  # not before the first step, so that what is logged before stays whole
            self._begun = True
            self._watch.__enter__()
        self._watch.total = total * self._num_epochs
        self._watch.done = total * self._epoch + done
        now = time.monotonic()
        if done < total and now - self._told < 1.0:
            return
        self._told = now
        forces = [m.mae("forces") for m in metrics.values() if "forces" in m.kinds]
        shown = f", forces {1000 * forces[0]:.1f} meV/A" if forces else ""
        where = f"epoch {self._epoch + 1}/{self._num_epochs}"
        self._text = f"{where}, loss {loss:.3g}{shown}, {rate:.0f} structures/s"

    def epoch_ended(self, record: EpochRecord) -> None:
        """A line in the log."""
        self._epoch = record.epoch
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
    """Common interface of Weights & Biases and Trackio: ``init``, ``log`` and ``finish``."""

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


def baseline_text(table: BaselineTable) -> str:
    """Baselines per species, before and after."""
    out = Table(title=f"baseline of '{table.target}' ({table.mode})", title_justify="left")
    unit = f" ({table.unit})" if table.unit else ""
    for name in ("element", "atoms", f"before{unit}", f"after{unit}", f"change{unit}"):
        out.add_column(name, justify="right")
    for symbol, atoms, before, after in table.rows:
        cells = ("new", "") if math.isnan(before) else (f"{before:.4f}", f"{after - before:+.4f}")
        out.add_row(symbol, f"{atoms}", cells[0], f"{after:.4f}", cells[1])
    return table_text(out)


def error_table(
    groups: Mapping[str, Mapping[str, Mapping[str, Metrics]]],
    notes: Sequence[str] = (),
    title: str = "",
) -> Table:
    """Errors of several models (columns) by target and quantity (rows).

    Args:
        groups: what stands before the names of the rows, and for each model its errors by target.
            All groups are of the same models.
        notes: lines below the table.
        title: line above it.
    """
    notes_below = "\n".join(notes) or None
    table = Table("error", "unit", title=title, title_justify="left", caption=notes_below)
    for name in next(iter(groups.values())):
        table.add_column(name, justify="right")
    for heading, columns in groups.items():
        _add_errors(table, heading, list(columns.values()))
    return table


def _add_errors(table: Table, heading: str, columns: Sequence[Mapping[str, Metrics]]) -> None:
    """Rows for each target and quantity; a model that was not evaluated has dashes."""
    last = columns[-1]
    for target in last:
        for kind in last[target].kinds:
            name, factor, unit = last[target].shown(kind)
            named = len(last) > 1 and kind != "value"
            prefix = f"{heading}{target} " if named else heading
            # Energies are in meV; a property may have any size.
            digits = "4g" if kind == "value" else "2f"
            for statistic in ("MAE", "RMSE"):
                cells = [
                    f"{getattr(metrics[target], statistic.lower())(kind) * factor:.{digits}}"
                    if target in metrics and kind in metrics[target].kinds
                    else "-"
                    for metrics in columns
                ]
                table.add_row(f"{prefix}{name} {statistic}", unit, *cells)


def committee_table(members: Sequence[Metrics], committee: Metrics, title: str = "") -> Table:
    """Errors (columns) of each member, of a member on average, and of the committee's mean."""
    columns = [(kind, name) for kind in committee.kinds for name in ("mae", "rmse")]
    table = Table("", title=title, title_justify="left")
    for kind, name in columns:
        table.add_column(f"{kind} {name.upper()}\n{committee.shown(kind)[2]}", justify="right")

    def errors(metrics: Metrics) -> list[float]:
        return [getattr(metrics, name)(kind) * metrics.shown(kind)[1] for kind, name in columns]

    each = [errors(metrics) for metrics in members]
    rows = {f"member {number}": values for number, values in enumerate(each)}
    rows["a member on average"] = [sum(values) / len(each) for values in zip(*each, strict=True)]
    rows["committee"] = errors(committee)
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def calibration_table(curves: Mapping[str, Curves]) -> Table:
    """Factor and miscalibration areas of each kind."""
    table = Table(title="calibration of the spread", title_justify="left")
    for name in ("", "factor", "miscalibration area before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for kind, found in curves.items():
        areas = f"{found.area_before:.3f}", f"{found.area_after:.3f}"
        table.add_row(kind, f"{found.factor:.3f}", *areas)
    return table


def uncertainty_text(target: str, found: Deviations) -> str:
    """Line on the calibration of an uncertainty."""
    sure, wrong = (1000.0 * float(np.sqrt(np.mean(v**2))) for v in (found.spreads, found.errors))
    inside = [100.0 * found.within(widths) for widths in (1.0, 2.0)]
    return (
        f"uncertainty of '{target}': {sure:.2f} meV/atom beside errors of {wrong:.2f} (root mean "
        f"squares); {inside[0]:.0f} and {inside[1]:.0f} % of the errors lie within one and two of "
        "it (68 and 95 % would where they are normal); miscalibration area "
        f"{miscalibration_area(found.coverage()):.3f}"
    )


def spread_text(rotations: int, target: str, spread: Spread, errors: Metrics) -> str:
    """Line on the change of a target's predictions under rotation."""
    error = errors.mae("forces")
    share = f" ({100 * spread.forces / error:.0f} % of their MAE)" if error > 0 else ""
    return (
        f"{rotations} random orientations: {target} {1000 * spread.energy:.2f} meV/atom, forces "
        f"{1000 * spread.forces:.2f} meV/A{share} from the mean over them"
    )
