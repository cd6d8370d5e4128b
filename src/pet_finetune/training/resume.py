"""Going on with a run: what ``last.ckpt`` keeps of it, and what must not have changed since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pet_finetune import processes
from pet_finetune.adapters.layers import train_new_rows
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.run_options import Options
from pet_finetune.config.training import EarlyStopping
from pet_finetune.errors import TrainingError
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.nn.primitives import ROWS
from pet_finetune.runs import changed_options, undisturbed, with_defaults_of

from .metrics import Errors, Metrics
from .run_files import BEST, OPTIONS, RunFiles
from .starting_model import Start

_logger = get_logger(__name__)


def plain_errors(errors: Errors) -> dict[str, dict[str, dict[str, float]]]:
    """Errors as numbers, for a file: by set, target and name."""
    return {
        name: {target: metrics.as_dict() for target, metrics in targets.items()}
        for name, targets in errors.items()
    }


def plain_states(errors: Errors) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Errors as the sums that they are made of, to go on with."""
    return {
        name: {target: metrics.state() for target, metrics in targets.items()}
        for name, targets in errors.items()
    }


def errors_of(plain: Mapping[str, Any], specs: Mapping[str, TargetSpec]) -> Errors:
    """The opposite of :func:`plain_states`; ``specs`` are the model's targets."""
    return {
        name: {target: Metrics(target, state, specs.get(target)) for target, state in own.items()}
        for name, own in plain.items()
    }


# How an epoch is cut into batches: half an epoch of one kind cannot be finished as another.
_BATCHES = ("batch_size", "max_atoms_per_batch", "min_atoms_per_batch")


@dataclass(frozen=True)
class RunState:
    """Constant data of a run, stored in addition to the trainer's state.

    Attributes:
        seed: of the data's order and rotations.
        learning_rate: the highest.
        baseline: how the baselines were found.
        before: errors of the starting model by set and target.
        name, fingerprint, inherited: as in :class:`~.starting_model.Start`.
        new_species: atomic numbers that were added to the starting model.
        max_atoms: of a batch, where ``max_atoms_per_batch: auto`` found it.
    """

    seed: int
    learning_rate: float
    baseline: str
    before: Errors
    name: str
    fingerprint: str | None
    inherited: dict[str, str]
    new_species: list[int] = field(default_factory=list)
    max_atoms: int | None = None

    def plain(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {**vars(self), "before": plain_states(self.before)}

    @classmethod
    def from_plain(
        cls, values: Mapping[str, Any], specs: Mapping[str, TargetSpec] | None = None
    ) -> RunState:
        """The opposite of :meth:`plain`; ``specs`` are the model's targets."""
        return cls(**{**values, "before": errors_of(values["before"], specs or {})})


@dataclass(frozen=True)
class SavedRun:
    """A run that can be gone on with.

    Attributes:
        path: its ``last.ckpt``.
        model: with its adapter unmerged.
        provenance: of the run.
        state: what it was told.
        trainer: the trainer's state.
        options: with which it goes on.
    """

    path: Path
    model: Potential
    provenance: dict[str, Any]
    state: RunState
    trainer: dict[str, Any]
    options: Options

    def start(self) -> Start:
        """The model with the same parameters training as before."""
        trained, state = self.trainer["trained"], self.state
        for name, parameter in self.model.network.named_parameters():
            parameter.requires_grad_(name in trained)
        rows_train = any(name.endswith(f".{ROWS}") for name in trained)
        if rows_train and self.model.adapter is None:  # an adapter brings its own
            train_new_rows(self.model, state.new_species)
        return Start(self.model, state.name, state.fingerprint, {}, (), state.inherited)


def open_run(path: str | Path, options: Options) -> SavedRun:
    """Open a ``last.ckpt``, and warn where the options are not those of its run.

    Raises:
        CheckpointError: the file cannot be read.
        TrainingError: it holds no run, or options changed that half an epoch depends on.
    """
    checkpoint = load_checkpoint(path, keep_adapter=True)
    if checkpoint.training is None and checkpoint.kind == "metatrain":
        raise TrainingError(
            f"{path} is a checkpoint of metatrain, whose optimizer and schedule cannot be gone on "
            f"with. Start a new run from its weights: -c {path} "
            "-r architecture.training.finetune.method=full (or lora)."
        )
    if checkpoint.training is None:
        raise TrainingError(
            f"{path} holds a model but no run to go on with. Give the run's last.ckpt to "
            f"--restart, or start a new run from this model with -c {path}."
        )
    try:
        state = RunState.from_plain(checkpoint.training["run"], checkpoint.model.targets)
        trainer = checkpoint.training["trainer"]
        middle = trainer["progress"]["batch"] > 0
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path} holds a run that this release of pet-finetune did not write ({error}). Start "
            f"a new run from its model with -c {path}."
        ) from error
    before = checkpoint.provenance.get("options", {})
    _check_member(options, before, path)
    options = with_defaults_of(options, before)
    _compare_options(options, before, middle)
    return SavedRun(Path(path), checkpoint.model, checkpoint.provenance, state, trainer, options)


