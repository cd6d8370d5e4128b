"""The sets of a run as loaders, what is asked of their targets, and errors on all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from pet_finetune.committee.committee import Committee
from pet_finetune.config import Options
from pet_finetune.data.loader import Loader
from pet_finetune.data.on_disk import label_names
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure import Structure
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model import Potential

from .feature import Feature
from .loss import Objective
from .metrics import Errors, evaluate
from .predictions import PredictionRecorder
from .run_files import RunFiles

__all__ = [
    "AFTER", "BEFORE", "RunData", "evaluate_sets", "load_data", "objectives_of", "primary_set",
    "wanted_derivatives",
]  # fmt: skip

_logger = get_logger(__name__)
#: How results and predictions call the starting model and the finished one.
BEFORE, AFTER = "before", "after"
_LARGEST_BATCH = 64  # structures, for validation and evaluation
#: Structures of a large training set on which errors before and after training are taken: they are
#: known to a few percent by then, and the rest would only delay the first step.
_ENOUGH = 2000


@dataclass(frozen=True)
class RunData:
    """Loaders of the three sets; validation falls back to the training set where it is empty."""

    splits: Splits
    train: Loader
    validation: Loader
    sets: dict[str, Loader]

    def fill(self, atoms: int) -> None:
        """Fill the batches of all sets up to so many atoms."""
        for loader in (self.train, self.validation, *self.sets.values()):
            loader.max_atoms_per_batch = atoms


def load_data(
    options: Options, splits: Splits, model: Potential | Committee, seed: int, dtype: torch.dtype
) -> RunData:
    """Loaders of the sets, as the options cut batches; ``seed`` is of order and rotations."""
    training = options.training
    # With `auto` the number is found when the model stands; until then structures are counted.
    most = training.max_atoms_per_batch
    most = None if most == "auto" else most
    train_loader = Loader(
        splits.train,
        model.cutoff,
        batch_size=None if most else training.batch_size,
        max_atoms_per_batch=most,
        min_atoms_per_batch=training.min_atoms_per_batch,
        shuffle=True,
        augment=training.rotational_augmentation,
        seed=seed,
        dtype=dtype,
    )
    sets = {"train": train_loader.view()}
    for name, structures in (("validation", splits.validation), ("test", splits.test)):
        if structures:
            sets[name] = Loader(
                structures,
                model.cutoff,
                batch_size=None if most else _evaluation_batch(options),
                max_atoms_per_batch=most,
                dtype=dtype,
            )
    if "validation" not in sets:
        _logger.warning("no validation structures: the training set picks the best model")
    _logger.info(
        "structures: %s",
        ", ".join(f"{len(loader.structures)} {name}" for name, loader in sets.items()),
    )
    return RunData(splits, train_loader, sets.get("validation", sets["train"]), sets)


def _evaluation_batch(options: Options) -> int:
    return min(_LARGEST_BATCH, 2 * options.training.batch_size)


def wanted_derivatives(
    options: Options, training: Sequence[Structure]
) -> dict[str, tuple[bool, bool]]:
    """For each target, whether its forces and its stress are learned."""
    labels = label_names(training)
    wanted = {}
    for name in options.target_specs():
        loss = options.training.loss_for(name)
        wanted[name] = (
            forces_key(name) in labels and loss.forces_term().weight > 0,
            stress_key(name) in labels and loss.stress_term().weight > 0,
        )
    return wanted


def objectives_of(options: Options, model: Potential, data: RunData) -> dict[str, Objective]:
    """What is asked of each target of the options."""
    objectives = {}
    for name, (forces, stress) in wanted_derivatives(options, data.train.structures).items():
        objectives[name] = Objective(
            target=name,
            loss=options.training.loss_for(name),
            forces=forces,
            stress=stress,
            scale=float(model.scale.get(name)),
            per_atom=name not in options.training.per_structure_targets,
            energy=model.target(name).is_energy,
        )
    return objectives


def evaluate_sets(
    files: RunFiles,
    name: str,
    model: Potential | Committee,
    data: RunData,
    wanted: dict[str, tuple[bool, bool]],
    features: Sequence[Feature] = (),
) -> Errors:
    """Errors of a model on every set; what it says of the one that says most is kept.

    Those of a training set with more structures than say anything new are of a part of it.

    Args:
        files: of the run.
        name: what the model is called there, ``BEFORE`` or ``AFTER``.
        model: to be evaluated.
        data: the sets.
        wanted: for each target, whether forces and stress are compared.
        features: of the run; they add the errors on sets of their own.
    """
    shown = primary_set(data.sets)
    sets = {set_name: loader.sampled() for set_name, loader in data.sets.items()}
    if shown != "train":
        what = "errors on the training set" if name == BEFORE else ""
        sets["train"] = data.sets["train"].sampled(what, _ENOUGH)
    recorder = PredictionRecorder(sets[shown], shown)
    errors = {
        set_name: evaluate(model, loader, wanted, recorder.add if set_name == shown else None)
        for set_name, loader in sets.items()
    }
    files.keep_predictions(recorder, name, model)
    for feature in features:
        errors |= feature.errors(model)
    return errors


def primary_set(sets: Collection[str]) -> str:
    """The set that says most of a model: the one that it saw least of."""
    return next(name for name in ("test", "validation", "train") if name in sets)
