"""Options of a training run: ``architecture.training``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

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
    Share,
    TextList,
    ignored_field,
    mapping,
    real_number,
)
from .finetune import FinetuneOptions
from .target import LossOptions, LossTerm, TargetLoss

#: Bounds on what is chosen where ``num_epochs`` and ``batch_size`` are null.
FEWEST_EPOCHS, LARGEST_BATCH = 50, 16
#: Leaves products such as 0.28 * 25 = 7.000000000000001 what they are meant to be.
_TINY = 1e-9

MixedPrecision = Annotated[Literal["bf16-mixed"], OneOf()]


def first_epoch(start: float, num_epochs: int) -> int:
    """The first epoch, from 0, wholly within the part of a run from a fraction of it on."""
    return math.ceil(start * num_epochs - _TINY)


class WeightMean(Section):
    """Stochastic weight averaging (SWA, arXiv:1803.05407): the mean of many steps' weights."""

    start: OpenFraction = 0.75
    """Part of the run after which averaging begins, with a whole epoch."""
    learning_rate: PositiveFloat | None = None
    """Constant learning rate from there on. Null: the scheduler's."""


class LossStage(Section):
    """Factors on the weights of the loss from some part of the run on."""

    start: Fraction
    """Part of the run after which the factors apply, from a whole epoch on."""
    energy: NonNegativeFloat = 1.0
    """Factor on the weight of energies."""
    forces: NonNegativeFloat = 1.0
    """Factor on the weight of forces."""
    stress: NonNegativeFloat = 1.0
    """Factor on the weight of stresses."""


def _as_list(value: Any) -> Any:
    """Accept one stage without a list around it, and an empty value."""
    return [value] if isinstance(value, Mapping) else () if value is None else value


LossSchedule = Annotated[tuple[LossStage, ...], BeforeValidator(_as_list)]


class RotationalConsistency(Section):
    """A loss of what predictions change by when the structure is rotated."""

    short_forms, short_for = ("number",), "weight"

    weight: PositiveFloat = 1.0
    """Weight of a rotated structure relative to a labelled one, with the types and weights of
    `loss`; more than 2 can spoil the training."""
    fraction: Share = 0.5
    """Part of each batch that is rotated and predicted again; a step takes at least as much
    longer."""


class LabelNoise(Section):
    """Gaussian noise on the training labels, drawn anew in each epoch."""

    energy: NonNegativeFloat = 0.0
    """Standard deviation on the energy, eV/atom."""
    forces: NonNegativeFloat = 0.0
    """Standard deviation on each force component, eV/Å."""


#: Weight of the energy per atom beside forces where the options give no weights. There are 3 N
#: forces for one energy, and their errors are tens of times larger: with equal weights the energy
#: hardly counts.
ENERGY_WEIGHT = 10.0

BestModelMetric = Literal["mae_prod", "rmse_prod", "loss", "energy_mae", "forces_mae"]

BaselineMode = Literal["auto", "refit", "fit", "keep", "values"]


def _baseline(value: Any) -> float | dict[int, float]:
    if not isinstance(value, Mapping):
        return real_number()(value)
    for number, energy in value.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 118:
            raise ValueError(f"{number!r} is not an atomic number.")
        if isinstance(energy, bool) or not isinstance(energy, (int, float)):
            raise ValueError(f"The value of element {number} is {energy!r}.")
    return {number: float(energy) for number, energy in value.items()}


def _scale(value: Any) -> float:
    if isinstance(value, Mapping):
        raise ValueError("One scale a target is supported, not one a species.")
    return real_number(above=0.0)(value)


