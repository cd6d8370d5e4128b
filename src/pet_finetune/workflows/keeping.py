"""Keeping what the foundation knew: what is read, made before the first step, and used in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pet_finetune.config import DatasetOptions, Options
from pet_finetune.data.beside import Beside, number_beside
from pet_finetune.data.charges import check_charges
from pet_finetune.data.files import read_frames
from pet_finetune.data.loader import Loader
from pet_finetune.data.perturb import distorted
from pet_finetune.data.probe import PROBE, probe_structures
from pet_finetune.data.readers import read_structures
from pet_finetune.data.species import check_species, find_species
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.errors import DataError
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.train.anchor import AnchorLoss, reference_weights
from pet_finetune.train.dimers import dimer_curves
from pet_finetune.train.extra import ExtraLoss
from pet_finetune.train.fisher import fisher_information
from pet_finetune.train.kept import Kept, KeptAnchor, KeptDimers, KeptReplay, KeptRetention
from pet_finetune.train.labels import label_with, relabelled
from pet_finetune.train.loss import Objective
from pet_finetune.train.replay import ReplayLoss
from pet_finetune.train.retention import Retention

from .foundation import Foundation, Rehearsal, choose_rehearsal, compared_targets, foundation_of
from .start import Start

_logger = get_logger(__name__)
_TRAINING = "training"
_SAMPLE_STREAM, _TURN_STREAM = 9, 10


@dataclass(frozen=True)
class Memory:
    """What a new run has to remember, read and checked before its model is changed.

    Attributes:
        foundation: what it starts from.
        rehearsal: the head of what is replayed, if anything is.
        retention, replayed, weighed: the structures of the report, of replay, and of EWC.
        compared: the energies of the report.
        labelled_for: the foundation's energy that a retention file is labelled for, or empty.
    """

    foundation: Foundation
    rehearsal: Rehearsal | None
    retention: tuple[Structure, ...]
    replayed: tuple[Structure, ...]
    weighed: tuple[Structure, ...]
    compared: tuple[str, ...]
    labelled_for: str

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads of the foundation that have to stay in the model."""
        return () if self.rehearsal is None else (self.rehearsal.target,)


def remember(
    options: Options, start: Start, training: Sequence[Structure], seed: int
) -> Memory | None:
    """Read what replay, anchor and report need; None where training starts from scratch.

    Raises:
        ConfigError: targets that do not fit.
        DataError: files that are missing or lack labels.
        SpeciesError: elements that the model does not know.
    """
    if start.fingerprint is None:
        return None
    finetune = options.finetune
    foundation = foundation_of(start, options)
    rehearsal = choose_rehearsal(options, foundation)
    heads = () if rehearsal is None else (rehearsal.target,)
    model = start.model
    compared: tuple[str, ...] = ()
    labelled_for, retention = "", []
    if finetune.retention.wanted:
        compared, labelled_for = compared_targets(options, foundation, heads)
        retention = _retention_set(finetune.retention.read_from, model, foundation, compared)
    replayed: list[Structure] = []
    if finetune.replay is not None and finetune.replay.read_from is not None:
        replayed = _labelled(finetune.replay.read_from, model)
    elif finetune.replay is not None:
        replay = finetune.replay
        replayed = _unlabelled(replay.structures, model, foundation, training, "replay")
        if _TRAINING in replay.structures:
            replayed += distorted(training, replay.copies, replay.rattle, replay.strain, seed)
    weighed: list[Structure] = []
    anchor = finetune.anchor
    if anchor is not None and anchor.type == "ewc":
        weighed = _unlabelled(anchor.structures, model, foundation, training, "anchor")
        weighed = _sample(weighed, anchor.samples, seed)
    return Memory(
        foundation,
        rehearsal,
        tuple(retention),
        tuple(replayed),
        tuple(weighed),
        compared,
        labelled_for,
    )


def _labelled(data: DatasetOptions, model: Potential) -> list[Structure]:
    structures = read_structures(data)
    _check(structures, model)
    return structures


