"""Options of fine-tuning: ``architecture.training.finetune``, in metatrain's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import model_validator

from pet_finetune.elements import atomic_number, symbol_of
from pet_finetune.errors import did_you_mean

from .base import (
    Expects,
    Flag,
    Fraction,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
    TextList,
    integer,
    real_number,
)
from .finetune_sections import (
    AnchorOptions,
    LastLayerOptions,
    PretrainOptions,
    ReplayOptions,
    RetentionOptions,
    Unfreeze,
)

FinetuneMethod = Literal["full", "lora", "prompt", "heads"]

#: The projections LoRA adapts unless told otherwise: those of attention and of the MLP.
DEFAULT_TARGET_MODULES: tuple[str, ...] = (
    "attention.input_linear",
    "attention.output_linear",
    "mlp.w_in",
    "mlp.w_out",
)

#: Other names of a method, with the setting that makes the difference.
METHOD_SHORTHANDS: dict[str, tuple[FinetuneMethod, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "qlora": ("lora", {"quant_bits": 4}),
}


def _pattern(check: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """The check of a mapping from layers to numbers."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        return {str(name): check(number) for name, number in value.items()}

    return convert


RankPattern = Annotated[dict[str, int], Expects("{layer: positive integer}", _pattern(integer(1)))]
AlphaPattern = Annotated[
    dict[str, float], Expects("{layer: positive number}", _pattern(real_number(above=0.0)))
]


class FinetuneConfig(Section):
    """Settings of the method; which keys may be given depends on ``finetune.method``.

    Files may use PEFT's names `r`, `lora_alpha`, `lora_dropout` too.
    """

    rank: PositiveInt = 32
    """Rank of the update of each adapted weight (`r` in PEFT)."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank (`lora_alpha` in PEFT). Left out, alpha equals the
    rank."""
    dropout: Fraction = 0.0
    """Dropout in front of the update while training (`lora_dropout` in PEFT)."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """LoRA+ (arXiv:2402.12354): the factors B learn this many times faster than the factors A."""
    target_modules: TextList = DEFAULT_TARGET_MODULES
    """Linear layers to adapt: names, name endings or regular expressions, or `all-linear`."""
    modules_to_save: TextList | None = None
    """Modules trained in full beside LoRA or prompts. Null: head and last layers of the trained
    targets; an empty list: none."""
    use_rslora: Flag = False
    """Scale the update by alpha / sqrt(rank) (rsLoRA), so that a larger rank needs no other
    learning rate."""
    use_dora: Flag = False
    """Train the lengths of the weights' rows apart from their directions (DoRA). `method: dora`
    means the same."""
    rank_pattern: RankPattern = {}
    """Other ranks for some layers, by the ending of their name or a regular expression, e.g.
    {mlp.w_in: 16}."""
    alpha_pattern: AlphaPattern = {}
    """Other alphas for some layers; keys as in `rank_pattern`."""
    quant_bits: Annotated[Literal[4, 8], OneOf()] | None = None
    """Hold the frozen weights in 4 (NF4) or 8 bits to save memory (QLoRA); the adapters stay
    floats. Not exact at the first step, and slower. `method: qlora` means 4. Null: as they are."""
    num_prompts: PositiveInt = 8
    """Method `prompt`: learned tokens in each attention layer."""
    head_modules: TextList | None = None
    """Method `heads`: name prefixes of the heads to train. Null: those of the trained targets."""
    last_layer_modules: TextList | None = None
    """Method `heads`: name prefixes of the last layers to train. Null: those of the trained
    targets."""
    layer_decay: Share = 1.0
    """Method `full`: factor on the learning rate for each part further from the heads: the GNN
    layers from the last to the first, then the embeddings."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "alpha" in value:
            return value
        rank = value.get("rank")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            return value
        return {**value, "alpha": float(rank)}


#: Keys of :class:`FinetuneConfig` that have a meaning for each method.
METHOD_KEYS: dict[FinetuneMethod, frozenset[str]] = {
    "lora": frozenset(
        {
            "rank", "alpha", "dropout", "target_modules", "modules_to_save", "use_rslora",
            "use_dora", "rank_pattern", "alpha_pattern", "quant_bits",
            "loraplus_lr_ratio",
        }
    ),
    "prompt": frozenset({"num_prompts", "modules_to_save"}),
    "heads": frozenset({"head_modules", "last_layer_modules"}),
    "full": frozenset({"layer_decay"}),
}  # fmt: skip


