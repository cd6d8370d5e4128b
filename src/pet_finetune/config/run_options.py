"""The whole options file as one object, with ``architecture.model``."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pet_finetune.keys import TargetSpec

from .base import (
    Expects,
    Flag,
    Ignored,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Section,
    ignored_field,
    mapping,
    only,
    to_plain,
    without_nulls,
)
from .dataset import DatasetOptions, IndexedSet, SetOptions, expand_datasets, expand_set
from .finetune import METHOD_KEYS, FinetuneOptions
from .training import TrainingOptions


class LongRangeOptions(Section):
    """A Coulomb sum over all atoms, of learned charges, as features (extra `long-range`)."""

    enable: Flag = False
    """Add long-range features to the centre tokens. Structures must be periodic in all directions
    or in none."""
    use_ewald: Flag = False
    """No effect, as in metatrain: periodic structures take Ewald's sum in training and P3M
    otherwise."""
    smearing: PositiveFloat = 1.4
    """Width of the Gaussians that split the sum in two, Å."""
    kspace_resolution: PositiveFloat = 1.33
    """Resolution of the reciprocal-space grid, Å."""
    interpolation_nodes: PositiveInt = Field(default=5, le=5)
    """Grid points of P3M's interpolation, 1 to 5."""


class ModelOptions(Section):
    """Size and shape of a PET network trained from scratch.

    When training starts from a checkpoint, the checkpoint's own values are used.
    """

    cutoff: PositiveFloat = 4.5
    """Radius within which atoms see each other, Å."""
    num_neighbors_adaptive: PositiveFloat | None = None
    """Aim at this many neighbours: each atom gets its own, shorter cutoff. Null uses every
    neighbour within `cutoff`."""
    adaptive_cutoff_method: Annotated[Literal["grid", "solver"], OneOf()] = "solver"
    """How the adaptive cutoff is found: root finding (`solver`) or an average over probe distances
    (`grid`, used by older models)."""
    cutoff_function: Annotated[Literal["Cosine", "Bump"], OneOf()] = "Bump"
    """Shape of the smooth step to zero at the cutoff."""
    cutoff_width: PositiveFloat = 0.5
    """Width of that step, Å."""
    cutoff_width_adaptive: PositiveFloat = 1.0
    """Width of the step used when counting neighbours adaptively, Å."""
    d_pet: PositiveInt = 128
    """Width of an edge token; divisible by `num_heads`."""
    d_head: PositiveInt = 128
    """Width of the hidden layers of the heads."""
    d_node: PositiveInt = 256
    """Width of a centre-atom token."""
    d_feedforward: PositiveInt = 256
    """Width of the hidden layer in a transformer block's MLP."""
    num_heads: PositiveInt = 8
    """Attention heads of each attention layer."""
    num_attention_layers: PositiveInt = 2
    """Transformer blocks in each message-passing layer."""
    num_gnn_layers: PositiveInt = 2
    """Message-passing layers."""
    normalization: Annotated[Literal["RMSNorm", "LayerNorm"], OneOf()] = "RMSNorm"
    """Normalisation inside the transformer blocks."""
    activation: Annotated[Literal["SiLU", "SwiGLU"], OneOf()] = "SwiGLU"
    """Activation of the transformer's MLP."""
    attention_temperature: PositiveFloat = 1.0
    """Divides the attention scores; below 1 sharpens them."""
    transformer_type: Annotated[Literal["PreLN", "PostLN"], OneOf()] = "PreLN"
    """Normalise before (`PreLN`) or after (`PostLN`) attention and MLP."""
    featurizer_type: Annotated[Literal["residual", "feedforward"], OneOf()] = "feedforward"
    """One read-out after the last layer (`feedforward`) or one for each layer (`residual`, the
    scheme of the first PET)."""
    zbl: Flag = False
    """Add the ZBL repulsion between nuclei at short distance."""
    long_range: LongRangeOptions = LongRangeOptions()
    """Features beyond the cutoff, through torch-pme."""
    system_conditioning: Flag = False
    """Let the total charge and spin multiplicity enter the network."""
    max_charge: NonNegativeInt = 10
    """Largest absolute total charge the conditioning knows."""
    max_spin_multiplicity: PositiveInt = 10
    """Largest spin multiplicity (2S + 1) the conditioning knows."""
    num_prompts: NonNegativeInt = 0
    """Learned tokens of each attention layer that every neighbourhood attends to. Prompt tuning
    adds them to a trained model; 0, as in metatrain, has none."""


