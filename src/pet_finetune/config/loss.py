"""Options of the loss: ``architecture.training.loss``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .base import Expects, NonNegativeFloat, OneOf, PositiveFloat, Section

__all__ = ["GradientLosses", "LossOptions", "LossTerm", "LossType", "TargetLoss"]

LossType = Literal["mse", "mae", "huber"]


def _reduction(value: Any) -> str:
    if value == "mean":
        return "mean"
    raise ValueError("The loss is always a mean; change `weight` to scale it.")


class LossTerm(Section):
    """The loss of one quantity. In a file also just its type."""

    short_forms = ("string",)

    type: Annotated[LossType, OneOf()] = Field(
        default="mse",
        description="Mean squared error, mean absolute error, or Huber's mixture of both.",
    )
    weight: NonNegativeFloat = Field(default=1.0, description="Factor in the total loss.")
    delta: PositiveFloat = Field(
        default=1.0,
        description="Huber: where squared turns to absolute, in units of the scaled target.",
    )
    reduction: Annotated[Literal["mean"], Expects("'mean'", _reduction)] = Field(
        default="mean", description="How the values of a batch are combined; only `mean`."
    )

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


class GradientLosses(Section):
    """Losses of the derivatives of an energy, by metatrain's names."""

    positions: LossTerm | None = Field(default=None, description="Loss of the forces.")
    strain: LossTerm | None = Field(default=None, description="Loss of the stress.")


class TargetLoss(LossTerm):
    """The loss of one target and of its forces and stress."""

    forces: LossTerm | None = Field(
        default=None, description="Loss of the forces: a type, or these keys."
    )
    stress: LossTerm | None = Field(
        default=None, description="Loss of the stress: a type, or these keys."
    )
    virial: LossTerm | None = Field(default=None, description="Another name of `stress`.")
    gradients: GradientLosses = Field(
        default=GradientLosses(), description="Another place for the losses of forces and stress."
    )

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