def _check(structures: Sequence[Structure], model: Potential) -> None:
    check_species(structures, model.species)
    if model.hypers.system_conditioning:
        check_charges(structures, model.hypers.max_charge, model.hypers.max_spin_multiplicity)


def _retention_set(
    data: DatasetOptions | None,
    model: Potential,
    foundation: Foundation,
    compared: tuple[str, ...],
) -> list[Structure]:
    """The structures of the report, or none, and then the log says why."""
    if data is not None:
        return _labelled(data, model)
    if not compared:
        _logger.info("no forgetting report: no head begins as one of the foundation's")
        return []
    structures = probe_structures(foundation.species)
    if not structures:
        _logger.info(
            "no forgetting report: no structure of the probe set has none but the model's "
            "elements; give labelled ones in finetune.retention.read_from"
        )
    return structures


def _unlabelled(
    names: Sequence[str],
    model: Potential,
    foundation: Foundation,
    training: Sequence[Structure],
    section: str,
) -> list[Structure]:
    """Structures from all places named; labels that files have are left behind."""
    structures: list[Structure] = []
    for name in names:
        if name == _TRAINING:
            structures += training
        elif name == PROBE:
            structures += probe_structures(foundation.species)
        else:
            found = [
                atoms_to_structure(atoms, i, source=name)
                for i, atoms in enumerate(read_frames(name))
            ]
            _check(found, model)
            structures += found
    if not structures:
        raise DataError(
            f"architecture.training.finetune.{section}.structures: no structure of the probe set "
            "has none but the model's elements. Name `training` or a file instead."
        )
    return structures


def _sample(structures: list[Structure], most: int, seed: int) -> list[Structure]:
    """At most so many of them, in their order."""
    if len(structures) <= most:
        return structures
    chosen = np.random.default_rng([seed, _SAMPLE_STREAM]).permutation(len(structures))[:most]
    return [structures[index] for index in sorted(chosen.tolist())]


def make_kept(
    options: Options,
    memory: Memory | None,
    model: Potential,
    training: Sequence[Structure],
    fresh: Sequence[str],
    seed: int,
) -> Kept:
    """Labels, reference weights and curves of the starting model, its baselines refitted.

    Args:
        options: of the run.
        memory: what was read; None from scratch, where there is nothing to keep.
        model: about to be trained, adapters in place.
        training: the training set.
        fresh: targets whose heads are random.
        seed: of the run.
    """
    if memory is None:
        return Kept()
    return Kept(
        retention=_keep_retention(options, memory, model),
        replay=_keep_replay(options, memory, model),
        anchor=_keep_anchor(options, memory, model, fresh, seed),
        dimers=_keep_dimers(options, memory, model, training),
    )


def _keep_retention(options: Options, memory: Memory, model: Potential) -> KeptRetention | None:
    if not memory.retention:
        return None
    every = options.finetune.retention.interval(options.training.num_epochs)
    if memory.labelled_for:
        shifts = {target: memory.foundation.shift(model, target) for target in memory.compared}
        structures = relabelled(memory.retention, memory.labelled_for, shifts, model.species)
        labels = f"their labels of '{memory.labelled_for}'"
    else:
        structures = label_with(model, memory.retention, memory.compared)
        labels = "the starting model's own predictions"
    _logger.info(
        "forgetting: %s of %d structures (%s) compared with %s every %d epochs",
        " and ".join(f"'{target}'" for target in memory.compared),
        len(structures),
        structures[0].source,
        labels,
        every,
    )
    return KeptRetention(tuple(structures), memory.compared, every)


