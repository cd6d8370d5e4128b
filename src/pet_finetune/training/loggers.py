"""Loggers beside ``train.csv``, features of training: TensorBoard, Weights & Biases, Trackio.

They get the numbers of ``train.csv`` after each epoch, under the names of its columns. A run goes
on where one of them fails on the way: a service that is down is no reason to lose a training.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pet_finetune import processes
from pet_finetune.config import Options
from pet_finetune.errors import ConfigError
from pet_finetune.extras import missing_extra
from pet_finetune.log import get_logger

from .feature import Feature, Plan, TrainingRun
from .records import EpochRecord
from .run_files import RunFiles, columns_of

__all__ = ["loggers"]

_logger = get_logger(__name__)


def loggers(options: Options, files: RunFiles) -> Iterator[Feature]:
    """The loggers that the options ask for.

    Args:
        options: of the run.
        files: of the run, in whose folder they write.
    """
    wanted = list(options.training.log)
    if options.wandb is not None and "wandb" not in wanted:
        wanted.append("wandb")
    for name in wanted:
        if name in _KINDS:
            yield _KINDS[name](options, files)


class Logger(Feature):
    """Hands the numbers of each epoch to one library; made for the first process of a run.

    Args:
        options: of the run.
        files: of the run.
    """

    library: str

    def __init__(self, options: Options, files: RunFiles) -> None:
        self.options, self.folder = options, Path(files.folder)
        self._open = False

    def check(self, plan: Plan) -> None:
        """Make sure that the library is there.

        Raises:
            ConfigError: it is not installed.
        """
        problem = missing_extra(self.library, self.name)
        if problem is not None:
            raise ConfigError(f"architecture.training.log: {self.name} {problem}")

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Open it in the process that writes the run's files."""
        if not processes.first():
            return
        problem = missing_extra(self.library, self.name)
        if problem is not None:  # of a run that goes on elsewhere
            raise ConfigError(f"architecture.training.log: {self.name} {problem}")
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
