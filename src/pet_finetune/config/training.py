"""Options of a training run: ``architecture.training``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import model_validator

from pet_finetune.keys import Compile

from .base import (
    AtomsOrAuto,
    Expects,
    Flag,
    Fraction,
    Ignored,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
    TextList,
    ignored_field,
)
from .finetune import FinetuneOptions
from .training_sections import (
    LabelNoise,
    LossOptions,
    LossSchedule,
    LossTerm,
    MixedPrecision,
    RotationalConsistency,
    TargetLoss,
    WeightMean,
)

#: Weight of the energy per atom beside forces where the options give no weights. There are 3 N
#: forces for one energy, and their errors are tens of times larger: with equal weights the energy
#: hardly counts.
ENERGY_WEIGHT = 10.0

BestModelMetric = Literal["mae_prod", "rmse_prod", "loss", "energy_mae", "forces_mae"]

BaselineMode = Literal["auto", "refit", "fit", "keep", "values"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _baselines(value: Any) -> str | dict[str, float | dict[int, float]]:
    if value is None:
        return {}
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping):
        raise ValueError
    checked: dict[str, float | dict[int, float]] = {}
    for target, baseline in value.items():
        if _is_number(baseline):
            checked[str(target)] = float(baseline)
            continue
        if not isinstance(baseline, Mapping):
            raise ValueError
        for number, energy in baseline.items():
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 118:
                raise ValueError(f"{number!r} is not an atomic number.")
            if not _is_number(energy):
                raise ValueError(f"The value of element {number} is {energy!r}.")
        checked[str(target)] = {number: float(energy) for number, energy in baseline.items()}
    return checked


def _scales(value: Any) -> str | dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping):
        raise ValueError
    for scale in value.values():
        if isinstance(scale, Mapping):
            raise ValueError("One scale a target is supported, not one a species.")
        if not _is_number(scale) or scale <= 0:
            raise ValueError
    return {str(target): float(scale) for target, scale in value.items()}


FixedBaselines = Annotated[
    str | dict[str, float | dict[int, float]],
    Expects(
        "{target: number} or {target: {atomic number: number}}, or the path of a checkpoint",
        _baselines,
    ),
]
FixedScales = Annotated[
    str | dict[str, float],
    Expects("{target: positive number}, or the path of a checkpoint", _scales),
]


_LOGS = ("csv", "tensorboard", "wandb", "trackio")
_LOGS_WORDS = "csv, tensorboard, wandb, trackio, or a list of them"


def _logs(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or any(name not in _LOGS for name in names):
        raise ValueError
    return tuple(dict.fromkeys(names))


class BaselineOptions(Section):
    """How the energy of each species, which the network need not learn, is found."""

    mode: Annotated[BaselineMode, OneOf()] = "auto"
    """`refit`: least squares on what the starting model leaves over; `fit`: least squares on the
    labels; `keep`: those of the starting model; `values`: only the given `atomic_baseline`. `auto`:
    `refit` when starting from a model, else `fit`."""
    ridge: NonNegativeFloat = 1e-5
    """Weight of the regularisation relative to the data; makes sets with a single composition
    solvable."""


class EarlyStopping(Section):
    """When to stop before the last epoch. In a file also just the patience."""

    short_forms, short_for = ("integer",), "patience"

    patience: PositiveInt = 20
    """Stop after this many epochs without improvement."""
    min_delta: Fraction = 0.0
    """Smallest relative decrease of the metric that counts as improvement: 0.01 is one per cent."""


class TrainingOptions(Section):
    """The training run. Defaults that differ from metatrain's say so."""

    batch_size: PositiveInt = 16
    """Structures in a batch. Several processes share each batch, so that their number changes
    nothing but the time; in metatrain each has a batch of its own."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose mean gradient makes one update; the last update of an epoch takes what is
    left."""
    max_atoms_per_batch: AtomsOrAuto | None = None
    """Fill batches up to this many atoms instead of counting structures. `auto` looks once, at the
    start, for the largest number that fits into the memory (half of what is free on a CPU) and
    leaves at least ten steps in an epoch."""
    min_atoms_per_batch: NonNegativeInt = 0
    """Drop batches with fewer atoms; with `max_atoms_per_batch` only."""
    num_epochs: PositiveInt = 100
    """Passes over the training data. metatrain's default is 1000."""
    learning_rate: PositiveFloat | None = None
    """Highest learning rate. Null chooses: 2e-3 for `lora`, 1e-3 for `heads` and `prompt`, 5e-4 for
    `full` fine-tuning, 1e-3 from scratch; with other optimisers than SOAP 2e-4 for `full` and 5e-4
    from scratch. metatrain's default is 1e-4 for all."""
    scheduler: Annotated[Literal["cosine", "constant"], OneOf()] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_fraction: Fraction = 0.01
    """Part of all steps during which the learning rate rises from zero."""
    optimizer: Annotated[Literal["adamw", "muon", "soap"], OneOf()] = "soap"
    """`soap` is Adam in the eigenbases of each matrix's gradients: lower errors in as many epochs
    for a longer step. `adamw` is nearest to metatrain's. `muon` evens out the directions of each
    weight matrix's update, and leaves embeddings, adapters, norms and biases to AdamW; for training
    from scratch or in full. It needs torch 2.9."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay, of matrices only. Null is zero."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm. Null leaves them."""
    ema: OpenFraction | None = 0.99
    """Decay of an exponential moving average of the weights, which is then validated and saved.
    Null is off, and so is it where `swa` is on."""
    swa: WeightMean | None = None
    """Mean of the weights after each step of the last part of the run, which is then validated and
    saved. Null is off."""
    early_stopping: EarlyStopping | None = None
    """Stop when the metric no longer improves. Null is off."""
    loss: LossOptions = "mse"
    """One of mse, mae, huber, and then the energy per atom weighs 10, forces and stress 1; or a
    section for each target, in which weights left out are 1."""
    loss_schedule: LossSchedule = ()
    """Stages of the run with other weights in the loss, for instance a larger one of the energy at
    the end. The metric `loss` has the weights of the last stage throughout."""
    label_noise: LabelNoise = LabelNoise()
    """Gaussian noise on the training labels."""
    per_structure_targets: TextList = ()
    """Targets whose values for structures count whole in the loss, not divided by the number of
    atoms: name intensive properties here, such as a band gap. So do their errors in logs and
    tables, except for energies, which are shown per atom always."""
    best_model_metric: Annotated[BestModelMetric, OneOf()] = "mae_prod"
    """Validation figure that picks the best model: a product over energy, forces and stress
    (`mae_prod`, `rmse_prod`), the loss, or one mean absolute error."""
    best_model_window: PositiveInt | None = None
    """The figure is averaged over this many epochs, the last of which is kept, so that few
    validation structures met by chance do not pick the model. Null: a tenth of the run, at most
    5."""
    rotational_augmentation: Flag = True
    """Turn and mirror each structure at random in each epoch."""
    rotational_consistency: RotationalConsistency | None = None
    """Part of each batch is predicted in two orientations, and what they differ by is a loss. Null
    is off; a number is the `weight`."""
    baseline: BaselineOptions = BaselineOptions()
    """How the energy of each species is found."""
    atomic_baseline: FixedBaselines = {}
    """Given energies of the species, eV, by target: one number, or one for each atomic number;
    species left out are fitted. Or a checkpoint that has them: of a model, or metatrain's
    `composition`."""
    scale_targets: Flag = True
    """Let the network learn targets divided by their spread."""
    fixed_scaling_weights: FixedScales = {}
    """Given scale by target, in the target's unit, instead of the spread. Or a checkpoint that has
    them: of a model, or metatrain's `scaler`."""
    gradient_checkpointing: Flag = False
    """Compute the GNN layers again instead of keeping what they computed: less memory, more time,
    the same gradients."""
    precision: MixedPrecision | None = None
    """`bf16-mixed`: matrix products of training in bfloat16, for GPUs; weights, validation and the
    saved model stay float32. Null is `base_precision` throughout."""
    compile: Annotated[Compile, OneOf()] = "auto"
    """`on`: each training step is one graph that torch's compiler made, once for a model on a
    machine, in a minute or two; `off`: never; `auto`: on a GPU where the run is long enough for it
    to pay."""
    log_interval: PositiveInt = 1
    """Epochs between two log lines."""
    log: Annotated[tuple[str, ...], Expects(_LOGS_WORDS, _logs)] = ("csv",)
    """Where the numbers of each epoch go: `csv` (always), `tensorboard`, `wandb` (with the settings
    in `wandb`), `trackio`. The others need the extra of their name."""
    checkpoint_interval: PositiveInt = 10
    """Epochs between two saves of `last.ckpt`. metatrain's default is 100."""
    finetune: FinetuneOptions = FinetuneOptions()
    """Where training starts and which weights it changes."""
    distributed: Flag | None = None
    """Whether the processes that torchrun or SLURM's srun started train one model together. Null:
    if there are several. `device` with a number starts them itself."""
    distributed_port: PositiveInt = 39591
    """Where processes that srun started meet, on the first host."""
    num_workers: Ignored = ignored_field("the data are prepared once and kept in memory.")
    log_mae: Ignored = ignored_field("mean absolute and root mean square errors are both logged.")
    log_separate_blocks: Ignored = ignored_field("errors are logged for each target.")

    @model_validator(mode="before")
    @classmethod
    def _one_average(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("swa") is not None and "ema" not in value:
            return {**value, "ema": None}
        return value

    @property
    def stated_baselines(self) -> Mapping[str, float | dict[int, float]]:
        """The numbers of ``atomic_baseline``; none where it names a file."""
        return {} if isinstance(self.atomic_baseline, str) else self.atomic_baseline

    @property
    def stated_scales(self) -> Mapping[str, float]:
        """The numbers of ``fixed_scaling_weights``; none where it names a file."""
        given = self.fixed_scaling_weights
        return {} if isinstance(given, str) else given

    def loss_for(self, target: str) -> TargetLoss:
        """The loss of ``target``, with the short ways of writing it spelled out.

        A single type for everything applies to forces and stress too, and the energy per atom
        weighs :data:`ENERGY_WEIGHT`. A section for a target has metatrain's meaning: weights of
        1, and forces and stress with the mean squared error, unless it says otherwise.
        """
        if isinstance(self.loss, str):
            term = LossTerm(type=self.loss)
            return TargetLoss(type=self.loss, weight=ENERGY_WEIGHT, forces=term, stress=term)
        return self.loss.get(target, TargetLoss())
