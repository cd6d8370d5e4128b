"""What goes beside each batch of another set."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pet_finetune.data.loader import Loader
from pet_finetune.forgetting.replay import Beside, number_beside
from tiny_data import molecules, structures_of

MAIN, SECOND = structures_of(molecules(10)), structures_of(molecules(7, seed=1))


def beside(fraction=0.25, seed=4, augment=True, **sizes):
    main = Loader(MAIN, 3.0, shuffle=True, seed=seed, **(sizes or {"batch_size": 4}))
    return Beside(Loader(SECOND, 3.0, batch_size=1, augment=augment, seed=seed), main, fraction)


@pytest.mark.parametrize(
    ("own", "fraction", "expected"),
    [(12, 0.25, 4), (8, 0.5, 8), (8, 0.9, 72), (4, 0.01, 1), (1, 0.25, 1)],
)
def test_the_part_of_all_structures(own, fraction, expected):
    assert number_beside(own, fraction) == expected


@pytest.mark.parametrize("sizes", [{"batch_size": 4}, {"max_atoms_per_batch": 20}])
def test_each_batch_has_its_own_share(sizes):
    drawn = beside(0.5, **sizes)
    for epoch in (0, 3):
        own = [batch.graph.num_structures for batch in drawn.main.epoch(epoch)]
        assert drawn.main.batch_sizes(epoch) == own
        assert [drawn.batch(epoch, b).graph.num_structures for b in range(len(own))] == own


def test_all_structures_occur_equally_often():
    drawn = beside(0.7)
    count = drawn.main.num_batches(0)
    frames = Counter(f for b in range(count) for f in drawn.batch(0, b).frames)
    assert set(frames) == set(range(7))
    assert max(frames.values()) - min(frames.values()) <= 1


def test_a_batch_is_a_function_of_seed_epoch_and_number():
    first, second = beside(), beside()
    order = [(0, 0), (0, 1), (1, 2), (0, 1), (1, 0)]
    seen = {place: first.batch(*place).graph.edge_vectors for place in order}
    for place in reversed(order):
        assert torch.equal(second.batch(*place).graph.edge_vectors, seen[place])
    orders = [
        [source.batch(epoch, b).frames for b in range(3)]
        for source in (beside(0.6), beside(0.6, seed=5))
        for epoch in (0, 1)
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_structures_are_turned_where_the_loader_turns_them():
    rotated, still = beside(), beside(augment=False)
    a, b = rotated.batch(0, 1), still.batch(0, 1)
    assert a.frames == b.frames
    assert not torch.allclose(a.graph.edge_vectors, b.graph.edge_vectors)
    torch.testing.assert_close(a.graph.edge_vectors.norm(dim=1), b.graph.edge_vectors.norm(dim=1))
