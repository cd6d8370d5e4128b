"""Small labelled data sets, and options that train on them in a blink."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress

from pet_finetune.data.structure import Structure, atoms_to_structure

#: What an atom adds to every energy, eV: large, as total energies are.
ATOM_ENERGY = {1: -13.0, 6: -1030.0, 8: -2040.0, 14: -7800.0}


def label(atoms: Atoms, *, forces: bool = True) -> Atoms:
    """The structure with energies, forces and stress of a Morse potential."""
    atoms = atoms.copy()
    atoms.calc = MorsePotential(epsilon=0.3, r0=1.1, rho0=2.0, rcut1=2.5, rcut2=3.0)
    baseline = sum(ATOM_ENERGY.get(z, 0.0) for z in atoms.numbers.tolist())
    results: dict[str, Any] = {"energy": atoms.get_potential_energy() + baseline}
    if forces:
        results["forces"] = atoms.get_forces()
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def molecules(count: int, seed: int = 0, names: tuple[str, ...] = ("CH3OH", "H2O")) -> list[Atoms]:
    """Rattled molecules, one kind after the other."""
    frames = []
    for index in range(count):
        atoms = molecule(names[index % len(names)])
        atoms.rattle(0.08, seed=1000 * seed + index)
        frames.append(label(atoms))
    return frames


def crystals(count: int, seed: int = 0) -> list[Atoms]:
    """Rattled and strained silicon, two atoms a cell."""
    frames = []
    for index in range(count):
        atoms = bulk("Si", a=5.0)
        rng = np.random.default_rng([seed, index])
        strain = np.eye(3) + 0.02 * rng.normal(size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.rattle(0.05, rng=rng)
        frames.append(label(atoms))
    return frames


def write_frames(path: Path, frames: list[Atoms]) -> Path:
    """Write extended xyz."""
    ase.io.write(path, frames, format="extxyz")
    return path


def write_folder(path: Path, frames: list[Atoms], energies: str = "energy") -> Path:
    """Write a memory-mapped folder as metatrain's documentation says."""
    path.mkdir()
    sizes = [len(frame) for frame in frames]
    np.save(path / "ns.npy", np.array(len(frames)))
    np.save(path / "na.npy", np.cumsum([0, *sizes]))
    parts = {
        "x": np.concatenate([f.positions for f in frames]),
        "c": np.stack([f.cell.array for f in frames]),
        energies: np.array([f.calc.results["energy"] for f in frames])[:, None] + 1000.0,
        "forces": np.concatenate([f.calc.results["forces"] for f in frames])[..., None],
    }
    for name, values in parts.items():
        values.astype("<f4").tofile(path / f"{name}.bin")
    np.concatenate([f.numbers for f in frames]).astype("<i4").tofile(path / "a.bin")
    if all("stress" in f.calc.results for f in frames):
        stress = np.stack([f.get_stress(voigt=False) for f in frames])
        stress.astype("<f4").tofile(path / "stress.bin")
    return path


def data_section(path: str, **target: Any) -> dict[str, Any]:
    """Options of a data set in a file."""
    return {
        "systems": {"read_from": path, "length_unit": "angstrom"},
        "targets": {"energy": {"key": "energy", "unit": "eV", **target}},
    }


def options(training: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """Options for a run of two epochs on ``train.xyz``, tested on ``test.xyz``."""
    return {
        "seed": 5,
        "device": "cpu",
        "architecture": {
            "name": "pet",
            "training": {"batch_size": 3, "num_epochs": 2, **(training or {})},
        },
        "training_set": data_section("train.xyz"),
        "validation_set": 0.2,
        "test_set": data_section("test.xyz"),
        **top,
    }


def write_options(path: Path, content: dict[str, Any]) -> Path:
    """Write an options file."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def structures_of(frames: list[Atoms], target: str = "energy") -> list[Structure]:
    """Frames as the readers make them, labels included."""
    made = []
    for index, atoms in enumerate(frames):
        results = {} if atoms.calc is None else atoms.calc.results
        labels = {}
        if "energy" in results:
            labels[target] = torch.tensor(float(results["energy"]), dtype=torch.float64)
        if "forces" in results:
            labels[f"{target}/forces"] = torch.tensor(results["forces"], dtype=torch.float64)
        if "stress" in results:
            stress = voigt_6_to_full_3x3_stress(results["stress"])
            labels[f"{target}/stress"] = torch.tensor(stress, dtype=torch.float64)
        made.append(atoms_to_structure(atoms, index, source="tiny.xyz", labels=labels))
    return made


def epochs(folder: str | Path) -> list[dict[str, str]]:
    """The rows of a run's ``train.csv``."""
    with Path(folder, "train.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