def _keep_replay(options: Options, memory: Memory, model: Potential) -> KeptReplay | None:
    replay, rehearsal = options.finetune.replay, memory.rehearsal
    if replay is None or rehearsal is None:
        return None
    target = rehearsal.target
    if replay.read_from is not None:
        shifts = {target: memory.foundation.shift(model, target)}
        structures = relabelled(memory.replayed, rehearsal.source, shifts, model.species)
    else:
        structures = label_with(model, memory.replayed, [target])
    size = options.training.batch_size
    beside = f"{number_beside(size, replay.fraction)} beside each batch of {size}"
    if options.training.max_atoms_per_batch is not None:
        beside = f"{replay.fraction:g} of the structures of each step"
    _logger.info(
        "replay: %d structures %s for '%s'; %s, weight %g",
        len(structures),
        f"of {replay.read_from.systems.read_from}"
        if replay.read_from is not None
        else f"({', '.join(replay.structures)}) labelled by the starting model",
        target,
        beside,
        replay.weight,
    )
    return KeptReplay(tuple(structures), target, replay.fraction, replay.weight)


def _keep_anchor(
    options: Options, memory: Memory, model: Potential, fresh: Sequence[str], seed: int
) -> KeptAnchor | None:
    anchor = options.finetune.anchor
    if anchor is None:
        return None
    random = tuple(
        f"{group}.{target}." for target in fresh for group in model.network.head_modules(target)
    )
    reference = {
        name: value
        for name, value in reference_weights(model).items()
        if not (random and name.startswith(random))
    }
    importance = None
    if anchor.type == "ewc":
        target = next(iter(memory.foundation.sources), None) or next(iter(model.targets))
        objective = rehearsed_objective(options, model, target)
        importance = fisher_information(model, memory.weighed, objective, seed)
    _logger.info(
        "anchor: %s, strength %g%s",
        anchor.type,
        anchor.factor,
        f", Fisher information of {len(memory.weighed)} structures" if importance else "",
    )
    return KeptAnchor(reference, importance, anchor.factor)


def _keep_dimers(
    options: Options, memory: Memory, model: Potential, training: Sequence[Structure]
) -> KeptDimers | None:
    target = next(iter(memory.foundation.sources), None)
    if not options.final_eval or target is None:
        return None
    species = [z for z in find_species(training) if z in memory.foundation.species]
    return KeptDimers(target, dimer_curves(model, target, species))


def rehearsed_objective(options: Options, model: Potential, target: str) -> Objective:
    """What is asked of structures that the foundation knows: as of the user's own."""
    loss = options.training.loss_for(target)
    return Objective(
        target=target,
        loss=loss,
        forces=loss.forces_term().weight > 0,
        stress=loss.stress_term().weight > 0,
        scale=float(model.scale.get(target)),
        per_atom=target not in options.training.per_structure_targets,
    )


def extra_losses(
    options: Options, kept: Kept, model: Potential, training: Loader, seed: int
) -> list[ExtraLoss]:
    """The terms of replay and anchor for the trainer."""
    terms: list[ExtraLoss] = []
    if kept.replay is not None:
        objective = rehearsed_objective(options, model, kept.replay.target)
        loader = Loader(
            kept.replay.structures,
            model.cutoff,
            batch_size=1,
            augment=options.training.rotational_augmentation,
            seed=seed,
            dtype=model.dtype,
        )
        beside = Beside(loader, training, kept.replay.fraction)
        terms.append(ReplayLoss(model, beside, _possible(objective, loader), kept.replay.weight))
    if kept.anchor is not None:
        anchor = kept.anchor
        terms.append(AnchorLoss(model, anchor.reference, anchor.importance, anchor.strength))
    return terms


def _possible(objective: Objective, loader: Loader) -> Objective:
    """The objective without derivatives that no structure is labelled with."""
    labels, target = loader.label_names, objective.target
    return Objective(
        target=target,
        loss=objective.loss,
        forces=objective.forces and forces_key(target) in labels,
        stress=objective.stress and stress_key(target) in labels,
        scale=objective.scale,
        per_atom=objective.per_atom,
    )


def retention_of(kept: Kept, model: Potential) -> Retention | None:
    """The forgetting report of a run, ready to evaluate."""
    own = kept.retention
    return None if own is None else Retention(own.structures, own.targets, model, own.every)
