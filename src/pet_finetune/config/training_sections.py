"""Sections below ``training``: the loss and its stages, averages of weights, noise, consistency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from .base import (
    Expects,
    Fraction,
    NonNegativeFloat,
    OneOf,
    OpenFraction,
    PositiveFloat,
    Section,
    Share,
)

LossType = Literal["mse", "mae", "huber"]


def _reduction(value: Any) -> str:
    if value == "mean":
        return "mean"
    raise ValueError("The loss is always a mean; change `weight` to scale it.")


class LossTerm(Section):
    """The loss of one quantity. In a file also just its type."""

    short_forms, short_for = ("string",), "type"

    type: Annotated[LossType, OneOf()] = "mse"
    """Mean squared error, mean absolute error, or Huber's mixture of both."""
    weight: NonNegativeFloat = 1.0
    """Factor in the total loss."""
    delta: PositiveFloat = 1.0
    """Huber: where squared turns to absolute, in units of the scaled target."""
    reduction: Annotated[Literal["mean"], Expects("'mean'", _reduction)] = "mean"
    """How the values of a batch are combined; only `mean`."""


class GradientLosses(Section):
    """Losses of the derivatives of an energy, by metatrain's names."""

    positions: LossTerm | None = None
    """Loss of the forces."""
    strain: LossTerm | None = None
    """Loss of the stress."""


class TargetLoss(LossTerm):
    """The loss of one target and of its forces and stress."""

    forces: LossTerm | None = None
    """Loss of the forces: a type, or these keys."""
    stress: LossTerm | None = None
    """Loss of the stress: a type, or these keys."""
    virial: LossTerm | None = None
    """Another name of `stress`."""
    gradients: GradientLosses = GradientLosses()
    """Another place for the losses of forces and stress."""

    def forces_term(self) -> LossTerm:
        """Loss of the forces, wherever it was given; mean squared error otherwise."""
        return self.forces or self.gradients.positions or LossTerm()

    def stress_term(self) -> LossTerm:
        """Loss of the stress, wherever it was given; mean squared error otherwise."""
        return self.stress or self.virial or self.gradients.strain or LossTerm()

    @property
    def has_gradients(self) -> bool:
        """Whether a loss of forces or stress is given."""
        given = (self.forces, self.stress, self.virial, self.gradients.positions)
        return any(term is not None for term in (*given, self.gradients.strain))

    def repeated(self) -> list[tuple[str, ...]]:
        """Groups of keys that set the same loss, where more than one of them is given."""
        groups = {
            "forces": (("forces", self.forces), ("gradients.positions", self.gradients.positions)),
            "stress": (
                ("stress", self.stress),
                ("virial", self.virial),
                ("gradients.strain", self.gradients.strain),
            ),
        }
        given = [tuple(key for key, term in group if term) for group in groups.values()]
        return [keys for keys in given if len(keys) > 1]


def _kind_of_loss(value: Any) -> str:
    return "#each" if isinstance(value, Mapping) else "#all"


#: One type for everything, or a loss for each target.
LossOptions = Annotated[
    Annotated[Annotated[LossType, OneOf()], Tag("#all")]
    | Annotated[dict[str, TargetLoss], Tag("#each")],
    Discriminator(_kind_of_loss),
]

#: Leaves products such as 0.28 * 25 = 7.000000000000001 what they are meant to be.
_TINY = 1e-9

MixedPrecision = Annotated[Literal["bf16-mixed"], OneOf()]


def first_epoch(start: float, num_epochs: int) -> int:
    """The first epoch, from 0, that lies wholly in the part of a run that begins at ``start``.

    Args:
        start: a fraction of the run.
        num_epochs: of the run.
    """
    return math.ceil(start * num_epochs - _TINY)


class WeightMean(Section):
    """Stochastic weight averaging (SWA, arXiv:1803.05407): the mean of many steps' weights."""

    start: OpenFraction = 0.75
    """Part of the run after which averaging begins, with a whole epoch."""
    learning_rate: PositiveFloat | None = None
    """Constant learning rate from there on. Null goes on with the scheduler's."""


class LossStage(Section):
    """Factors on the weights of the loss from some part of the run on."""

    start: Fraction
    """Part of the run after which the factors hold, from a whole epoch on."""
    energy: NonNegativeFloat = 1.0
    """Factor on the weight of energies."""
    forces: NonNegativeFloat = 1.0
    """Factor on the weight of forces."""
    stress: NonNegativeFloat = 1.0
    """Factor on the weight of stresses."""


def _as_list(value: Any) -> Any:
    """One stage without the list around it, or nothing under the name."""
    return [value] if isinstance(value, Mapping) else () if value is None else value


LossSchedule = Annotated[tuple[LossStage, ...], BeforeValidator(_as_list)]


class RotationalConsistency(Section):
    """A loss of what predictions change by when the structure is rotated."""

    short_forms, short_for = ("number",), "weight"

    weight: PositiveFloat = 1.0
    """What a rotated structure counts beside a labelled one, with the types and weights of `loss`;
    more than 2 can spoil the training."""
    fraction: Share = 0.5
    """Part of each batch that is rotated once more and predicted again; a step takes somewhat more
    than as much longer."""


class LabelNoise(Section):
    """Gaussian noise on the training labels, drawn anew in each epoch."""

    energy: NonNegativeFloat = 0.0
    """Standard deviation on the energy, eV/atom."""
    forces: NonNegativeFloat = 0.0
    """Standard deviation on each force component, eV/Å."""
