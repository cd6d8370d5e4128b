"""Options of fine-tuning: ``architecture.training.finetune``, in metatrain's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pet_finetune.config.base import (
    Expects,
    Fraction,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    TextList,
)
from pet_finetune.elements import atomic_number, symbol_of
from pet_finetune.errors import did_you_mean

__all__ = [
    "DEFAULT_TARGET_MODULES",
    "HEADS_ONLY_KEYS",
    "LORA_ONLY_KEYS",
    "FinetuneConfig",
    "FinetuneMethod",
    "FinetuneOptions",
    "LegacyStart",
    "LoraOptions",
]

FinetuneMethod = Literal["full", "lora", "heads"]

#: The projections LoRA adapts unless told otherwise: those of attention and of the MLP.
DEFAULT_TARGET_MODULES: tuple[str, ...] = (
    "attention.input_linear",
    "attention.output_linear",
    "mlp.w_in",
    "mlp.w_out",
)


class LoraOptions(Section):
    """Low-rank adaptation. Files may use PEFT's names `r`, `lora_alpha`, `lora_dropout` too."""

    rank: PositiveInt = Field(
        default=8,
        description="Rank of the update of each adapted weight (`r` in PEFT).",
    )
    alpha: PositiveFloat = Field(
        default=8.0,
        description="The update is scaled by alpha / rank (`lora_alpha` in PEFT). "
        "Left out, alpha equals the rank.",
    )
    dropout: Fraction = Field(
        default=0.0,
        description="Dropout in front of the update while training (`lora_dropout` in PEFT).",
    )
    target_modules: TextList = Field(
        default=DEFAULT_TARGET_MODULES,
        description="Linear layers to adapt: names, name endings or regular expressions, or "
        "`all-linear`.",
    )
    modules_to_save: TextList | None = Field(
        default=None,
        description="Modules trained in full beside LoRA. Null: head and last layers of the "
        "trained targets; an empty list: none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "alpha" in value:
            return value
        rank = value.get("rank")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            return value
        return {**value, "alpha": float(rank)}


class FinetuneConfig(LoraOptions):
    """Settings of the method; which keys may be given depends on ``finetune.method``."""

    head_modules: TextList | None = Field(
        default=None,
        description="Method `heads`: name prefixes of the heads to train. "
        "Null: those of the trained targets.",
    )
    last_layer_modules: TextList | None = Field(
        default=None,
        description="Method `heads`: name prefixes of the last layers to train. "
        "Null: those of the trained targets.",
    )


#: Keys of :class:`FinetuneConfig` that have a meaning for one method only.
HEADS_ONLY_KEYS = frozenset({"head_modules", "last_layer_modules"})
LORA_ONLY_KEYS = frozenset(LoraOptions.model_fields)


def _new_elements(value: Any) -> str | dict[str, str]:
    """``nearest``, ``random``, or the element that each new one starts from, as symbols."""
    if isinstance(value, str):
        if value in ("nearest", "random"):
            return value
        raise ValueError(did_you_mean(value, ("nearest", "random")).strip())
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    sources: dict[str, str] = {}
    for new, old in value.items():
        name, source = (symbol_of(atomic_number(element)) for element in (new, old))
        if name in sources:
            raise ValueError(f"{name} is named twice.")
        if name == source:
            raise ValueError(f"{name} cannot start from itself.")
        sources[name] = source
    return sources


NewElements = Annotated[
    str | dict[str, str],
    Expects("nearest, random, or {new element: element that it starts from}", _new_elements),
]


class LegacyStart(Section):
    """The oldest way to start: three files of the first PET code."""

    model: Text = Field(description="State dict of the model (`MODEL_TO_START_WITH`).")
    all_species: Text = Field(
        description="`all_species.npy`: atomic numbers, shape [n_species] (`ALL_SPECIES_PATH`)."
    )
    self_contributions: Text = Field(
        description="`self_contributions.npy`: energy of each species, shape [n_species], eV "
        "(`SELF_CONTRIBUTIONS_PATH`)."
    )


class FinetuneOptions(Section):
    """Where training starts and which weights it changes."""

    method: Annotated[FinetuneMethod, OneOf()] = Field(
        default="full",
        description="`lora`: low-rank updates and the heads; `heads`: only the heads; `full`: all "
        "weights. Left out, it is `lora` with `-c` and `full` with `read_from`.",
    )
    read_from: Text | None = Field(
        default=None,
        description="Checkpoint to start from. Null trains from scratch. `-c` sets it too.",
    )
    config: FinetuneConfig = Field(
        default=FinetuneConfig(), description="Settings of the method `lora` or `heads`."
    )
    inherit_heads: dict[Text, Text] = Field(
        default={}, description="New target: existing target whose head it starts from."
    )
    legacy_start: LegacyStart | None = Field(
        default=None, description="Start from the three files of the first PET code instead."
    )

    new_elements: NewElements | None = Field(
        default=None,
        description="Elements of the data that the starting model lacks: `nearest` starts each "
        "with the embeddings of the nearest element that the model knows in the periodic table, "
        "`random` with random ones, and a mapping such as {Br: Cl, Na: Li} with those named. Null "
        "refuses such data.",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """A section with nothing under its name arrives as null."""
        if not isinstance(value, Mapping):
            return value
        sections = ("config", "inherit_heads")
        return {k: v for k, v in value.items() if v is not None or k not in sections}

    @property
    def starts_from_model(self) -> bool:
        """Whether training starts from existing weights rather than from scratch."""
        return self.read_from is not None or self.legacy_start is not None

    @property
    def lora(self) -> LoraOptions:
        """The settings of the method ``lora``."""
        return self.config
