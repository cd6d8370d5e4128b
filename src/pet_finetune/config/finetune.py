"""Options of fine-tuning: ``architecture.training.finetune``, in metatrain's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import model_validator

from pet_finetune.errors import did_you_mean

from .base import (
    Expects,
    Flag,
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
    element,
    integer,
    listed,
    mapping,
    real_number,
)
from .dataset import DatasetOptions
from .target import expand_switch

#: Strength of each anchor where none is given; see docs/keeping.md.
DEFAULT_STRENGTHS = {"l2sp": 0.001, "ewc": 10.0}


class RetentionOptions(Section):
    """The forgetting report. In a file also ``off``, or the path of a labelled file."""

    short_forms = ("string", "boolean")

    mode: Annotated[Literal["on", "off"], OneOf()] = "on"
    """`off`: no forgetting report."""
    read_from: DatasetOptions | None = None
    """Structures labelled at the foundation's level of theory: a path, or a data set with one of
    the foundation's targets. Null: the foundation's own predictions on the shipped probe set."""
    max_structures: PositiveInt | None = None
    """Largest number of them: the most different ones (farthest points). Null: all."""
    every: PositiveInt | None = None
    """Epochs between two rows of `train.csv` with these errors. Null: about twenty rows per run."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand_switch(value)

    @property
    def wanted(self) -> bool:
        """Whether a forgetting report is wanted."""
        return self.mode == "on"

    def interval(self, num_epochs: int) -> int:
        """Epochs between two evaluations of a run."""
        return self.every or max(1, num_epochs // 20)


class ReplayOptions(Section):
    """Replay in addition to the user's data."""

    read_from: DatasetOptions | None = None
    """Real data of the pre-training kind: a path, or a data set with one of the foundation's
    targets. Null: the foundation labels `structures`."""
    structures: TextList = ("training",)
    """Structures that the foundation labels before training: `training` (the training structures
    and distorted copies), `probe` (the shipped probe set), paths of files (their labels are not
    used), or a list of these."""
    copies: NonNegativeInt = 1
    """Distorted copies of each training structure."""
    rattle: NonNegativeFloat = 0.1
    """Standard deviation of each coordinate of the distorted copies, Å."""
    strain: NonNegativeFloat = 0.03
    """Standard deviation of each component of the strain of distorted copies that are periodic in
    all three directions."""
    max_structures: PositiveInt | None = None
    """Largest number of all these: the most different ones (farthest points). Null: all."""
    fraction: OpenFraction = 0.25
    """Part of all structures of a step that are replayed: with a batch of 12, 0.25 means 4."""
    weight: PositiveFloat = 1.0
    """Weight of the replayed structures' loss relative to your data."""


class AnchorOptions(Section):
    """A spring between the weights and the foundation's. In a file also just the type."""

    short_forms, short_for = ("string",), "type"

    type: Annotated[Literal["l2sp", "ewc"], OneOf()]
    """`l2sp`: the same penalty for every weight; `ewc`: weighted by how much the foundation's
    predictions depend on it (diagonal Fisher information)."""
    strength: PositiveFloat | None = None
    """Factor of the penalty. Null: 0.001 for `l2sp`, 10 for `ewc`, which suit `soap`; with `adamw`
    30 and 100 have about the same effect."""
    structures: TextList = ("probe",)
    """With `ewc`: the structures for the Fisher information, given as for `replay`."""
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
    """Added to the diagonal of the features' covariance. Null: the smallest power of ten above the
    rounding of the features with which it can be decomposed."""
    calibration_method: Annotated[
        Literal["absolute_residuals", "squared_residuals", "crps"], OneOf()
    ] = "absolute_residuals"
    """How the factor is found on the validation set: from the mean of |error| / uncertainty, from
    that of its square, or by the smallest continuous ranked probability score."""
    num_ensemble_members: NonNegativeInt = 16
    """Number of last layers drawn for each energy; their spread gives uncertainties of forces and
    stress. 0: none."""


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
    """Instead of `every`: the number of completed epochs, and what trains from then on: `heads`,
    `embeddings`, `all`, or modules of the network such as `gnn_layers.1`."""


class PretrainOptions(Section):
    """Continued pre-training on the user's own system, before fine-tuning."""

    teacher: Text = "gfn2"
    """The method that labels the frames: `gfn2` or `gfn1` (GFN2-xTB, GFN1-xTB; the extra `xtb`), an
    ASE calculator as `module:name`, or the path of a checkpoint."""
    n: Annotated[int, Expects("an integer of at least 20", integer(20))] = 2000
    """Approximate number of frames that the teacher labels."""
    temperatures: Annotated[
        tuple[float, ...],
        Expects(
            "a positive number or a list of them",
            listed(real_number(above=0.0, below=1e5), empty=False),
        ),
    ] = (300.0, 600.0)
    """Temperatures of the molecular dynamics that explores new frames, K."""
    epochs: PositiveInt = 10
    """Passes over the labelled frames."""
    batch_size: PositiveInt = 10
    """Structures in a batch of them."""
    learning_rate: PositiveFloat = 2e-4
    """Highest learning rate of this training in full with `soap`."""
    max_force: PositiveFloat = 20.0
    """Frames with a larger force on an atom are dropped, eV/A."""
    max_energy: PositiveFloat = 1.0
    """Frames with an energy this much above their start are dropped, eV/atom."""
    target: Text | None = None
    """The energy of the foundation that is trained. Null: the only one, or `energy`."""
    seed: NonNegativeInt = 0
    """Seed of dynamics, displacements, sets and training."""


FinetuneMethod = Literal["full", "lora", "prompt", "heads"]

#: The layers LoRA adapts unless told otherwise: those that make the edge tokens of each GNN layer
#: (docs/recipes.md), and the projections of attention and of the MLP.
DEFAULT_TARGET_MODULES: tuple[str, ...] = (
    "compress.0",
    "compress.2",
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


RankPattern = Annotated[dict[str, int], Expects("{layer: positive integer}", mapping(integer(1)))]
AlphaPattern = Annotated[
    dict[str, float], Expects("{layer: positive number}", mapping(real_number(above=0.0)))
]


class FinetuneConfig(Section):
    """Settings of the method; which keys may be given depends on ``finetune.method``.

    Files may use PEFT's names `r`, `lora_alpha`, `lora_dropout` too.
    """

    rank: PositiveInt = 32
    """Rank of the update of each adapted weight (`r` in PEFT)."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank (`lora_alpha` in PEFT). Default: the rank."""
    dropout: Fraction = 0.0
    """Dropout in front of the update while training (`lora_dropout` in PEFT)."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """LoRA+ (arXiv:2402.12354): ratio of the learning rates of the factors B and A."""
    target_modules: TextList = DEFAULT_TARGET_MODULES
    """Linear layers to adapt: names, name endings or regular expressions, or `all-linear`."""
    modules_to_save: TextList | None = None
    """Modules trained in full in addition to LoRA or prompts. Null: head and last layers of the
    trained targets; an empty list: none."""
    use_rslora: Flag = False
    """Scale the update by alpha / sqrt(rank) (rsLoRA), so that a larger rank needs no other
    learning rate."""
    use_dora: Flag = False
    """Train the lengths of the weights' rows separately from their directions (DoRA). `method:
    dora` means the same."""
    rank_pattern: RankPattern = {}
    """Other ranks for some layers, by the ending of their name or a regular expression, e.g.
    {mlp.w_in: 16}."""
    alpha_pattern: AlphaPattern = {}
    """Other alphas for some layers; keys as in `rank_pattern`."""
    quant_bits: Annotated[Literal[4, 8], OneOf()] | None = None
    """Store the frozen weights in 4 (NF4) or 8 bits to save memory (QLoRA); the adapters stay
    floats. Not exact at the first step, and slower. `method: qlora` means 4. Null: no
    quantisation."""
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
        name, source = element(new), element(old)
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
    """Start of the training and the weights that train."""

    method: Annotated[FinetuneMethod, OneOf()] = "full"
    """`lora`: low-rank updates and the heads; `prompt`: learned tokens in the attention, and the
    heads; `heads`: only the heads; `full`: all weights. Default: `lora` with `-c` and `full` with
    `read_from`. `dora` and `qlora` are short for `lora` with `use_dora` and with `quant_bits:
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
    """The forgetting report: a section, `off`, or the path of a labelled file."""
    replay: ReplayOptions | None = None
    """Train on structures labelled by the foundation, in addition to your data."""
    pretrain: PretrainOptions | None = None
    """Pre-train the model of `read_from` first, on frames like the training structures labelled at
    a cheap level. Done once for the same settings, structures and weights, and kept in the cache.
    Null: no."""
    anchor: AnchorOptions | None = None
    """Keep the weights near the foundation's: a section, or a type."""

    new_elements: NewElements | None = None
    """Start of elements that the starting model lacks: `nearest` uses the embeddings of the nearest
    known element in the periodic table, `random` random ones, and a mapping such as {Br: Cl, Na:
    Li} those named. Null refuses such data."""
    ensemble: PositiveInt | None = None
    """Train a committee of this many LoRA adapters, at least 2, in one run. Each has its own seed
    for the adapter and for the order and rotations of the data. Their spread is an uncertainty,
    calibrated on the validation set. Null: one model."""
    bootstrap: Flag = True
    """With `ensemble`: train each member on a bootstrap sample of the training set (drawn with
    replacement, of the same size). False: train all members on all structures."""
    member: NonNegativeInt | None = None
    """With `ensemble`: train only this member, counted from 0, as a run of its own (in a job array,
    for example). Null: all of them, one after the other."""

    llpr: LastLayerOptions | None = None
    """Give the trained model a last-layer uncertainty (metatrain's LLPR): `true`, or a section. It
    is made from the training set and calibrated on the validation set. Null: none; that of the
    starting model is not valid for other weights."""

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
