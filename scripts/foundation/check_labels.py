"""Check the labels: against values that tblite publishes, and against finite differences.

    python scripts/foundation/check_labels.py WORK [--structures 40]

Energies of water and methane as printed in tblite's own documentation (``tblite.ase``); then, for
structures drawn from WORK's chunks, the stored energy against a new calculation, forces along a
random direction and stresses of boxes under a random strain against central differences of the
energy.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule
from labels import label

PUBLISHED = {"H2O": -137.96777625229421, "CH4": -113.60956621093894}  # eV
STEP = 2e-3  # Angstrom, or strain


def energy(atoms: Atoms) -> float:
    frame = label(atoms)
    return np.nan if frame is None else frame.get_potential_energy()


def slope(atoms: Atoms, moved) -> float:
    """Central difference of the energy; ``moved`` gives a copy of the atoms at a parameter."""
    return (energy(moved(atoms, STEP)) - energy(moved(atoms, -STEP))) / (2 * STEP)


def force_error(atoms: Atoms, rng: np.random.Generator) -> float:
    direction = rng.normal(size=atoms.positions.shape)
    direction /= np.linalg.norm(direction)

    def moved(start: Atoms, amount: float) -> Atoms:
        copy = start.copy()
        copy.positions += amount * direction
        return copy

    return abs(slope(atoms, moved) + float((atoms.get_forces() * direction).sum()))


def stress_error(atoms: Atoms, rng: np.random.Generator) -> float:
    strain = rng.normal(size=(3, 3))
    strain = (strain + strain.T) / (2 * np.linalg.norm(strain))

    def moved(start: Atoms, amount: float) -> Atoms:
        copy = start.copy()
        copy.set_cell(copy.cell.array @ (np.eye(3) + amount * strain), scale_atoms=True)
        return copy

    derived = float((atoms.get_stress(voigt=False) * strain).sum()) * atoms.get_volume()
    return abs(slope(atoms, moved) - derived)


def draw(
    chunks: list[Path], structures: int, rng: np.random.Generator
) -> tuple[list[Atoms], list[Atoms]]:
    """Structures of twelve chunks, and three boxes of any, since most chunks have none."""
    order = [chunks[i] for i in rng.permutation(len(chunks))]
    frames = [atoms for path in order[:12] for atoms in ase.io.iread(path)]
    drawn = [frames[i] for i in rng.permutation(len(frames))[:structures]]
    others = (atoms for path in order[12:] for atoms in ase.io.iread(path))
    boxes = (atoms for atoms in chain(frames, others) if atoms.info["kind"] == "box")
    return drawn, list(islice(boxes, 3))


def main() -> None:
    """Print the largest deviations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--structures", type=int, default=40)
    arguments = parser.parse_args()
    for name, published in PUBLISHED.items():
        print(f"{name}: {energy(molecule(name)) - published:+.1e} eV from the published energy")
    rng = np.random.default_rng(0)
    drawn, boxes = draw(sorted(arguments.work.glob("chunks/*.xyz")), arguments.structures, rng)
    again = [abs(energy(f) - f.get_potential_energy()) for f in drawn]
    forces = [force_error(f, rng) for f in drawn]
    print(f"{len(drawn)} structures computed again: energies within {np.nanmax(again):.1e} eV")
    print(
        f"forces along a direction: median {np.nanmedian(forces):.1e}, largest "
        f"{np.nanmax(forces):.1e} eV/A, against central differences"
    )
    if boxes:
        stresses = [stress_error(f, rng) for f in boxes]
        print(f"{len(boxes)} boxes, dE/dstrain: within {np.nanmax(stresses):.1e} eV")


if __name__ == "__main__":
    main()
