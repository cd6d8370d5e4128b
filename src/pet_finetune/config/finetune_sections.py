"""Sections below ``finetune``: retention, replay, anchor; unfreezing, last layer, pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import model_validator

from .base import (
    Expects,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    TextList,
    integer,
    real_number,
)
from .dataset import DatasetOptions
from .target import expand_switch

#: Strength of each anchor where none is given; see docs/keeping.md.
DEFAULT_STRENGTHS = {"l2sp": 30.0, "ewc": 100.0}


class RetentionOptions(Section):
    """The forgetting report. In a file also ``off``, or the path of a labelled file."""

    short_forms = ("string", "boolean")

    mode: Annotated[Literal["on", "off"], OneOf()] = "on"
    """`off`: no report on what was forgotten."""
    read_from: DatasetOptions | None = None
    """Labelled structures of the foundation's own kind: a path, or a data set with one target,
    which is one of the foundation's. Null: the foundation's own predictions on the probe set that
    ships."""
    max_structures: PositiveInt | None = None
    """At most so many of them: the most different ones (farthest points). Null: all."""
    every: PositiveInt | None = None
    """Epochs between two rows of `train.csv` with these errors. Null: some twenty times a run."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand_switch(value)

    @property
    def wanted(self) -> bool:
        """Whether there is to be a report."""
        return self.mode == "on"

    def interval(self, num_epochs: int) -> int:
        """Epochs between two evaluations of a run."""
        return self.every or max(1, num_epochs // 20)


class ReplayOptions(Section):
    """What is replayed beside the user's data."""

    read_from: DatasetOptions | None = None
    """Real data of the pre-training kind: a path, or a data set with one target, which is one of
    the foundation's. Null: the foundation labels `structures` itself."""
    structures: TextList = ("training",)
    """What the foundation labels before training starts: `training` (the training structures and
    distorted copies of them), `probe` (the probe set that ships), paths of files whose labels, if
    any, are not used, or a list of these."""
    copies: NonNegativeInt = 1
    """Distorted copies of each training structure."""
    rattle: NonNegativeFloat = 0.1
    """Standard deviation of each coordinate of the distorted copies, Å."""
    strain: NonNegativeFloat = 0.03
    """Standard deviation of each component of the strain of distorted copies that are periodic in
    all three directions."""
    max_structures: PositiveInt | None = None
    """At most so many of all these: the most different ones (farthest points). Null: all."""
    fraction: OpenFraction = 0.25
    """Part of all structures of a step that are replayed: beside a batch of 12, 0.25 means 4."""
    weight: PositiveFloat = 1.0
    """Weight of the replayed structures' loss beside that of the user's."""


class AnchorOptions(Section):
    """A spring between the weights and the foundation's. In a file also just the type."""

    short_forms, short_for = ("string",), "type"

    type: Annotated[Literal["l2sp", "ewc"], OneOf()]
    """`l2sp`: every weight is held alike; `ewc`: each by how much the foundation's predictions
    depend on it (diagonal Fisher information)."""
    strength: PositiveFloat | None = None
    """Factor of the penalty. Null chooses: 30 for `l2sp`, 100 for `ewc`."""
    structures: TextList = ("probe",)
    """With `ewc`: the structures whose predictions count, given as for `replay`."""
    samples: PositiveInt = 256
    """With `ewc`: at most this many of them, chosen by the seed."""

    @property
    def factor(self) -> float:
        """The strength given, or the one of the type."""
        return DEFAULT_STRENGTHS[self.type] if self.strength is None else self.strength


class LastLayerOptions(Section):
    """An uncertainty from the last layer (metatrain's LLPR). In a file also `true` or `false`."""

    short_forms = ("boolean",)

    regularizer: PositiveFloat | None = None
    """Added to the diagonal of the features' covariance. Null: the smallest power of ten, from the
    rounding of the features on, with which it can be decomposed."""
    calibration_method: Annotated[
        Literal["absolute_residuals", "squared_residuals", "crps"], OneOf()
    ] = "absolute_residuals"
    """How the factor is found on the validation set: from the mean of |error| / uncertainty, from
    that of its square, or by the smallest continuous ranked probability score."""
    num_ensemble_members: NonNegativeInt = 16
    """Last layers that are drawn for each energy: their spread is an uncertainty of forces and
    stress too. 0: none."""


def _stages(value: Any) -> dict[int, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    stages = {}
    for epoch, names in value.items():
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"{epoch!r} is not a number of epochs.")
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, (list, tuple)) or not listed:
            raise ValueError(f"Epoch {epoch} names nothing that trains.")
        if not all(isinstance(name, str) and name.strip() for name in listed):
            raise ValueError(f"Epoch {epoch} names something that is no text.")
        stages[epoch] = tuple(listed)
    return dict(sorted(stages.items()))


UnfreezeStages = Annotated[
    dict[int, TextList], Expects("{epochs done: name or list of names}", _stages)
]


class Unfreeze(Section):
    """Training begins with the heads and takes in deeper parts as it goes.

    This is the gradual unfreezing of ULMFiT (arXiv:1801.06146). In a file also just the
    number of epochs ``every``.
    """

    short_forms, short_for = ("integer",), "every"

    every: PositiveInt | None = None
    """Epochs after which one part more trains: first the heads, then the GNN layers from the last
    to the first, then the embeddings."""
    stages: UnfreezeStages | None = None
    """Instead of `every`: how many epochs are done when something begins to train, and what:
    `heads`, `embeddings`, `all`, or modules of the network such as `gnn_layers.1`. What trains once
    goes on training."""


def _temperatures(value: Any) -> tuple[float, ...]:
    """One temperature or several, K."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError
    return tuple(real_number(above=0.0, below=1e5)(one) for one in values)


class PretrainOptions(Section):
    """Continued pre-training on the user's own system, before fine-tuning."""

    teacher: Text = "gfn2"
    """Who labels the frames: `gfn2` or `gfn1` (GFN2-xTB, GFN1-xTB; the extra `xtb`), an ASE
    calculator as `module:name`, or the path of a checkpoint."""
    n: Annotated[int, Expects("an integer of at least 20", integer(20))] = 2000
    """About how many frames the teacher labels."""
    temperatures: Annotated[
        tuple[float, ...], Expects("a positive number or a list of them", _temperatures)
    ] = (300.0, 600.0)
    """Of the molecular dynamics that explores new frames, K."""
    epochs: PositiveInt = 10
    """Passes over the labelled frames."""
    batch_size: PositiveInt = 10
    """Structures in a batch of them."""
    learning_rate: PositiveFloat = 2e-4
    """Highest learning rate of this training in full with `soap`."""
    max_force: PositiveFloat = 20.0
    """Frames with a larger force on an atom are dropped, eV/A."""
    max_energy: PositiveFloat = 1.0
    """Frames so much above the structure that they began from are dropped, eV/atom."""
    target: Text | None = None
    """The energy of the foundation that is trained. Null: the only one, or `energy`."""
    seed: NonNegativeInt = 0
    """Of dynamics, displacements, sets and training."""
