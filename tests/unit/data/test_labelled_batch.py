"""Batches with labels, and the thread that makes them ahead of the GPU."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from pet_finetune.data.labelled_batch import (
    LabelledBatch,
    batch_from_atoms,
    collate,
    on_device,
    one_ahead,
)
from pet_finetune.data.loader import Loader
from pet_finetune.data.neighbors import edge_vectors, structure_neighbors
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.errors import DataError
from tiny_data import molecules, structures_of

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
    assert len(tensors) == 10 + 3
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


@pytest.fixture(scope="module")
def loader():
    structures = structures_of(molecules(7))
    return Loader(structures, 3.5, batch_size=2, shuffle=True, augment=True, seed=3)


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.frames == other.frames
        assert torch.equal(one.graph.edge_vectors, other.graph.edge_vectors)
        assert torch.equal(one.labels["energy/forces"], other.labels["energy/forces"])


@pytest.mark.parametrize("start", [0, 2])
def test_one_ahead_changes_neither_order_nor_numbers(loader, start):
    before = torch.get_rng_state()
    assert_same(one_ahead(loader.epoch(4, start)), loader.epoch(4, start))
    assert torch.equal(torch.get_rng_state(), before)  # dropout must not notice the thread


def test_only_one_item_is_made_ahead_and_in_a_thread():
    made, threads = [], set()

    def items():
        for number in range(5):
            made.append(number)
            threads.add(threading.current_thread())
            yield number

    ahead = one_ahead(items())
    for number in range(5):
        assert next(ahead) == number
        assert len(made) <= number + 2
    assert list(ahead) == []
    assert threading.current_thread() not in threads
    assert len(threads) == 1


def test_one_ahead_of_nothing():
    assert list(one_ahead([])) == []
    assert list(one_ahead([None, 0, False])) == [None, 0, False]


def test_an_error_comes_where_the_item_would_have_come():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_stopping_early_ends_the_thread(loader):
    count = threading.active_count()
    ahead = one_ahead(loader.epoch(0))
    next(ahead)
    assert threading.active_count() == count + 1
    ahead.close()
    assert threading.active_count() == count


def test_on_a_cpu_batches_are_cast_and_no_thread_is_made(loader):
    batches = list(on_device(loader.epoch(1), torch.device("cpu"), torch.float64))
    assert {batch.graph.edge_vectors.dtype for batch in batches} == {torch.float64}
    assert_same(on_device(loader.epoch(1), torch.device("cpu"), torch.float32), loader.epoch(1))


def test_the_way_to_a_gpu_yields_the_same_batches(loader, monkeypatch):
    """The code of that way with its three calls of CUDA replaced, as there may be no GPU."""
    pinned, moved = [], []
    to = LabelledBatch.to

    def move(self, device=None, dtype=None, *, non_blocking=False):
        if device is None:  # cast before the edges are chosen
            return to(self, None, dtype)
        moved.append((device.type, non_blocking))
        return to(self, "cpu", dtype)

    monkeypatch.setattr(LabelledBatch, "to", move)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    device = torch.device("cuda", 0)
    assert_same(on_device(loader.epoch(2), device, torch.float32), loader.epoch(2))
    assert moved == [("cuda", True)] * 4
    ready = on_device(loader.epoch(2), device, torch.float32, lambda graph: graph._replace(edges=2))
    assert [batch.graph.edges for batch in ready] == [2] * 4
    one = next(loader.epoch(2))
    there = sum(part is not None for part in one.graph)
    assert len(pinned) == 2 * 4 * (there + len(one.labels))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batches_are_those_of_the_cpu(loader):
    found = [b.to("cpu") for b in on_device(loader.epoch(2), torch.device("cuda"), torch.float32)]
    assert_same(found, loader.epoch(2))
