"""Features of training: what plugs into a run without the loop knowing it by name.

A feature overrides the hooks that it needs and leaves the others as they are. In a new run they
are called in this order: :meth:`Feature.check` before anything of the model is changed,
:meth:`Feature.start` when the model stands, the hooks of steps and epochs, :meth:`Feature.close`
when the loop ends for whatever reason, :meth:`Feature.complete` and :meth:`Feature.finish` when the
run is complete. A run that goes on skips ``check``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pet_finetune.checkpoint.archive import Checkpoint
from pet_finetune.committee.committee import Committee
from pet_finetune.config.run_options import Options
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.data.loader import Loader
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure import Structure
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property

from .metrics import Metrics
from .objectives import Objective
from .run_files import RunFiles
from .starting_model import FoundationEnergies, Start
from .step import EpochRecord, Measured, StepProgress


@dataclass(frozen=True)
class Plan:
    """A new run before anything of its model is changed.

    Attributes:
        options: of the run.
        start: the model that it starts from.
        foundation: the energies of that model; None from scratch.
        splits: the three sets as they are in the files.
        training: what is trained on, a bootstrap sample of the training set where that is asked.
        seed: of the run; random streams are derived from it.
    """

    options: Options
    start: Start
    foundation: FoundationEnergies | None
    splits: Splits
    training: Sequence[Structure]
    seed: int


@dataclass(frozen=True)
class Step:
    """A batch whose gradient has just been taken.

    Attributes:
        epoch, index: of the batch, both from 0, as :meth:`.data.loader.Loader.epoch` counts.
        batch: with its labels as they are.
        predictions: by target; their graph is gone.
    """

    epoch: int
    index: int
    batch: LabelledBatch
    predictions: Mapping[str, Prediction | Property]


class TrainingRun(Protocol):
    """The part of the :class:`~.trainer.Trainer` that features may use.

    Attributes:
        model: is trained; adapters and baselines are in place.
        options: ``architecture.training``.
        objectives: what is asked of each target.
        parameters: what trains at some time of the run, by path in the network.
        training: batches of the training set.
        validation: batches of the validation set; of the training set where there is none.
    """

    model: Potential
    options: TrainingOptions
    objectives: dict[str, Objective]
    parameters: dict[str, nn.Parameter]
    training: Loader
    validation: Loader

    def state(self) -> dict[str, Any]:
        """State that the rest of the run depends on."""
        ...


class Feature:
    """Base class of features of training; it does nothing.

    Attributes:
        name: key of its saved state and kept data; unique in a run.
        heading: heading of its errors in the final table; default: its name.
        heads: heads of the foundation that must stay in the model, known after :meth:`check`.
        shared: whether :meth:`losses` of a part of a batch is already that part's share, as from
            :func:`~.objectives.batch_loss`. Otherwise it is a mean over the structures of the part
            (or equal on all processes) and is weighted by the process's number of structures.
        sums: numbers that :meth:`losses` adds up until the update; a batch that ran out of memory
            and is tried again counts once.
        trainer: of the run, from :meth:`start` on.
    """

    name: str = ""
    heading: str = ""
    heads: tuple[str, ...] = ()
    shared: bool = False
    sums: Tensor | None = None
    trainer: TrainingRun

    def check(self, plan: Plan) -> None:
        """Read and check what the feature needs, before anything of the model is changed.

        Raises:
            PetFinetuneError: the run cannot have this feature; the message says what to do.
        """

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Prepare for the first step; the base class stores the run.

        The model has adapters and baselines in place. ``kept`` is the result of :meth:`kept` at the
        start, for a continued run.
        """
        self.trainer = trainer

    def kept(self) -> dict[str, Any] | None:
        """Data made in :meth:`start` that must not change until the run ends.

        Tensors and plain values, written once; None without any.
        """
        return None

    def before_step(self, epoch: int) -> None:
        """Called before each update, with the epoch counted from 0."""

    def labels(self, batch: LabelledBatch, epoch: int, index: int) -> LabelledBatch:
        """The batch with its labels as the loss sees them; tables show errors of the real ones.

        Args:
            batch: as it was read, or as the feature before changed it.
            epoch: from 0.
            index: of the batch in the epoch.
        """
        return batch

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Weighted scalars that are added to the loss of a batch, by name.

        They must depend on the step and the weights alone, so that a resumed run computes the
        same. The mean of each over an epoch is the column ``train/<name>`` of ``train.csv``.
        """
        return {}

    def after_update(self, epoch: int) -> None:
        """Called when the weights were updated, with the epoch counted from 0."""

    def step_ended(self, progress: StepProgress) -> None:
        """Called after each update has been counted."""

    def weights(self) -> AbstractContextManager[object]:
        """Context in which the model has the weights to validate and save."""
        return nullcontext()

    def validate(self, model: Potential, epoch: int) -> Measured | None:
        """Measurement within :meth:`weights` after an epoch (from 1), or None."""
        return None

    def epoch_ended(self, record: EpochRecord) -> None:
        """Called after each epoch, within :meth:`weights`."""

    def save(self) -> None:
        """Called when the state of the run must be written."""

    def state(self) -> dict[str, Any]:
        """State that the run depends on: tensors and plain values, saved with the run."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`."""

    def close(self) -> None:
        """Called once when the loop ends: finished, interrupted, or by an error."""

    def complete(self, best: Checkpoint, files: RunFiles) -> Mapping[str, Any]:
        """Add to the best model of a finished run, read from its file, before it is evaluated.

        The feature also writes its additions.

        Returns:
            Entries for ``results.json``.
        """
        return {}

    def errors(self, model: Potential | Committee) -> Mapping[str, dict[str, Metrics]]:
        """Errors of a model on sets of the feature's own, by the set's name and target."""
        return {}

    def notes(self) -> Sequence[str]:
        """Lines below the final table of errors."""
        return ()

    def finish(self, best: Potential, files: RunFiles) -> Mapping[str, Any]:
        """Evaluate the best model of a finished run; the result goes into ``results.json``."""
        return {}


def states_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states of features by name, also of runs that were saved before these had a place."""
    if "features" in state:
        found: Mapping[str, Any] = state["features"]
        return found
    if not state.get("average"):
        return {}
    return {"average": {"average": state["average"], "updates": state["average_updates"]}}
