"""The sets of a run: loaders, errors on all of them, bootstrap samples, and labels that change.

Labels change where a model labels structures itself, where they move onto another baseline, and
where noise is added to them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pet_finetune.committee.committee import Committee
from pet_finetune.config.run_options import Options
from pet_finetune.config.training import FEWEST_EPOCHS, LARGEST_BATCH, TrainingOptions
from pet_finetune.data.labelled_batch import on_device
from pet_finetune.data.loader import Loader
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure import Structure
from pet_finetune.data.structure_sets import label_names, sizes_of_structures, taken
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import evaluating
from pet_finetune.rng import MemberStream, seed_everything

from .feature import Feature
from .metrics import Errors, PredictionRecorder, evaluate, split_predictions
from .objectives import Objective
from .run_files import RunFiles

_logger = get_logger(__name__)
#: How results and predictions call the starting model and the finished one.
BEFORE, AFTER = "before", "after"
_LARGEST_EVALUATED = 64  # structures in a batch of validation and evaluation
#: Updates after which more bring little to small sets (docs/recipes.md), and a bound on the epochs.
_UPDATES, _MOST_EPOCHS = 3000, 300
#: SOAP's gradients need a mean: ten frames of ethanol end at 45 meV/A with batches of one and 2,000
#: updates, at 34 with five and 400. Larger structures make smaller batches, for memory.
_SMALLEST_BATCH, _ATOMS_OF_BATCH = 5, 1500
#: Structures of a large training set on which errors before and after training are taken: they are
#: known to a few percent by then, and the rest would only delay the first step.
_ENOUGH = 1000


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


def default_batch_size(structures: int, atoms: int) -> int:
    """Batch size for a training set: small enough for many updates, large enough for a mean."""
    by_updates = max(1, structures // 20, min(_SMALLEST_BATCH, structures // 2))
    by_atoms = max(1, int(_ATOMS_OF_BATCH * structures / max(1, atoms)))
    return min(LARGEST_BATCH, by_updates, by_atoms)


def default_num_epochs(updates: float) -> int:
    """Number of epochs for a training set with so many updates in one."""
    return max(FEWEST_EPOCHS, min(_MOST_EPOCHS, math.ceil(_UPDATES / max(1.0, updates))))


def with_chosen_sizes(
    options: Options, structures: Sequence[Structure], most: int | None = None
) -> Options:
    """Options with numbers in place of null for ``batch_size`` and ``num_epochs``.

    With ``max_atoms_per_batch: auto`` the epochs follow once it is known; ``most`` is what was
    found for it.
    """
    training = options.training
    if training.batch_size is not None and training.num_epochs is not None:
        return options
    atoms = int(sizes_of_structures(structures).sum())
    batch = training.batch_size or default_batch_size(len(structures), atoms)
    limit = most or training.max_atoms_per_batch
    if limit == "auto":
        return options.with_training(batch_size=batch)
    batches = atoms / limit if limit else math.ceil(len(structures) / batch)
    epochs = training.num_epochs
    if epochs is None:
        epochs = default_num_epochs(batches / training.gradient_accumulation_steps)
    by = f"max_atoms_per_batch {limit}" if limit else f"batch_size {batch}"
    _logger.info("%s, num_epochs %d: chosen by the %d training structures where not given",
                 by, epochs, len(structures))  # fmt: skip
    return options.with_training(batch_size=batch, num_epochs=epochs)


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
        batch_size=None if most else training.batch,
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
                batch_size=None if most else min(_LARGEST_EVALUATED, 2 * training.batch),
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


def objective_of(
    options: TrainingOptions, model: Potential, target: str, labels: Collection[str] | None = None
) -> Objective:
    """Loss terms of a target.

    Args:
        options: ``architecture.training``.
        model: about to be trained.
        target: its name.
        labels: names of the labels there are; None for all that the loss has a weight for.
    """
    loss = options.loss_for(target)

    def learned(key: str, weight: float) -> bool:
        return weight > 0 and (labels is None or key in labels)

    return Objective(
        target=target,
        loss=loss,
        forces=learned(forces_key(target), loss.forces_term().weight),
        stress=learned(stress_key(target), loss.stress_term().weight),
        scale=float(model.scale.get(target)),
        per_atom=target not in options.per_structure_targets,
        energy=model.target(target).is_energy,
    )


def evaluate_sets(
    files: RunFiles,
    name: str,
    model: Potential | Committee,
    data: RunData,
    wanted: dict[str, tuple[bool, bool]],
    features: Sequence[Feature] = (),
) -> Errors:
    """Errors of a model on every set; predictions of the primary set are kept.

    Those of a training set with more structures than say anything new are of a part of it.
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