def _of_targets(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The check of numbers by target; also the path of a checkpoint that has them."""

    def convert(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value):
            return value or {}
        return mapping(check)(value)

    return convert


FixedBaselines = Annotated[
    str | dict[str, float | dict[int, float]],
    Expects(
        "{target: number} or {target: {atomic number: number}}, or the path of a checkpoint",
        _of_targets(_baseline),
    ),
]
FixedScales = Annotated[
    str | dict[str, float],
    Expects("{target: positive number}, or the path of a checkpoint", _of_targets(_scale)),
]


_LOGS = ("csv", "tensorboard", "wandb", "trackio")
_LOGS_WORDS = "csv, tensorboard, wandb, trackio, or a list of them"


def _logs(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or any(name not in _LOGS for name in names):
        raise ValueError
    return tuple(dict.fromkeys(names))


class BaselineOptions(Section):
    """Baseline: the energy of each species, which the network need not learn."""

    mode: Annotated[BaselineMode, OneOf()] = "auto"
    """`refit`: least squares on the residuals of the starting model; `fit`: least squares on the
    labels; `keep`: those of the starting model; `values`: only the given `atomic_baseline`. `auto`:
    `refit` when starting from a model, else `fit`. With `refit` and `fit` the finished model's
    baselines are fitted to its residuals again if all training structures are periodic and
    `atomic_baseline` is not given."""
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
    """Options of the training run. Defaults that differ from metatrain's are marked."""

    batch_size: PositiveInt | None = None
    """Structures in a batch. Null chooses: 5 for 10 to 100 training structures, a twentieth of them
    up to 16, fewer if they are large. metatrain's default is 16. Several processes share each
    batch; in metatrain each has its own."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of batches whose mean gradient makes one update; the last update of an epoch takes the
    remaining ones."""
    max_atoms_per_batch: AtomsOrAuto | None = None
    """Fill batches up to this many atoms instead of counting structures. `auto` finds the largest
    number that fits into the memory once, at the start (half of the free memory on a CPU), and
    keeps at least ten steps per epoch."""
    min_atoms_per_batch: NonNegativeInt = 0
    """Drop batches with fewer atoms; only with `max_atoms_per_batch`."""
    num_epochs: PositiveInt | None = None
    """Passes over the training data. Null chooses about 3,000 updates, in at least 50 and at most
    300 epochs. metatrain's default is 1000."""
    learning_rate: PositiveFloat | None = None
    """Highest learning rate. Null chooses: 2e-3 for `lora`, 1e-3 for `heads` and `prompt`, 5e-4 for
    `full` fine-tuning, 1e-3 from scratch; with other optimisers than SOAP 2e-4 for `full` and 5e-4
    from scratch. metatrain's default is 1e-4 for all."""
    scheduler: Annotated[Literal["cosine", "constant"], OneOf()] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    warmup_fraction: Fraction = 0.01
    """Part of all steps during which the learning rate rises from zero."""
    optimizer: Annotated[Literal["adamw", "muon", "soap"], OneOf()] = "soap"
    """`soap` is Adam in the eigenbases of each matrix's gradients: lower errors in as many epochs,
    with longer steps. `adamw` is closest to metatrain's. `muon` equalises the singular values of
    each weight matrix's update and leaves embeddings, adapters, norms and biases to AdamW; use it
    from scratch or for `full`. It needs torch 2.9."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of matrices. Null is zero."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm. Null: no clipping."""
    ema: OpenFraction | None = 0.99
    """Decay of an exponential moving average of the weights, which is then validated and saved.
    Null is off; `swa` turns it off too."""
    swa: WeightMean | None = None
    """Mean of the weights after each step of the last part of the run, which is then validated and
    saved. Null is off."""
    early_stopping: EarlyStopping | None = None
    """Stop when the metric no longer improves. Null is off."""
    loss: LossOptions = "mse"
    """One of mse, mae, huber, with weight 10 for the energy per atom and 1 for forces and stress;
    or a section for each target, in which omitted weights are 1."""
    loss_schedule: LossSchedule = ()
    """Stages of the run with other weights in the loss, such as a larger one of the energy at the
    end. The metric `loss` uses the weights of the last stage throughout."""
    label_noise: LabelNoise = LabelNoise()
    """Gaussian noise on the training labels."""
    track_energy_offset: Fraction = 0.8
    """Share of the running mean of all energies' errors that the loss does not see: it follows
    differences of energies instead of their common offset. 0 is off."""
    per_structure_targets: TextList = ()
    """Targets of structures that are not divided by the number of atoms in the loss, logs and
    tables: name intensive properties here, such as a band gap. Energies are always shown per
    atom."""
    best_model_metric: Annotated[BestModelMetric, OneOf()] = "mae_prod"
    """Validation metric that chooses the best model: a product over energy, forces and stress
    (`mae_prod`, `rmse_prod`), the loss, or one mean absolute error."""
    best_model_window: PositiveInt | None = None
    """The metric is averaged over this many epochs, and the model of the last one is kept, so that
    noise of few validation structures does not choose it. Null: a tenth of the run, at most 5."""
    rotational_augmentation: Flag = True
    """Rotate and mirror each structure at random in each epoch."""
    rotational_consistency: RotationalConsistency | None = None
    """Predict a part of each batch in two orientations and add the difference to the loss. Null is
    off; a number is the `weight`."""
    baseline: BaselineOptions = BaselineOptions()
    """How the baseline energy of each element is determined."""
    atomic_baseline: FixedBaselines = {}
    """Given energies of the elements, eV, by target: one number, or one for each atomic number;
    omitted elements are fitted. Or a checkpoint that has them: a model, or metatrain's
    `composition`."""
    scale_targets: Flag = True
    """Let the network learn targets divided by their spread."""
    fixed_scaling_weights: FixedScales = {}
    """Given scale by target, in the target's unit, instead of the spread. Or a checkpoint that has
    them: a model, or metatrain's `scaler`."""
    gradient_checkpointing: Flag = False
    """Recompute the network in the backward pass instead of storing it: less memory, more time, the
    same gradients."""
    precision: MixedPrecision | None = None
    """`bf16-mixed`: matrix products of training in bfloat16, for GPUs; weights, validation and the
    saved model stay float32. Null is `base_precision` throughout."""
    compile: Annotated[Compile, OneOf()] = "auto"
    """`on`: compile each training step into one graph with torch's compiler, once for a model on a
    machine, in a minute or two; `off`: never; `auto`: on a GPU, if the run is long enough."""
    log_interval: PositiveInt = 1
    """Epochs between two log lines."""
    log: Annotated[tuple[str, ...], Expects(_LOGS_WORDS, _logs)] = ("csv",)
    """Loggers of each epoch: `csv` (always), `tensorboard`, `wandb` (with the settings in `wandb`),
    `trackio`. The last three need the extra of their name."""
    checkpoint_interval: PositiveInt = 10
    """Epochs between two saves of `last.ckpt`; it is saved at the start, after the first epoch and
    after ten minutes, too. metatrain's default is 100."""
    finetune: FinetuneOptions = FinetuneOptions()
    """Where training starts and which weights it changes."""
    distributed: Flag | None = None
    """Whether processes started by torchrun or SLURM's srun train one model together. Null: if
    there are several. `device` with a number starts them itself."""
    distributed_port: PositiveInt = 39591
    """Port on the first host at which processes of srun meet."""
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
    def epochs(self) -> int:
        """``num_epochs``; the fewest that null may become until the data are read."""
        return self.num_epochs or FEWEST_EPOCHS

    @property
    def batch(self) -> int:
        """``batch_size``; the largest that null may become until the data are read."""
        return self.batch_size or LARGEST_BATCH

    @property
    def baselines_follow(self) -> bool:
        """Whether baselines may follow the model that is trained: they are not given or kept."""
        return self.baseline.mode not in ("keep", "values") and not self.atomic_baseline

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