def take_files(run: SavedRun, files: RunFiles) -> None:
    """Make the run's files so far those of the folder in which it goes on.

    Raises:
        TrainingError: the best model so far is gone, or the folder holds another run.
    """
    old = run.path.parent
    if run.trainer["progress"]["best_epoch"] > 0 and not (old / BEST).exists():
        raise TrainingError(
            f"'{old / BEST}', the best model of this run so far, is gone: put it back beside "
            f"{run.path.name}, or start a new run with -c {run.path}."
        )
    if old.resolve() != files.folder.resolve() and processes.first():
        with undisturbed(old):
            files.take_over(old)
    processes.barrier()


def _check_member(options: Options, before: Mapping[str, Any], path: str | Path) -> None:
    """Make sure that a run goes on with the structures and the seed that it began with."""
    old = before.get("architecture", {}).get("training", {}).get("finetune", {})
    then = (old.get("member"), old.get("member") is not None and old.get("bootstrap"))
    now = options.finetune.member
    if then != (now, now is not None and options.finetune.bootstrap):
        whose = (
            "no member of an ensemble"
            if then[0] is None
            else (f"member {then[0]} of an ensemble with bootstrap: {str(then[1]).lower()}")
        )
        raise TrainingError(
            f"--restart: '{path}' is of {whose}, which these options are not for. Use the "
            f"{OPTIONS} beside it, or that of the whole run."
        )


def _compare_options(options: Options, before: Mapping[str, Any], middle: bool) -> None:
    """Warn of options that differ from those the run had until now."""
    for change in changed_options(options, before):
        name, now, then = change.name, _shown(change.now), _shown(change.then)
        if middle and name.rpartition(".")[2] in _BATCHES:
            raise TrainingError(
                f"--restart: {name} is {now}, but the run stopped within an epoch whose batches "
                f"were cut with {then}. Set it back, at least until the end of that epoch."
            )
        if change.heeded:
            _logger.warning("--restart: %s is %s; until now the run had %s", name, now, then)
        else:
            _logger.warning("--restart: %s is %s; the run goes on with %s, as it began", name, now,
                            then)  # fmt: skip


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


@dataclass
class Progress:
    """Part of the saved state of a run.

    Attributes:
        epoch: epochs done.
        batch: batches done of the epoch under way.
        step: updates done.
        loss_sum, extra_sums, structures, seconds, epoch_metrics: of the epoch under way.
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

    def metrics(self, targets: list[str], fresh: bool = False) -> dict[str, Metrics]:
        """Errors of the epoch under way to go on with; none of them if ``fresh``."""
        if fresh:
            return {name: Metrics(name) for name in targets}
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