def of_member(options: Options, splits: Splits, seed: int) -> tuple[int, Splits]:
    """The seed of ``finetune.member``, set in all generators, and its sets; else those of the run.

    Both are functions of the ensemble's seed and the member's number alone. Validation and test
    sets are those of all members; with ``finetune.bootstrap`` the training set is a bootstrap
    sample: as many, drawn with replacement (Breiman, Mach. Learn. 24, 123 (1996)), in order.
    """
    member = options.finetune.member
    if member is None:
        return seed, splits
    own = int(np.random.SeedSequence([seed, member, MemberStream.SEED]).generate_state(1)[0] >> 1)
    seed_everything(own)
    if not options.finetune.bootstrap:
        return own, splits
    rng = np.random.default_rng([seed, member, MemberStream.BOOTSTRAP])
    drawn = np.sort(rng.integers(len(splits.train), size=len(splits.train)))
    return own, replace(splits, train=taken(splits.train, drawn))


_ATOMS_AT_ONCE = 512


def evaluation_loader(structures: Sequence[Structure], model: Potential) -> Loader:
    """A loader in batches of some hundred atoms, whatever the sizes of the structures."""
    most = max(_ATOMS_AT_ONCE, *(s.num_atoms for s in structures))
    return Loader(structures, model.cutoff, max_atoms_per_batch=most, dtype=model.dtype)


def label_with(
    model: Potential, structures: Sequence[Structure], targets: Collection[str]
) -> list[Structure]:
    """Structures with the model's own energies, forces and stresses in place of their labels.

    Args:
        model: as it stands; put into evaluation mode, and back.
        structures: at least one.
        targets: the energies to predict.

    Returns:
        The structures in the same order; stresses only where there is a volume.
    """
    loader = evaluation_loader(structures, model)
    wanted = dict.fromkeys(targets, (True, True))
    labels: list[dict[str, Tensor]] = []
    with evaluating(model):
        for batch in on_device(loader, model.device, model.dtype):
            said = split_predictions(batch.graph, model.predict_many(batch.graph, wanted))
            for own, volume in zip(said, batch.graph.volumes.tolist(), strict=True):
                flat = () if volume > 0 else {stress_key(target) for target in targets}
                labels.append(
                    {
                        name: torch.tensor(values, dtype=torch.float64)
                        for name, values in own.items()
                        if name not in flat
                    }
                )
    return [replace(s, labels=own) for s, own in zip(structures, labels, strict=True)]


def relabelled(
    structures: Sequence[Structure],
    source: str,
    shifts: Mapping[str, Tensor],
    species: Sequence[int],
) -> list[Structure]:
    """Labels of one energy as labels of others whose baselines differ from its own.

    Args:
        structures: labelled for ``source``.
        source: the energy that the labels are of.
        shifts: for each energy wanted, its baseline less that of ``source``, [n_species], eV.
        species: atomic numbers, in the order of the shifts.
    """
    wanted = torch.tensor(species)
    made = []
    for structure in structures:
        counts = (structure.numbers.unsqueeze(1) == wanted).sum(0).to(torch.float64)
        labels = {}
        for target, shift in shifts.items():
            for name, value in structure.labels.items():
                if name == source:
                    labels[target] = value + counts @ shift
                elif name in (forces_key(source), stress_key(source)):
                    labels[target + name.removeprefix(source)] = value
        made.append(replace(structure, labels=labels))
    return made
