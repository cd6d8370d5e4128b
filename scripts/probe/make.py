"""Make the probe set that ships in the package: small neutral structures over many elements.

    python scripts/probe/make.py src/pet_finetune/data/probe.xyz

Molecules of ASE's G2 collection, pairs and triples of them beside each other, and elemental,
binary and ternary crystals with ASE's own lattice constants or those named here. Every structure
is moved off its symmetric geometry with a fixed seed, so that its forces are not zero, and carries
no labels: the starting model of each run gives its own.
"""

from __future__ import annotations

import argparse

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.spacegroup import crystal

AMPLITUDE = 0.06  # Angstrom, standard deviation of each coordinate
STRAIN = 0.02  # standard deviation of each component

MOLECULES = (
    "H2O", "NH3", "CH4", "CO2", "HCN", "C2H2", "C2H4", "C2H6", "CH3OH", "H2CO", "HCOOH",
    "CH3CHO", "CH3CH2OH", "CH3CH2NH2", "CH3CN", "C6H6", "C4H4NH", "C5H5N", "C4H4O", "C4H4S",
    "trans-butane", "isobutane", "CH3COOH", "CH3COCH3", "HCOOCH3", "CH3CONH2", "N2H4", "H2O2",
    "N2O", "SO2", "SH2", "OCS", "CH3SH", "PH3", "PF3", "Si2H6", "SiH4", "SiF4",
    "CH3SiH3", "HF", "HCl", "CH3Cl", "CF4", "HCCl3", "ClF3", "BF3", "BCl3", "C2F4", "LiH", "LiF",
    "NaCl", "AlF3", "AlCl3",
)  # fmt: skip
CLUSTERS = (
    ("H2O", "H2O"), ("H2O", "CH3OH"), ("NH3", "H2O"), ("CO2", "CH4"), ("HF", "HCl"),
    ("CH3CH2OH", "H2O"), ("H2O", "H2O", "H2O"), ("C2H4", "SO2", "N2"), ("HCOOH", "HCOOH"),
    ("H3CNH2", "H2O", "CO2"), ("SH2", "H2O"), ("PH3", "CH3Cl"),
)  # fmt: skip
# Structures that ASE knows by the element, and compounds with the structure they have.
ELEMENTS = (
    "Li", "Be", "C", "Na", "Mg", "Al", "Si", "K", "Ca", "Ti", "V", "Cr", "Fe", "Co", "Ni", "Cu",
    "Zn", "Ge", "Sr", "Y", "Zr", "Nb", "Mo", "Ru", "Rh", "Pd", "Ag", "Cd", "Ba", "Hf", "Ta", "W",
    "Re", "Os", "Ir", "Pt", "Au", "Pb",
)  # fmt: skip
COMPOUNDS = (
    ("LiF", "rocksalt", 4.03), ("NaCl", "rocksalt", 5.64), ("KBr", "rocksalt", 6.60),
    ("MgO", "rocksalt", 4.21), ("CaO", "rocksalt", 4.81), ("NiO", "rocksalt", 4.18),
    ("TiN", "rocksalt", 4.24), ("PbS", "rocksalt", 5.94), ("SnTe", "rocksalt", 6.33),
    ("SiC", "zincblende", 4.36), ("BN", "zincblende", 3.62), ("AlP", "zincblende", 5.46),
    ("GaAs", "zincblende", 5.65), ("InSb", "zincblende", 6.48), ("ZnS", "zincblende", 5.41),
    ("CdTe", "zincblende", 6.48), ("CuI", "zincblende", 6.05), ("ZnSe", "zincblende", 5.67),
    ("CsCl", "cesiumchloride", 4.12), ("NiAl", "cesiumchloride", 2.89),
    ("CaFF", "fluorite", 5.46), ("ZrOO", "fluorite", 5.15),
)  # fmt: skip


def compounds() -> list[Atoms]:
    made = [bulk(name, kind, a=a) for name, kind, a in COMPOUNDS]
    made.append(crystal("SrTiO", [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)],
                        spacegroup=221, cellpar=[3.905] * 3 + [90] * 3))  # fmt: skip
    made.append(crystal("TiO", [(0, 0, 0), (0.305, 0.305, 0)], spacegroup=136,
                        cellpar=[4.594, 4.594, 2.959, 90, 90, 90]))  # fmt: skip
    return made


def elements() -> list[Atoms]:
    """Two atoms at least, so that there are forces."""
    made = [bulk(symbol) for symbol in ELEMENTS]
    return [atoms if len(atoms) > 1 else atoms * (2, 1, 1) for atoms in made]


def beside(names: tuple[str, ...], rng: np.random.Generator) -> Atoms:
    """Molecules rotated at random in a row, their closest atoms 2.3 to 2.9 Angstrom apart."""
    cluster = molecule(names[0])
    for name in names[1:]:
        other = molecule(name)
        other.rotate(float(rng.uniform(0, 360)), rng.normal(size=3), center="COM")
        other.positions -= other.get_center_of_mass()
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        gap, away = rng.uniform(2.3, 2.9), 0.0
        while True:
            placed = other.positions + away * direction
            between = placed[:, None] - cluster.positions[None]
            if np.linalg.norm(between, axis=-1).min() >= gap:
                break
            away += 0.05
        other.positions = placed
        cluster += other
    return cluster


def moved(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Off the symmetric geometry; crystals strained too. Nothing but elements and geometry."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if bare.pbc.all():
        strain = STRAIN * rng.normal(size=(3, 3))
        bare.set_cell(bare.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    bare.positions += AMPLITUDE * rng.normal(size=(len(bare), 3))
    bare.positions = bare.positions.round(4)
    bare.cell = bare.cell.array.round(4)
    return bare


def main() -> None:
    """Make all and write one file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("destination")
    arguments = parser.parse_args()
    rng = np.random.default_rng(20240229)
    frames = [molecule(name) for name in MOLECULES]
    frames += [beside(names, rng) for names in CLUSTERS]
    frames += [*elements(), *compounds()]
    frames = [moved(atoms, rng) for atoms in frames]
    ase.io.write(arguments.destination, frames, format="extxyz")
    species = sorted({z for atoms in frames for z in atoms.numbers.tolist()})
    atoms = [len(frame) for frame in frames]
    print(f"{len(frames)} structures, {sum(atoms)} atoms, {len(species)} elements")


if __name__ == "__main__":
    main()
