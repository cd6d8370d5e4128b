"""The structures that the features of this room look at: read, checked, and kept in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from pet_finetune.config import DatasetOptions
from pet_finetune.data.files import read_frames
from pet_finetune.data.on_disk import sampled
from pet_finetune.data.probe import PROBE, probe_structures
from pet_finetune.data.readers import read_structures
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.errors import DataError
from pet_finetune.inspection.thin import most_different
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.progress import Watch
from pet_finetune.rng import Stream
from pet_finetune.training.extend import check_known
from pet_finetune.training.feature import Plan
from pet_finetune.training.starting_model import FoundationEnergies

_logger = get_logger(__name__)
#: The name that stands for the run's own training set.
TRAINING = "training"
# An independent random stream of a run's seed.


def known_foundation(plan: Plan) -> FoundationEnergies:
    """The foundation of a run that has one."""
    assert plan.foundation is not None, "a run from scratch has no foundation to keep"
    return plan.foundation


def read_labelled(data: DatasetOptions, model: Potential) -> list[Structure]:
    """Labelled structures of a file, all of which the model can compute.

    Raises:
        DataError: the file is missing or lacks labels.
        SpeciesError: elements that the model does not know.
    """
    structures = list(sampled(read_structures(data), data.systems.read_from))
    check_known(structures, model)
    return structures


def read_unlabelled(names: Sequence[str], plan: Plan, section: str) -> list[Structure]:
    """Structures from all places named; labels that files have are left behind.

    Args:
        names: files, ``training`` for the training set, or ``probe`` for the set that ships.
        plan: of the run.
        section: of ``architecture.training.finetune`` that names them, for messages.

    Raises:
        DataError: a file is missing, or there is no structure in the end.
        SpeciesError: elements that the model does not know.
    """
    structures: list[Structure] = []
    for name in names:
        if name == TRAINING:
            structures += sampled(plan.training, section)
        elif name == PROBE:
            structures += probe_structures(known_foundation(plan).species)
        else:
            found = [
                atoms_to_structure(atoms, i, source=name)
                for i, atoms in enumerate(read_frames(name))
            ]
            check_known(found, plan.start.model)
            structures += found
    if not structures:
        raise DataError(
            f"architecture.training.finetune.{section}.structures: no structure of the probe set "
            "has none but the model's elements. Name `training` or a file instead."
        )
    return structures


def chosen(structures: list[Structure], most: int | None, section: str) -> list[Structure]:
    """At most so many of the structures, the most different ones; None for all.

    Args:
        structures: a pool.
        most: how many.
        section: of ``architecture.training.finetune`` that asks, for the log.
    """
    if most is None or len(structures) <= most:
        return structures
    with Watch(f"{section}: choosing {most} of {len(structures)} structures"):
        kept = most_different(structures, most)
    _logger.info(
        "%s: %d of %d structures, the most different ones", section, len(kept), len(structures)
    )
    return kept


def sample(structures: list[Structure], most: int, seed: int) -> list[Structure]:
    """At most so many of the structures, drawn by a seed, in their order."""
    if len(structures) <= most:
        return structures
    chosen = np.random.default_rng([seed, Stream.SAMPLE]).permutation(len(structures))[:most]
    return [structures[index] for index in sorted(chosen.tolist())]


def as_plain(structures: Iterable[Structure]) -> list[dict[str, Any]]:
    """Structures as tensors and plain values, for a file."""
    names = [field.name for field in fields(Structure)]
    return [
        {**{name: getattr(s, name) for name in names}, "labels": dict(s.labels)} for s in structures
    ]


def from_plain(values: Iterable[Mapping[str, Any]]) -> tuple[Structure, ...]:
    """The opposite of :func:`as_plain`."""
    return tuple(Structure(**one) for one in values)
