"""Distorted copies of structures: atoms moved, cells strained, by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pet_finetune.rng import Stream

from .structure import Structure

__all__ = ["distorted"]

# An independent random stream of a run's seed.


def distorted(
    structures: Sequence[Structure], copies: int, rattle: float, strain: float, seed: int
) -> list[Structure]:
    """Copies of each structure with every atom moved and, where periodic, the cell strained.

    Labels are left behind, since they are those of the original.

    Args:
        structures: the originals; they stay as they are.
        copies: how many of each.
        rattle: standard deviation of each Cartesian coordinate, Å.
        strain: standard deviation of each component of the symmetric strain of cells that are
            periodic in all three directions.
        seed: the same seed gives the same copies.
    """
    made = []
    for number, structure in enumerate(structures):
        for copy in range(copies):
            rng = np.random.default_rng([seed, Stream.PERTURBED_COPIES, number, copy])
            made.append(_distorted(structure, rattle, strain, rng))
    return made


def _distorted(
    structure: Structure, rattle: float, strain: float, rng: np.random.Generator
) -> Structure:
    positions, cell = structure.positions, structure.cell
    if bool(structure.pbc.all()):
        drawn = strain * rng.normal(size=(3, 3))
        deform = torch.from_numpy(np.eye(3) + (drawn + drawn.T) / 2)
        positions, cell = positions @ deform, cell @ deform
    moves = torch.from_numpy(rattle * rng.normal(size=tuple(positions.shape)))
    return replace(structure, positions=positions + moves, cell=cell, labels={})
