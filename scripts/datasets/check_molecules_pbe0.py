"""Check the finished files of ``make_molecules_pbe0.py`` and print their statistics.

Without options only the files are read. ``--finite-difference N`` recomputes N frames per
molecule: the stored energy and forces must come out again, and the slope of the energy along a
random direction must agree with the force.

Usage: ``OMP_NUM_THREADS=1 python check_molecules_pbe0.py datasets --finite-difference 2``
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.units import Hartree
from make_molecules_pbe0 import (
    DUPLICATE_RMS_ANGSTROM,
    SPECIES,
    SPLITS,
    fingerprint,
    label_frame,
    pbe0,
)

STEP_ANGSTROM = 1e-3
NET_FORCE_LIMIT = 1e-5  # eV/Angstrom; the files hold eight decimals
SLOPE_LIMIT = 1e-4  # eV/Angstrom; the third derivative of the energy accounts for about 1e-5
REPRODUCTION_LIMIT = 1e-5  # eV and eV/Angstrom


def by_molecule(frames: Sequence[Atoms], name: str) -> list[Atoms]:
    """The frames of one molecule."""
    return [frame for frame in frames if frame.info["molecule"] == name]


def print_statistics(splits: dict[str, list[Atoms]]) -> None:
    """Counts, spread of the energies and size of the forces, per molecule and split."""
    columns = ("molecule", "split", "frames", "E std eV", "E range eV", "F rms eV/A", "F max eV/A")
    print(" | ".join(f"{column:>12}" for column in columns))
    for species, split in itertools.product(SPECIES, SPLITS):
        frames = by_molecule(splits[split], species.name)
        energies = np.array([frame.get_potential_energy() for frame in frames])
        forces = np.array([frame.get_forces() for frame in frames])
        row = (energies.std(), np.ptp(energies), np.sqrt(np.mean(forces**2)))
        largest = np.linalg.norm(forces, axis=2).max()
        numbers = " | ".join(f"{value:12.3f}" for value in (*row, largest))
        print(f"{species.name:>12} | {split:>12} | {len(frames):12d} | {numbers}")


def nearest_pair_rms(frames: Sequence[Atoms]) -> float:
    """Smallest difference of fingerprints (Angstrom) between any two frames of one molecule."""
    prints = np.stack([fingerprint(frame) for frame in frames])
    rows, columns = np.triu_indices(len(prints), k=1)
    return float(np.sqrt(np.mean((prints[rows] - prints[columns]) ** 2, axis=1)).min())


def check_files(splits: dict[str, list[Atoms]]) -> list[str]:
    """Problems found in the files as they are, none if all is well."""
    problems = []
    frames = [frame for split in SPLITS for frame in splits[split]]
    net = max(np.abs(frame.get_forces().sum(axis=0)).max() for frame in frames)
    print(f"largest component of a net force: {net:.1e} eV/A")
    if not net < NET_FORCE_LIMIT:
        problems.append(f"net force of {net:.1e} eV/A")

    for species in SPECIES:
        nearest = nearest_pair_rms(by_molecule(frames, species.name))
        print(f"{species.name}: nearest pair of frames differs by {nearest:.3f} A")
        # Coordinates were rounded to eight decimals after the frames had been selected.
        if nearest < DUPLICATE_RMS_ANGSTROM - 1e-6:
            problems.append(f"near-duplicate frames of {species.name}")

    origins = {
        split: {(frame.info["molecule"], frame.info["trajectory"]) for frame in splits[split]}
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        if shared := origins[first] & origins[second]:
            problems.append(f"{first} and {second} share trajectories {sorted(shared)}")
    return problems


def check_frame(frame: Atoms, rng: np.random.Generator) -> list[str]:
    """Problems found on computing ``frame`` and two displaced copies of it anew."""
    name = "{molecule} t{trajectory} f{frame}".format(**frame.info)
    again = label_frame(frame)
    energy_error = abs(again.get_potential_energy() - frame.get_potential_energy())
    force_error = np.abs(again.get_forces() - frame.get_forces()).max()

    direction = rng.standard_normal(frame.positions.shape)
    direction /= np.linalg.norm(direction)
    energies = []
    for sign in (1, -1):
        displaced = frame.copy()
        displaced.positions += sign * STEP_ANGSTROM * direction
        energies.append(pbe0(displaced).e_tot * Hartree)
    slope = -(energies[0] - energies[1]) / (2 * STEP_ANGSTROM)
    force = float(np.sum(frame.get_forces() * direction))
    print(
        f"{name}: recomputed dE {energy_error:.1e} eV, dF {force_error:.1e} eV/A; "
        f"force along direction {force:+.6f}, finite difference {slope:+.6f}, "
        f"difference {force - slope:+.1e} eV/A",
        flush=True,
    )
    problems = []
    if not max(energy_error, force_error) < REPRODUCTION_LIMIT:
        problems.append(f"{name}: stored labels are not reproduced")
    if not abs(force - slope) < SLOPE_LIMIT:
        problems.append(f"{name}: force disagrees with the finite difference")
    return problems


def main() -> int:
    """Print the findings; the exit status tells whether all checks passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the data files")
    parser.add_argument(
        "--finite-difference", type=int, default=0, metavar="N", help="frames per molecule"
    )
    parser.add_argument("--seed", type=int, default=0, help="choice of frames and directions")
    args = parser.parse_args()

    splits = {
        split: ase.io.read(args.folder / f"molecules_pbe0_{split}.xyz", index=":")
        for split in SPLITS
    }
    print_statistics(splits)
    problems = check_files(splits)
    rng = np.random.default_rng(args.seed)
    frames = [frame for split in SPLITS for frame in splits[split]]
    for species in SPECIES:
        candidates = by_molecule(frames, species.name)
        for index in rng.choice(len(candidates), args.finite_difference, replace=False):
            problems += check_frame(candidates[index], rng)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
