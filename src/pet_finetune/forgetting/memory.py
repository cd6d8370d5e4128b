"""What a new run has to remember of its foundation: read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pet_finetune.config import DatasetOptions, Options
from pet_finetune.data.charges import check_charges
from pet_finetune.data.files import read_frames
from pet_finetune.data.perturb import distorted
from pet_finetune.data.probe import PROBE, probe_structures
from pet_finetune.data.readers import read_structures
from pet_finetune.data.species import check_species
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.errors import ConfigError, DataError
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.training.start import Start

from .foundation import Foundation, Rehearsal, choose_rehearsal, compared_targets, foundation_of

_logger = get_logger(__name__)
_TRAINING = "training"
# An independent random stream of a run's seed.
_SAMPLE_STREAM = 9


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
        if not foundation.sources:
            raise ConfigError(
                "architecture.training.finetune.anchor: ewc weighs the weights by what they mean "
                "for an energy of the foundation, but no trained head begins as one. Use l2sp, or "
                "name the head to begin with in finetune.inherit_heads."
            )
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
