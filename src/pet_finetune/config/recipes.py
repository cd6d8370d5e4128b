"""Options of how training may go: averages, unfreezing, stages of the loss, noise, pre-training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import (
    Expects,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
    TextList,
    integer,
    real_number,
)

__all__ = [
    "LabelNoise",
    "LastLayerOptions",
    "LossSchedule",
    "LossStage",
    "MixedPrecision",
    "PretrainOptions",
    "RotationalConsistency",
    "Unfreeze",
    "WeightMean",
    "first_epoch",
]

#: Leaves products such as 0.28 * 25 = 7.000000000000001 what they are meant to be.
_TINY = 1e-9

MixedPrecision = Annotated[Literal["bf16-mixed"], OneOf()]


class LastLayerOptions(Section):
    """An uncertainty from the last layer (metatrain's LLPR). In a file also `true` or `false`."""

    short_forms = ("boolean",)

    regularizer: PositiveFloat | None = Field(
        default=None,
        description="Added to the diagonal of the features' covariance. Null: the smallest power "
        "of ten, from the rounding of the features on, with which it can be decomposed.",
    )
    calibration_method: Annotated[
        Literal["absolute_residuals", "squared_residuals", "crps"], OneOf()
    ] = Field(
        default="absolute_residuals",
        description="How the factor is found on the validation set: from the mean of |error| / "
        "uncertainty, from that of its square, or by the smallest continuous ranked probability "
        "score.",
    )
    num_ensemble_members: NonNegativeInt = Field(
        default=16,
        description="Last layers that are drawn for each energy: their spread is an uncertainty of "
        "forces and stress too. 0: none.",
    )


def first_epoch(start: float, num_epochs: int) -> int:
    """The first epoch, from 0, that lies wholly in the part of a run that begins at ``start``.

    Args:
        start: a fraction of the run.
        num_epochs: of the run.
    """
    return math.ceil(start * num_epochs - _TINY)


class WeightMean(Section):
    """Stochastic weight averaging (SWA, arXiv:1803.05407): the mean of many steps' weights."""

    start: OpenFraction = Field(
        default=0.75,
        description="Part of the run after which averaging begins, with a whole epoch.",
    )
    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="Constant learning rate from there on. Null goes on with the scheduler's.",
    )


class LossStage(Section):
    """Factors on the weights of the loss from some part of the run on."""

    start: Fraction = Field(
        description="Part of the run after which the factors hold, from a whole epoch on."
    )
    energy: NonNegativeFloat = Field(default=1.0, description="Factor on the weight of energies.")
    forces: NonNegativeFloat = Field(default=1.0, description="Factor on the weight of forces.")
    stress: NonNegativeFloat = Field(default=1.0, description="Factor on the weight of stresses.")


def _as_list(value: Any) -> Any:
    """One stage without the list around it, or nothing under the name."""
    return [value] if isinstance(value, Mapping) else () if value is None else value


LossSchedule = Annotated[tuple[LossStage, ...], BeforeValidator(_as_list)]


class RotationalConsistency(Section):
    """A loss of what predictions change by when the structure is rotated."""

    short_forms = ("number",)

    weight: PositiveFloat = Field(
        default=1.0,
        description="What a rotated structure counts beside a labelled one, with the types and "
        "weights of `loss`; more than 2 can spoil the training.",
    )
    fraction: Share = Field(
        default=0.5,
        description="Part of each batch that is rotated once more and predicted again; a step "
        "takes somewhat more than as much longer.",
    )

    @model_validator(mode="before")
    @classmethod
    def _weight_alone(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return {"weight": value}


class LabelNoise(Section):
    """Gaussian noise on the training labels, drawn anew in each epoch."""

    energy: NonNegativeFloat = Field(
        default=0.0, description="Standard deviation on the energy, eV/atom."
    )
    forces: NonNegativeFloat = Field(
        default=0.0, description="Standard deviation on each force component, eV/Å."
    )


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

    short_forms = ("integer",)

    every: PositiveInt | None = Field(
        default=None,
        description="Epochs after which one part more trains: first the heads, then the GNN "
        "layers from the last to the first, then the embeddings.",
    )
    stages: UnfreezeStages | None = Field(
        default=None,
        description="Instead of `every`: how many epochs are done when something begins to "
        "train, and what: `heads`, `embeddings`, `all`, or modules of the network such as "
        "`gnn_layers.1`. What trains once goes on training.",
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_alone(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return value
        return {"every": value}


def _temperatures(value: Any) -> tuple[float, ...]:
    """One temperature or several, K."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError
    return tuple(real_number(above=0.0, below=1e5)(one) for one in values)


class PretrainOptions(Section):
    """Continued pre-training on the user's own system, before fine-tuning."""

    teacher: Text = Field(
        default="gfn2",
        description="Who labels the frames: `gfn2` or `gfn1` (GFN2-xTB, GFN1-xTB; the extra "
        "`xtb`), an ASE calculator as `module:name`, or the path of a checkpoint.",
    )
    n: Annotated[int, Expects("an integer of at least 20", integer(20))] = Field(
        default=2000, description="About how many frames the teacher labels."
    )
    temperatures: Annotated[
        tuple[float, ...], Expects("a positive number or a list of them", _temperatures)
    ] = Field(
        default=(300.0, 600.0, 1000.0),
        description="Of the molecular dynamics that explores new frames, K.",
    )
    epochs: PositiveInt = Field(default=10, description="Passes over the labelled frames.")
    batch_size: PositiveInt = Field(default=10, description="Structures in a batch of them.")
    learning_rate: PositiveFloat = Field(
        default=2e-4, description="Highest learning rate of this training in full with `soap`."
    )
    max_force: PositiveFloat = Field(
        default=20.0, description="Frames with a larger force on an atom are dropped, eV/A."
    )
    max_energy: PositiveFloat = Field(
        default=1.0,
        description="Frames so much above the structure that they began from are dropped, eV/atom.",
    )
    target: Text | None = Field(
        default=None,
        description="The energy of the foundation that is trained. Null: the only one, or "
        "`energy`.",
    )
    seed: NonNegativeInt = Field(
        default=0, description="Of dynamics, displacements, sets and training."
    )
