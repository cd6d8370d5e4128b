"""Batches made ahead in a thread are the batches that would have been made without it."""

from __future__ import annotations

import threading

import pytest
import torch

from pet_finetune.data import Loader
from pet_finetune.data.batch import LabelledBatch, on_device, one_ahead
from tiny_data import molecules, structures_of


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
