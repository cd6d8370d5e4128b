"""Ways to read, spoil and inspect labelled structures, for the tests of ``inspection``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from pet_finetune.config.load import parse_options
from pet_finetune.data.readers import read_structures
from pet_finetune.data.structure import Structure
from pet_finetune.inspection.inspected import Finding
from pet_finetune.inspection.inspection import inspect_sets
from pet_finetune.inspection.overview import Inspection
from tiny_data import structures_of

Structures = Sequence[Structure]


def read(path: Path) -> list[Structure]:
    """All structures of a file with ASE's names."""
    section = {"systems": {"read_from": str(path)}, "targets": {"energy": {}}}
    options = parse_options({"training_set": section}, require_start=False).options
    return read_structures(options.training_set[0])


def copper(count: int) -> list[Structure]:
    """Strained cells of four copper atoms with energies, forces and stress of ASE's EMT; every
    other one is rattled.
    """
    frames = []
    for index in range(count):
        atoms = bulk("Cu", cubic=True)
        rng = np.random.default_rng(index)
        strain = np.eye(3) + 0.015 * rng.normal(size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.rattle(0.05 if index % 2 else 1e-3, rng=rng)
        atoms.calc = EMT()
        results = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return structures_of(frames)


def relabel(structure: Structure, **labels: Tensor | float | None) -> Structure:
    """A structure with other labels: ``energy``, ``forces``, ``stress``; None takes one away."""
    names = {"energy": "energy", "forces": "energy/forces", "stress": "energy/stress"}
    changed = dict(structure.labels)
    for kind, value in labels.items():
        if value is None:
            changed.pop(names[kind], None)
        else:
            changed[names[kind]] = torch.as_tensor(value, dtype=torch.float64)
    return replace(structure, labels=changed)


def scaled(
    structures: Iterable[Structure],
    energy: float = 1.0,
    forces: float = 1.0,
    stress: float = 1.0,
    length: float = 1.0,
) -> list[Structure]:
    """Structures whose labels and lengths are multiplied, as those of other units are."""
    factors = {"energy": energy, "energy/forces": forces, "energy/stress": stress}
    return [
        replace(
            s,
            positions=s.positions * length,
            cell=s.cell * length,
            labels={name: value * factors[name] for name, value in s.labels.items()},
        )
        for s in structures
    ]


def look(train: Structures, **others: Structures) -> Inspection:
    """Inspect a training set, and others by name, without a foundation."""
    return inspect_sets({"train": train, **others}, "energy", {})


def codes(inspection: Inspection, *severities: str) -> set[str]:
    """Codes of the findings, of some severities or of all."""
    return {f.code for f in inspection.findings if not severities or f.severity in severities}


def the(inspection: Inspection, code: str) -> Finding:
    """The one finding of a code."""
    (found,) = [finding for finding in inspection.findings if finding.code == code]
    return found


def frames(finding: Finding) -> list[int]:
    """All frame numbers that a finding names."""
    return [number for place in finding.where for number in place.numbers]


def turned(structure: Structure, seed: int = 0) -> Structure:
    """The same molecule, turned, moved, its atoms in another order; labels likewise."""
    rng = np.random.default_rng(seed)
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation = torch.tensor(matrix * np.sign(np.linalg.det(matrix)))
    order = torch.tensor(rng.permutation(structure.num_atoms))
    labels = dict(structure.labels)
    labels["energy/forces"] = (labels["energy/forces"] @ rotation.T)[order]
    positions = (structure.positions @ rotation.T)[order] + 1.5
    return replace(structure, numbers=structure.numbers[order], positions=positions, labels=labels)
