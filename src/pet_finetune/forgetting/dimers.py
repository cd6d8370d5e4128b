"""Dimer curves: how two atoms of each pair of elements attract and repel each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from ase.data import chemical_symbols, covalent_radii
from torch import Tensor

from pet_finetune.graph import Batch
from pet_finetune.model import Potential

#: Angstrom.
SHORTEST, LONGEST, STEP = 0.5, 6.0, 0.05
#: Below this part of the sum of the covalent radii there must be a wall...
_WALL = 0.7
#: ...and in any case up to here (Angstrom), for the sake of hydrogen.
_WALL_AT_LEAST = 0.65
# eV: a fall by less towards shorter distances is rounding, and a rise by less no wall.
_FLAT, _HIGH = 1e-3, 0.1
# Angstrom: beyond the reach of any model.
_APART = 1000.0
_PAIRS_AT_ONCE = 32
# PET is not invariant to rotations: one direction, without symmetry, the same for all.
_DIRECTION = torch.tensor([0.48, 0.60, 0.64], dtype=torch.float64)


@dataclass(frozen=True)
class DimerCurves:
    """Energies of dimers.

    Attributes:
        pairs: atomic numbers of the two atoms, the smaller first.
        energies: [n_pairs, n_distances] eV, relative to the two atoms far apart; the distances
            are those of :func:`distances`.
    """

    pairs: tuple[tuple[int, int], ...]
    energies: Tensor


def distances() -> Tensor:
    """The distances of a curve, [n_distances] float64, Angstrom."""
    return torch.arange(round((LONGEST - SHORTEST) / STEP) + 1, dtype=torch.float64) * STEP + (
        SHORTEST
    )


def pairs_of(species: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """All pairs of elements, an element with itself included."""
    return tuple(combinations_with_replacement(sorted(set(species)), 2))


def pair_name(pair: tuple[int, int]) -> str:
    """Such as ``C-O``."""
    return "-".join(chemical_symbols[number] for number in pair)


def dimer_curves(model: Potential, target: str, species: Iterable[int]) -> DimerCurves:
    """The curves of all pairs of some elements.

    Args:
        model: is put into evaluation mode, and back.
        target: which energy.
        species: atomic numbers that the model knows.
    """
    pairs = pairs_of(species)
    lengths = torch.cat([distances(), torch.tensor([_APART], dtype=torch.float64)])
    parts = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for some in torch.tensor(pairs).split(_PAIRS_AT_ONCE):
                batch = _dimers(some, lengths).to(model.device, model.dtype)
                parts.append(model.predict(batch, target, forces=False).energy.cpu())
    finally:
        model.train(training)
    energies = torch.cat(parts).view(len(pairs), len(lengths))
    return DimerCurves(pairs, energies[:, :-1] - energies[:, -1:])


def _dimers(pairs: Tensor, lengths: Tensor) -> Batch:
    """Dimers of each pair, [n, 2], at each length, [m], as one batch of n m structures."""
    count = len(pairs) * len(lengths)
    numbers = pairs.repeat_interleave(len(lengths), dim=0).reshape(-1)
    outward = lengths.repeat(len(pairs)).unsqueeze(1) * _DIRECTION
    atoms = torch.arange(2 * count)
    opposite = atoms.view(-1, 2).flip(1).reshape(-1)
    return Batch(
        numbers=numbers,
        edge_vectors=torch.stack([outward, -outward], dim=1).reshape(-1, 3),
        centers=atoms,
        neighbors=opposite,
        reverse=opposite,
        structure_index=atoms // 2,
        cells=torch.zeros(count, 3, 3, dtype=torch.float64),
        charges=torch.zeros(count, dtype=torch.int64),
        spins=torch.ones(count, dtype=torch.int64),
    )


def wall_distance(pair: tuple[int, int]) -> float:
    """The distance in Angstrom below which two atoms are too close.

    That is 0.7 of the sum of the covalent radii (ASE's table), and at least 0.65 Angstrom.
    """
    radii = float(covalent_radii[pair[0]] + covalent_radii[pair[1]])
    return max(_WALL * radii, _WALL_AT_LEAST)


def has_wall(pair: tuple[int, int], energies: Tensor) -> bool:
    """Whether the energy of a dimer rises steadily, and by 0.1 eV, where its atoms are too close.

    Args:
        pair: atomic numbers.
        energies: [n_distances] as in :class:`DimerCurves`.
    """
    close = energies[distances() <= wall_distance(pair) + 1e-9]
    return bool((close.diff() < _FLAT).all()) and float(close[0] - close[-1]) > _HIGH


def verdict(pair: tuple[int, int], before: Tensor, after: Tensor) -> str:
    """What became of a pair's repulsive wall: ``kept``, ``lost``, ``gained`` or ``absent``."""
    walls = has_wall(pair, before), has_wall(pair, after)
    return {
        (True, True): "kept",
        (True, False): "lost",
        (False, True): "gained",
        (False, False): "absent",
    }[walls]
