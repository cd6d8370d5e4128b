"""What an epoch yields depends on (seed, epoch) alone and covers every structure once."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from ase.build import molecule

from pet_finetune.data.epochs import count_packs, pack
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.loader import Loader
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import DataError

NAMES = ["H2O", "CH4", "CH3CH2OH", "OH", "C6H6", "NH3", "CO2", "H2", "C2H6", "HCN", "N2"]


@pytest.fixture
def structures():
    rng = np.random.default_rng(0)
    result = []
    for index, name in enumerate(NAMES):
        atoms = molecule(name)
        labels = {
            "energy": torch.tensor(float(index), dtype=torch.float64),
            "energy/forces": torch.from_numpy(rng.normal(size=(len(atoms), 3))),
        }
        result.append(atoms_to_structure(atoms, index, labels=labels))
    return result


def frames(batches):
    return [list(batch.frames) for batch in batches]


def assert_same(first, second):
    first, second = list(first), list(second)
    assert frames(first) == frames(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.graph.edge_vectors, other.graph.edge_vectors)
        assert torch.equal(one.labels["energy/forces"], other.labels["energy/forces"])


def test_in_order_equals_collate(structures):
    loader = Loader(structures, 4.0, batch_size=4, dtype=torch.float64)
    assert frames(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(loader) == loader.num_batches(5) == 3
    expected = collate([(s, structure_neighbors(s, 4.0)) for s in structures[4:8]], torch.float64)
    assert_same(list(loader)[1:2], [expected])


@pytest.mark.parametrize("sizes", [{"batch_size": 3}, {"max_atoms_per_batch": 13}])
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_every_structure_once_an_epoch(structures, sizes, epoch):
    loader = Loader(structures, 4.0, shuffle=True, augment=True, seed=3, **sizes)
    batches = list(loader.epoch(epoch))
    assert len(batches) == loader.num_batches(epoch)
    assert sorted(chain(*frames(batches))) == list(range(len(NAMES)))


@pytest.mark.parametrize("sizes", [{"batch_size": 3}, {"max_atoms_per_batch": 13}])
def test_deterministic_per_seed_and_epoch(structures, sizes):
    def make(seed):
        return Loader(structures, 4.0, shuffle=True, augment=True, seed=seed, **sizes)

    loader = make(3)
    list(loader.epoch(0))  # what was iterated before makes no difference
    assert_same(loader.epoch(5), make(3).epoch(5))
    assert frames(loader.epoch(5)) != frames(loader.epoch(6))
    assert frames(loader.epoch(5)) != frames(make(4).epoch(5))


def test_starting_mid_epoch_goes_on_exactly(structures):
    loader = Loader(structures, 4.0, batch_size=3, shuffle=True, augment=True, seed=1)
    whole = list(loader.epoch(2))
    assert_same(loader.epoch(2, start_batch=2), whole[2:])
    assert list(loader.epoch(2, start_batch=len(whole))) == []


def test_rotations_differ_between_epochs_and_structures(structures):
    loader = Loader(structures, 4.0, batch_size=len(NAMES), augment=True, seed=1)
    (first,), (second,) = loader.epoch(0), loader.epoch(1)
    plain = next(iter(loader.view()))
    assert not torch.allclose(first.graph.edge_vectors, second.graph.edge_vectors)
    assert not torch.allclose(first.graph.edge_vectors, plain.graph.edge_vectors)
    lengths = plain.graph.edge_vectors.norm(dim=1)
    torch.testing.assert_close(first.graph.edge_vectors.norm(dim=1), lengths)
    # H2 and N2 both lie along z: one rotation for all would turn them alike.
    h2, n2 = (
        first.graph.edge_vectors[first.graph.structure_index[first.graph.centers] == k][0]
        for k in (7, 10)
    )
    assert not torch.allclose(h2.abs() / h2.norm(), n2.abs() / n2.norm())


def test_rotation_of_a_structure_does_not_depend_on_its_batch(structures):
    small = Loader(structures, 4.0, batch_size=2, augment=True, seed=1)
    large = Loader(structures, 4.0, max_atoms_per_batch=100, augment=True, seed=1)
    one = torch.cat([batch.graph.edge_vectors for batch in small.epoch(3)])
    other = torch.cat([batch.graph.edge_vectors for batch in large.epoch(3)])
    assert torch.equal(one, other)


def test_packing_respects_the_limit(structures):
    loader = Loader(structures, 4.0, max_atoms_per_batch=13, shuffle=True, seed=0)
    for epoch in range(5):
        sizes = [batch.graph.num_atoms for batch in loader.epoch(epoch)]
        assert max(sizes) <= 13
        # No two neighbouring batches could have been one.
        assert all(a + b > 13 for a, b in pairwise(sizes))


def test_pack_fills_greedily_and_isolates_the_oversized():
    num_atoms = np.array([4, 3, 30, 2, 8, 1, 5])
    pieces = [p.tolist() for p in pack(np.arange(7), num_atoms, 10)]
    assert pieces == [[0, 1], [2], [3, 4], [5, 6]]
    pieces = [p.tolist() for p in pack(np.array([2, 0, 1]), num_atoms, 10)]
    assert pieces == [[2], [0, 1]]
    pieces = [p.tolist() for p in pack(np.arange(7), num_atoms, 10, min_atoms=7)]
    assert pieces == [[0, 1], [2], [3, 4]]


def test_oversized_structures_are_announced(structures, caplog):
    logger = logging.getLogger("pet_finetune")
    logger.addHandler(caplog.handler)
    try:
        Loader(structures, 4.0, max_atoms_per_batch=5)
    finally:
        logger.removeHandler(caplog.handler)
    assert "12 atoms" in caplog.text


def test_view_shares_the_prepared_structures(structures):
    loader = Loader(structures, 4.0, batch_size=3, shuffle=True, augment=True, seed=1)
    view = loader.view()
    assert list(chain(*frames(view))) == list(range(len(NAMES)))
    assert frames(loader.view(batch_size=6)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert loader.shuffle
    assert loader.batch_size == 3
    assert view.structures == loader.structures


def test_a_sample_is_spread_over_all_and_in_order(structures):
    loader = Loader(structures, 4.0, batch_size=2, shuffle=True, augment=True, seed=1)
    part = loader.sampled(most=3)
    assert list(chain(*frames(part))) == [0, 5, 10]
    assert_same(part, Loader([structures[k] for k in (0, 5, 10)], 4.0, batch_size=2))
    assert loader.sampled(most=len(NAMES)) is loader
    assert loader.sampled() is loader
    assert len(loader.structures) == len(NAMES)


def test_a_sample_has_rare_elements_and_the_label(structures):
    names = [*["H2O"] * 61, "CH4", *["H2O"] * 58]
    few = [atoms_to_structure(molecule(name), k) for k, name in enumerate(names)]
    part = Loader(few, 4.0, batch_size=2).sampled(most=10)
    assert names.index("CH4") in list(chain(*frames(part)))
    assert len(part.structures) < 14
    bare = [replace(s, labels={}) if k % 3 else s for k, s in enumerate(structures)]
    part = Loader(bare, 4.0, batch_size=2).sampled(most=3, label="energy")
    assert {k % 3 for k in chain(*frames(part))} == {0}


def test_dtype_and_label_names(structures):
    loader = Loader(structures, 4.0, batch_size=3, augment=True, dtype=torch.float64)
    assert all(batch.graph.edge_vectors.dtype == torch.float64 for batch in loader)
    assert loader.label_names == ("energy", "energy/forces")


def test_no_structures():
    with pytest.raises(DataError, match="empty"):
        Loader([], 4.0, batch_size=2)


def test_counting_packs_is_packing():
    rng = np.random.default_rng(0)
    for trial in range(200):
        sizes = rng.integers(1, 40, size=rng.integers(1, 30))
        order = rng.permutation(len(sizes))
        limits = int(rng.integers(1, 90)), int(rng.integers(0, 30))
        assert count_packs(order, sizes, *limits) == len(pack(order, sizes, *limits)), trial
