"""Options that keep what the foundation knew: ``finetune.retention``, ``replay``, ``anchor``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .base import (
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
    TextList,
)
from .dataset import DatasetOptions
from .shorthands import expand_switch

__all__ = ["AnchorOptions", "ReplayOptions", "RetentionOptions"]

#: Strength of each anchor where none is given; see docs/keeping.md.
DEFAULT_STRENGTHS = {"l2sp": 30.0, "ewc": 100.0}


class RetentionOptions(Section):
    """The forgetting report. In a file also ``off``, or the path of a labelled file."""

    short_forms = ("string", "boolean")

    mode: Annotated[Literal["on", "off"], OneOf()] = Field(
        default="on", description="`off`: no report on what was forgotten."
    )
    read_from: DatasetOptions | None = Field(
        default=None,
        description="Labelled structures of the foundation's own kind: a path, or a data set with "
        "one target, which is one of the foundation's. Null: the foundation's own predictions on "
        "the probe set that ships.",
    )
    max_structures: PositiveInt | None = Field(
        default=None,
        description="At most so many of them: the most different ones (farthest points). Null: "
        "all.",
    )
    every: PositiveInt | None = Field(
        default=None,
        description="Epochs between two rows of `train.csv` with these errors. Null: some twenty "
        "times a run.",
    )

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

    read_from: DatasetOptions | None = Field(
        default=None,
        description="Real data of the pre-training kind: a path, or a data set with one target, "
        "which is one of the foundation's. Null: the foundation labels `structures` itself.",
    )
    structures: TextList = Field(
        default=("training",),
        description="What the foundation labels before training starts: `training` (the training "
        "structures and distorted copies of them), `probe` (the probe set that ships), paths of "
        "files whose labels, if any, are not used, or a list of these.",
    )
    copies: NonNegativeInt = Field(
        default=1, description="Distorted copies of each training structure."
    )
    rattle: NonNegativeFloat = Field(
        default=0.1,
        description="Standard deviation of each coordinate of the distorted copies, Å.",
    )
    strain: NonNegativeFloat = Field(
        default=0.03,
        description="Standard deviation of each component of the strain of distorted copies that "
        "are periodic in all three directions.",
    )
    max_structures: PositiveInt | None = Field(
        default=None,
        description="At most so many of all these: the most different ones (farthest points). "
        "Null: all.",
    )
    fraction: OpenFraction = Field(
        default=0.25,
        description="Part of all structures of a step that are replayed: beside a batch of 12, "
        "0.25 means 4.",
    )
    weight: PositiveFloat = Field(
        default=1.0,
        description="Weight of the replayed structures' loss beside that of the user's.",
    )


class AnchorOptions(Section):
    """A spring between the weights and the foundation's. In a file also just the type."""

    short_forms = ("string",)

    type: Annotated[Literal["l2sp", "ewc"], OneOf()] = Field(
        description="`l2sp`: every weight is held alike; `ewc`: each by how much the foundation's "
        "predictions depend on it (diagonal Fisher information)."
    )
    strength: PositiveFloat | None = Field(
        default=None,
        description="Factor of the penalty. Null chooses: 30 for `l2sp`, 100 for `ewc`.",
    )
    structures: TextList = Field(
        default=("probe",),
        description="With `ewc`: the structures whose predictions count, given as for `replay`.",
    )
    samples: PositiveInt = Field(
        default=256,
        description="With `ewc`: at most this many of them, chosen by the seed.",
    )

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @property
    def factor(self) -> float:
        """The strength given, or the one of the type."""
        return DEFAULT_STRENGTHS[self.type] if self.strength is None else self.strength
