"""The fingerprint changes with anything that training would notice, and with nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ase.build import bulk

from pet_finetune.data import Structure, atoms_to_structure, structures_fingerprint


@pytest.fixture
def structure() -> Structure:
    labels = {"energy": torch.tensor(1.0, dtype=torch.float64)}
    return atoms_to_structure(bulk("NaCl", "rocksalt", a=5.6), labels=labels)


def moved(structure):
    positions = structure.positions.clone()
    positions[0, 0] += 1e-12
    return positions


CHANGES = {
    "position": lambda s: {"positions": moved(s)},
    "element": lambda s: {"numbers": s.numbers.flip(0)},
    "cell": lambda s: {"cell": s.cell * 2},
    "pbc": lambda s: {"pbc": ~s.pbc},
    "charge": lambda s: {"charge": 1},
    "spin": lambda s: {"spin": 2},
    "label value": lambda s: {"labels": {"energy": s.labels["energy"] + 1}},
    "label name": lambda s: {"labels": {"energy/x": s.labels["energy"]}},
    "label missing": lambda s: {"labels": {}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_content_counts(structure, change):
    other = dataclasses.replace(structure, **change(structure))
    assert structures_fingerprint([structure]) != structures_fingerprint([other])


def test_names_do_not_count(structure):
    other = dataclasses.replace(structure, index=5, source="elsewhere.xyz")
    assert structures_fingerprint([structure]) == structures_fingerprint([other])


def test_order_and_number_count(structure):
    other = dataclasses.replace(structure, charge=1)
    prints = [
        structures_fingerprint(members)
        for members in (
            [],
            [structure],
            [structure, structure],
            [structure, other],
            [other, structure],
        )
    ]
    assert len(set(prints)) == 5
    assert all(len(value) == 64 for value in prints)
