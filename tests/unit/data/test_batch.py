"""A batch is its structures one after another, and nothing more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from pet_finetune.data import (
    atoms_to_structure,
    batch_from_atoms,
    collate,
    edge_vectors,
    structure_neighbors,
)
from pet_finetune.data.structure import Structure
from pet_finetune.errors import DataError

CUTOFF = 4.0


def labelled(atoms: Atoms, index: int, *, forces: bool = True, stress: bool = False) -> Structure:
    rng = np.random.default_rng(index)
    labels = {"energy": torch.tensor(-20_000.000_1 - index, dtype=torch.float64)}
    if forces:
        labels["energy/forces"] = torch.from_numpy(rng.normal(size=(len(atoms), 3)))
    if stress:
        labels["energy/stress"] = torch.from_numpy(rng.normal(size=(3, 3)))
    return atoms_to_structure(atoms, index, source="set.xyz", labels=labels)


@pytest.fixture
def structures() -> list[Structure]:
    radical = molecule("OH")
    radical.info.update(charge=1, spin=2)
    return [
        labelled(molecule("H2O"), 4),
        labelled(bulk("Cu"), 0, stress=True),
        labelled(Atoms("He"), 9, forces=False),
        labelled(radical, 2),
    ]


@pytest.fixture
def pairs(structures):
    return [structure_neighbors(s, CUTOFF) for s in structures]


def test_concatenation_of_singles(structures, pairs):
    batch = collate(list(zip(structures, pairs, strict=True)), torch.float64)
    singles = [collate([item], torch.float64) for item in zip(structures, pairs, strict=True)]
    for name in ("numbers", "edge_vectors", "cells", "charges", "spins"):
        expected = torch.cat([getattr(single.graph, name) for single in singles])
        assert torch.equal(getattr(batch.graph, name), expected), name
    assert batch.frames == tuple(frame for single in singles for frame in single.frames)
    atoms = np.cumsum([0] + [s.num_atoms for s in structures])
    edges = np.cumsum([0] + [p.num_edges for p in pairs])
    for k, single in enumerate(singles):
        mine = slice(edges[k], edges[k + 1])
        assert torch.equal(batch.graph.centers[mine], single.graph.centers + atoms[k])
        assert torch.equal(batch.graph.neighbors[mine], single.graph.neighbors + atoms[k])
        assert torch.equal(batch.graph.reverse[mine], single.graph.reverse + edges[k])
        assert batch.graph.structure_index[atoms[k] : atoms[k + 1]].eq(k).all()


def test_geometry_charge_and_sizes(structures, pairs):
    batch = collate(list(zip(structures, pairs, strict=True)), torch.float64)
    expected = [
        edge_vectors(s.positions, s.cell, p) for s, p in zip(structures, pairs, strict=True)
    ]
    assert torch.equal(batch.graph.edge_vectors, torch.cat(expected))
    assert batch.graph.atoms_per_structure.tolist() == [3, 1, 1, 2]
    assert (batch.graph.num_structures, batch.graph.num_atoms) == (4, 7)
    assert batch.graph.num_edges == sum(p.num_edges for p in pairs)
    assert batch.graph.charges.tolist() == [0, 0, 0, 1]
    assert batch.graph.spins.tolist() == [1, 1, 1, 2]
    assert batch.frames == (4, 0, 9, 2)
    assert batch.graph.volumes.tolist() == pytest.approx([0, bulk("Cu").get_volume(), 0, 0])
    assert batch.where == "frames 4, 0, 9, 2 of set.xyz"


def test_missing_labels_are_nan(structures, pairs):
    batch = collate(list(zip(structures, pairs, strict=True)), torch.float32)
    assert set(batch.labels) == {"energy", "energy/forces", "energy/stress"}
    forces, stress = batch.labels["energy/forces"], batch.labels["energy/stress"]
    assert forces.shape == (7, 3)
    assert forces.isnan().any(dim=1).tolist() == [False] * 4 + [True] + [False] * 2
    assert stress.shape == (4, 3, 3)
    assert stress.isnan().flatten(1).all(dim=1).tolist() == [True, False, True, True]
    torch.testing.assert_close(
        stress[1], structures[1].labels["energy/stress"].float(), rtol=0, atol=0
    )


def test_labels_nobody_has_are_absent(structures, pairs):
    batch = collate([(structures[2], pairs[2])], torch.float32)
    assert set(batch.labels) == {"energy"}


def test_totals_stay_double_and_the_rest_is_cast(structures, pairs):
    batch = collate(list(zip(structures, pairs, strict=True)), torch.float32)
    assert batch.labels["energy"].dtype == torch.float64
    assert batch.labels["energy"][0].item() == -20_004.000_1
    for tensor in (batch.graph.edge_vectors, batch.graph.cells, batch.labels["energy/forces"]):
        assert tensor.dtype == torch.float32
    double = batch.to(dtype=torch.float64)
    assert double.graph.edge_vectors.dtype == double.labels["energy/stress"].dtype == torch.float64
    for name in ("numbers", "centers", "neighbors", "reverse", "structure_index"):
        assert getattr(double.graph, name).dtype == torch.int64
        assert getattr(batch.graph, name).dtype == torch.int64
    assert batch.to(dtype=torch.float32).labels["energy"].dtype == torch.float64


def test_moves_to_a_device_whole(structures, pairs):
    batch = collate(list(zip(structures, pairs, strict=True)), torch.float32).to("meta")
    tensors = {**batch.graph._asdict(), **batch.labels}
    assert tensors.pop("edges") is None  # nothing chose any
    assert len(tensors) == 9 + 3
    for name, tensor in tensors.items():
        assert tensor.device.type == "meta", name


def test_frozen(structures, pairs):
    batch = collate([(structures[0], pairs[0])], torch.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.labels = {}
    with pytest.raises(AttributeError, match="set"):
        batch.graph.numbers = batch.graph.numbers


def test_empty_batch_is_refused():
    with pytest.raises(DataError, match="at least one"):
        collate([], torch.float32)


def test_batch_of_isolated_atoms():
    batch = batch_from_atoms([Atoms("He"), Atoms("Ne")], CUTOFF, torch.float32)
    assert batch.num_edges == 0
    assert batch.edge_vectors.shape == (0, 3)
    assert batch.centers.dtype == torch.int64
    assert batch.structure_index.tolist() == [0, 1]


def test_one_atoms_object_is_a_batch_of_one():
    one = batch_from_atoms(molecule("H2O"), CUTOFF)
    listed = batch_from_atoms([molecule("H2O")], CUTOFF)
    assert one.num_structures == 1
    assert torch.equal(one.edge_vectors, listed.edge_vectors)