_DEVICE = re.compile(r"auto|cpu|gpu|mps|cuda(:\d+)?|[1-9]\d*")

#: The learning rate used when none is given, by how training starts, with SOAP
#: (docs/recipes.md).
DEFAULT_LEARNING_RATES = {
    "scratch": 1e-3,
    "full": 5e-4,
    "lora": 2e-3,
    "prompt": 1e-3,
    "heads": 1e-3,
}
#: The same with other optimisers, where they differ, from a sweep with AdamW
#: (docs/methods-table.md): at 5e-4 full fine-tuning is unstable on crystals and water.
ADAMW_LEARNING_RATES = {"scratch": 5e-4, "full": 2e-4}


def _device(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not _DEVICE.fullmatch(value.casefold()):
        raise ValueError
    return value.casefold()


def _precision(value: Any) -> int:
    if value == 16 and not isinstance(value, bool):
        raise ValueError(
            "Forces are derivatives of a sum of large energies and lose their digits in 16 bits."
        )
    if isinstance(value, bool) or value not in (32, 64):
        raise ValueError
    return int(value)


def _atomic_types(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError
    if any(isinstance(z, bool) or not isinstance(z, int) or not 1 <= z <= 118 for z in value):
        raise ValueError
    return tuple(sorted(set(value)))


class ArchitectureOptions(Section):
    """The network and its training."""

    name: Annotated[
        Literal["pet"],
        Expects("'pet'", only("pet", "This package trains the PET architecture only.")),
    ] = "pet"
    """The architecture; always `pet`."""
    model: ModelOptions = ModelOptions()
    """Size and shape of a network trained from scratch."""
    training: TrainingOptions = TrainingOptions()
    """The training run."""
    atomic_types: Annotated[
        tuple[int, ...] | None, Expects("a list of atomic numbers, 1 to 118", _atomic_types)
    ] = None
    """Atomic numbers of the model's elements. Null: those in the training data and in the starting
    model."""

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        return without_nulls(cls, value)


class Options(Section):
    """All options of a run, as in ``options.yaml``."""

    seed: NonNegativeInt | None = None
    """Seed of all random numbers. Null draws one and writes it to the log."""
    device: Annotated[
        str,
        Expects(
            "auto, cpu, cuda, cuda:0, mps, gpu or a number of processes",
            _device,
        ),
    ] = "auto"
    """Device to compute on. `auto` and `gpu` choose an available one. A number trains with as many
    processes, each on a GPU of its own, or all on the CPU if there is no GPU."""
    base_precision: Annotated[Literal[32, 64], Expects("32 or 64", _precision)] = 32
    """Bits of a floating-point number."""
    architecture: ArchitectureOptions = ArchitectureOptions()
    """The network and its training."""
    training_set: tuple[DatasetOptions, ...]
    """Training data: a path, a section, or a list of sections."""
    validation_set: SetOptions = 0.1
    """Data to choose the best model: a fraction of the training data, `indices` into the training
    file, or data sets of its own. metatrain has no default."""
    test_set: SetOptions = 0.0
    """Data to evaluate the final model; given like `validation_set`."""
    final_eval: Flag = True
    """Evaluate the final model on all three sets after training."""
    print_stats: Ignored = ignored_field("what the data hold is always checked and logged.")
    wandb: (
        Annotated[dict[str, Any], Expects("settings of wandb.init", mapping(lambda item: item))]
        | None
    ) = None
    """Log to Weights & Biases too, with these arguments of `wandb.init`: `project`, `name`, `mode:
    offline`, ... Needs the extra `wandb`. As in metatrain."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        full = without_nulls(cls, value)
        if "training_set" in full:
            full["training_set"] = expand_datasets(full["training_set"])
        for name in ("validation_set", "test_set"):
            if name in full:
                full[name] = expand_set(full[name])
        return full

    @property
    def model(self) -> ModelOptions:
        """Short for ``architecture.model``."""
        return self.architecture.model

    @property
    def training(self) -> TrainingOptions:
        """Short for ``architecture.training``."""
        return self.architecture.training

    @property
    def finetune(self) -> FinetuneOptions:
        """Short for ``architecture.training.finetune``."""
        return self.architecture.training.finetune

    def with_training(self, **changes: Any) -> Options:
        """A copy with other values in ``architecture.training``; they are not checked again."""
        training = self.training.model_copy(update=changes)
        architecture = self.architecture.model_copy(update={"training": training})
        return self.model_copy(update={"architecture": architecture})

    def with_finetune(self, **changes: Any) -> Options:
        """Copy with other values of ``architecture.training.finetune``."""
        return self.with_training(finetune=self.finetune.model_copy(update=changes))

    @property
    def is_finetuning(self) -> bool:
        """Whether training starts from existing weights rather than from scratch."""
        return self.finetune.read_from is not None or self.finetune.legacy_start is not None

    @property
    def is_committee(self) -> bool:
        """Whether the run gives several adapters of one base: an ensemble, not one member of it."""
        return self.finetune.ensemble is not None and self.finetune.member is None

    @property
    def num_processes(self) -> int:
        """Number of processes in ``device``; 1 if it names a device."""
        return int(self.device) if self.device.isdigit() else 1

    def learning_rate(self) -> float:
        """The learning rate given, or the one that suits how training starts."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        how = self.finetune.method if self.is_finetuning else "scratch"
        rates = DEFAULT_LEARNING_RATES
        if self.training.optimizer != "soap":
            rates = DEFAULT_LEARNING_RATES | ADAMW_LEARNING_RATES
        return rates[how]

    def baseline_mode(self) -> Literal["refit", "fit", "keep", "values"]:
        """Mode of the baseline, with ``auto`` resolved."""
        mode = self.training.baseline.mode
        if mode == "auto":
            return "refit" if self.is_finetuning else "fit"
        return mode

    def datasets(self) -> tuple[DatasetOptions, ...]:
        """All data sets named anywhere: training, then validation, then test."""
        sets: tuple[DatasetOptions, ...] = self.training_set
        for chosen in (self.validation_set, self.test_set):
            if not isinstance(chosen, (float, IndexedSet)):
                sets += chosen
        return sets

    def target_specs(self) -> dict[str, TargetSpec]:
        """The targets to learn, by name, in the order of the training sets."""
        whole = self.training.per_structure_targets
        specs: dict[str, TargetSpec] = {}
        for dataset in self.training_set:
            for name, target in dataset.targets.items():
                intensive = name in whole and not target.is_energy
                specs.setdefault(name, replace(target.spec(name), intensive=intensive))
        return specs

    def resolved(self) -> dict[str, Any]:
        """All options with their defaults, as plain values that YAML can hold.

        Reading the result back gives the same run; the learning rate is written out, and
        metatrain's options that have no effect here are left out.
        """
        tree: dict[str, Any] = to_plain(self)
        training = tree["architecture"]["training"]
        training["learning_rate"] = self.learning_rate()
        config = training["finetune"]["config"]
        training["finetune"]["config"] = {
            key: config[key] for key in config if key in METHOD_KEYS[self.finetune.method]
        }
        return tree