#: Keys that metatrain's own options have under ``finetune.config``.
METATRAIN_KEYS = frozenset(
    {"rank", "alpha", "target_modules", "head_modules", "last_layer_modules"}
)


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

    model: Text
    """State dict of the model (`MODEL_TO_START_WITH`)."""
    all_species: Text
    """`all_species.npy`: atomic numbers, shape [n_species] (`ALL_SPECIES_PATH`)."""
    self_contributions: Text
    """`self_contributions.npy`: energy of each species, shape [n_species], eV
    (`SELF_CONTRIBUTIONS_PATH`)."""


class FinetuneOptions(Section):
    """Where training starts and which weights it changes."""

    method: Annotated[FinetuneMethod, OneOf()] = "full"
    """`lora`: low-rank updates and the heads; `prompt`: learned tokens in the attention, and the
    heads; `heads`: only the heads; `full`: all weights. Left out, it is `lora` with `-c` and `full`
    with `read_from`. `dora` and `qlora` are short for `lora` with `use_dora` and with `quant_bits:
    4`."""
    read_from: Text | None = None
    """Checkpoint to start from: a path, an address (`https://`, `hf://`) or a name such as
    `pet-mad-s`. Null trains from scratch. `-c` sets it too."""
    config: FinetuneConfig = FinetuneConfig()
    """Settings of the method."""
    inherit_heads: dict[Text, Text] = {}
    """New target: existing target whose head it starts from."""
    unfreeze: Unfreeze | None = None
    """Method `full`: train the heads first and deeper parts later. Null trains everything from the
    start."""
    legacy_start: LegacyStart | None = None
    """Start from the three files of the first PET code instead."""
    retention: RetentionOptions = RetentionOptions()
    """The report on what was forgotten: a section, `off`, or the path of a labelled file."""
    replay: ReplayOptions | None = None
    """Train on what the foundation knows beside the user's data."""
    pretrain: PretrainOptions | None = None
    """Let the model of `read_from` learn the system first: frames like the training structures,
    labelled at a cheap level. Done once for the same settings, structures and weights, and kept in
    the cache. Null: no."""
    anchor: AnchorOptions | None = None
    """Hold the weights near the foundation's: a section, or a type."""

    new_elements: NewElements | None = None
    """Elements of the data that the starting model lacks: `nearest` starts each with the embeddings
    of the nearest element that the model knows in the periodic table, `random` with random ones,
    and a mapping such as {Br: Cl, Na: Li} with those named. Null refuses such data."""
    ensemble: PositiveInt | None = None
    """Train a committee of this many LoRA adapters, at least 2, in one run: members with their own
    seeds, of the adapter and of the order and rotations of the data. Their spread is an
    uncertainty, calibrated on the validation set. Null: one model."""
    bootstrap: Flag = True
    """With `ensemble`: each member is trained on as many structures as there are, drawn from the
    training set with replacement. False: all of them are trained on all."""
    member: NonNegativeInt | None = None
    """With `ensemble`: train only the member of this number, counted from 0, as a run of its own (a
    job of an array, say). Null: all of them, one after the other."""

    llpr: LastLayerOptions | None = None
    """Give the trained model an uncertainty from its last layer (metatrain's LLPR): `true`, or a
    section. It is made from the training set and calibrated on the validation set. Null: none; that
    of the starting model does not hold for other weights."""

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """A section with nothing under its name arrives as null."""
        if not isinstance(value, Mapping):
            return value
        if isinstance(value.get("llpr"), bool):
            value = {**value, "llpr": {} if value["llpr"] else None}
        sections = ("config", "inherit_heads", "retention")
        return {k: v for k, v in value.items() if v is not None or k not in sections}

    @property
    def starts_from_model(self) -> bool:
        """Whether training starts from existing weights rather than from scratch."""
        return self.read_from is not None or self.legacy_start is not None
