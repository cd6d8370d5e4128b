"""Choosing the most different ones of many structures."""

from __future__ import annotations

from collections import Counter

import numpy as np
from ase import Atoms
from ase.build import molecule

from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.inspection.thin import _farthest, most_different


def structures(frames: list[Atoms]) -> list[Structure]:
    return [atoms_to_structure(atoms, index, source="pool") for index, atoms in enumerate(frames)]


def dimers(symbols: str, lengths: list[float]) -> list[Atoms]:
    return [Atoms(symbols, [[0, 0, 0], [0, 0, length]]) for length in lengths]


def test_farthest_points_are_the_corners() -> None:
    near = np.random.default_rng(0).normal(size=(50, 2)) * 0.01
    corners = np.array([[5.0, 0], [0, 5.0], [-5.0, -5.0]])
    chosen = _farthest(np.vstack([near, corners]), 4)
    assert {50, 51, 52} < set(chosen)
    assert len(set(chosen)) == 4


def test_rare_geometries_are_kept() -> None:
    pool = structures(dimers("CO", [1.1 + 0.001 * k for k in range(40)] + [0.8, 2.0]))
    kept = [one.index for one in most_different(pool, 3)]
    assert {40, 41} < set(kept)
    assert kept == sorted(kept)


def test_each_composition_keeps_the_same_part() -> None:
    ethanol = [molecule("CH3CH2OH") for _ in range(20)]
    for seed, atoms in enumerate(ethanol):
        atoms.rattle(0.05, seed=seed)
    pool = structures([*ethanol, *dimers("HC", [1 + 0.1 * k for k in range(10)])])
    assert Counter(one.num_atoms for one in most_different(pool, 15)) == {9: 10, 2: 5}
    assert most_different(pool, 30) == pool


def test_never_more_than_wanted() -> None:
    symbols = ["HC", "HN", "HO", "HF", "CO", "CN", "NO", "OF", "CF", "NF"]
    pool = structures([atoms for pair in symbols for atoms in dimers(pair, [1.0, 1.1, 1.2])])
    for most in (1, 4, 10, 13, 29):
        kept = most_different(pool, most)
        assert len(kept) == most
        found = Counter(tuple(one.numbers.tolist()) for one in kept)
        assert len(found) == min(most, len(symbols))


def test_the_same_structure_twice_is_taken_once() -> None:
    pool = structures(dimers("CO", [1.1, 1.1, 1.1, 1.5, 1.9]))
    assert [one.index for one in most_different(pool, 3)][1:] == [3, 4]
