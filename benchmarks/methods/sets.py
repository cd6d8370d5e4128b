"""The data sets of the comparison and how they are split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from scipy.sparse.csgraph import connected_components

#: Of the splits, so that every run of every method has the same structures.
SPLIT_SEED = 0
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSet:
    """A set, its splits, and how long a run on it is.

    Attributes:
        title: what it is, for tables.
        file: training and validation structures come from it, and the test structures unless
            ``test_file`` is given.
        sizes: structures for training, validation and test.
        apart: structures that differ by less than this (see :func:`differences`), A, count as
            copies of each other and are kept in the same part.
        batch_size, num_epochs: of each run.
        stress: whether there are stresses to learn.
        test_file: a file of its own for the test, far from the other.
    """

    title: str
    file: str
    sizes: tuple[int, int, int]
    apart: float
    batch_size: int
    num_epochs: int
    stress: bool = False
    test_file: str = ""


SETS = {
    "ethanol": DataSet(
        "ethanol, PBE/def2-SVP", "ethanol_pbe_train1000.xyz", (50, 20, 100), 0.05, 5, 30
    ),
    "carbon": DataSet(
        "distorted graphite, LDA", "carbon_reduced_100.xyz", (60, 20, 20), 0.02, 5, 25, stress=True
    ),
    "water": DataSet(
        "water, 64 molecules, DFT",
        "water_dpmd_train.xyz",
        (8, 3, 6),
        0.2,
        1,
        20,
        test_file="water_dpmd_val.xyz",
    ),
    "3bpa": DataSet(
        "3BPA, 300 K, wB97X/6-31G(d)",
        "3bpa_train_300K.xyz",
        (50, 50, 134),
        0.05,
        5,
        30,
        test_file="3bpa_test_300K.xyz",
    ),
}


def geometry(atoms: Atoms) -> np.ndarray:
    """All distances between atoms (nearest images) and the lengths of a periodic cell, A."""
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    pairs = distances[np.triu_indices(len(atoms), 1)]
    return np.concatenate([pairs, atoms.cell.lengths()]) if atoms.pbc.any() else pairs


def differences(frames: list[Atoms]) -> np.ndarray:
    """Root mean square differences of :func:`geometry`, [n, n], A; atoms in the same order."""
    points = np.stack([geometry(atoms) for atoms in frames])
    return np.stack([np.sqrt(((points - point) ** 2).mean(1)) for point in points])


def split(frames: list[Atoms], sizes: tuple[int, ...], apart: float) -> list[list[int]]:
    """Parts of the wanted sizes, none with a near copy of a structure of another part.

    Structures closer than ``apart`` form a group, with those closer to one of these too. Groups
    are dealt out whole, in random order, to the first part that still has room for them.

    Raises:
        ValueError: the groups do not fill the parts.
    """
    _, group = connected_components(differences(frames) < apart)
    parts: list[list[int]] = [[] for _ in sizes]
    for number in np.random.default_rng(SPLIT_SEED).permutation(group.max() + 1):
        members = np.flatnonzero(group == number).tolist()
        for part, size in zip(parts, sizes, strict=True):
            if len(part) + len(members) <= size:
                part += members
                break
    if any(len(part) < size for part, size in zip(parts, sizes, strict=True)):
        raise ValueError(f"parts of {[len(part) for part in parts]} instead of {sizes} structures")
    return parts


def write_splits(name: str, data: Path, work: Path) -> None:
    """Write ``<name>-<part>.xyz`` for each part, unless they are there."""
    if all(part_path(name, part, work).exists() for part in PARTS):
        return
    plan = SETS[name]
    frames = ase.io.read(data / plan.file, ":")
    if plan.test_file:
        tests = ase.io.read(data / plan.test_file, ":")
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(tests))[: plan.sizes[2]]
        train, validation = split(frames, plan.sizes[:2], plan.apart)
        parts = [[frames[i] for i in train], [frames[i] for i in validation]]
        parts.append([tests[i] for i in chosen])
    else:
        parts = [[frames[i] for i in part] for part in split(frames, plan.sizes, plan.apart)]
    for part, own in zip(PARTS, parts, strict=True):
        ase.io.write(part_path(name, part, work), own)


def part_path(name: str, part: str, work: Path) -> Path:
    """The file of a part of a set."""
    return work / f"{name}-{part}.xyz"


def section(name: str, part: str, work: Path, target: str) -> dict[str, Any]:
    """The part as a section of an options file; its energy is learned as ``target``."""
    energy: dict[str, Any] = {
        "quantity": "energy",
        "key": "energy",
        "unit": "eV",
        "forces": {"key": "forces"},
    }
    if SETS[name].stress:
        energy["stress"] = {"key": "stress"}
    systems = {"read_from": str(part_path(name, part, work)), "length_unit": "angstrom"}
    return {"systems": systems, "targets": {target: energy}}
