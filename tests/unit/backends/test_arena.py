"""Memory goes from one piece of work to the next, and nothing of this can be seen outside."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from ase.build import bulk

from models import random_potential
from pet_finetune import PETCalculator
from pet_finetune.backends import choice
from pet_finetune.backends.choice import Arena

LARGE = 1_000_000  # numbers of 4 bytes
MB = 1 << 20


pytestmark = pytest.mark.usefixtures("with_kernels")


def address(numbers=LARGE):
    """Of a tensor that is gone when this returns."""
    return torch.empty(numbers).data_ptr()


def test_a_block_is_used_again():
    arena = Arena()
    with arena.reused():
        first = address()
        assert address() == first
    assert arena.bytes >= 4 * LARGE
    with arena.reused():
        assert address() == first


def test_what_was_free_side_by_side_is_one_again():
    arena = Arena()
    with arena.reused():
        first, second, third = (torch.empty(LARGE) for _ in range(3))
        start, held = first.data_ptr(), 4 * LARGE
        del first, second
        assert address(2 * LARGE) == start
        assert address(LARGE // 2) == start
        assert address(3 * LARGE) > third.data_ptr()
        del third
        assert address(3 * LARGE) == start
    assert arena.bytes >= 6 * held  # up to the end of the three at the end


def test_no_two_tensors_share_memory():
    generator = np.random.default_rng(0)
    arena, alive = Arena(), {}
    for step in range(300):
        with arena.reused():
            if alive and generator.random() < 0.45:
                number = generator.choice(list(alive))
                assert bool((alive.pop(number) == int(number)).all())
            alive[step] = torch.full((int(generator.integers(2_000, 200_000)),), step)
    assert all(bool((tensor == number).all()) for number, tensor in alive.items())


def test_small_tensors_are_left_to_the_c_library():
    arena = Arena()
    with arena.reused():
        address(4 * 1024 - 1)
    assert arena.bytes == 0


def test_what_was_not_used_goes_back_to_the_system():
    arena = Arena()
    with arena.reused():
        address()
    with arena.reused():
        pass
    assert arena.bytes == 0


def test_tensors_outlive_the_context_and_the_owner():
    arena = Arena()
    with arena.reused():
        kept = torch.arange(LARGE)
        view = kept.view(-1, 10)[-1]
    with arena.reused():
        torch.zeros(LARGE, dtype=torch.int64)
    del arena
    assert torch.equal(kept, torch.arange(LARGE))
    del kept
    assert view.tolist() == list(range(LARGE - 10, LARGE))


def test_libraries_below_torch_may_take_memory_and_keep_it():
    arena = Arena()
    halves = torch.randn(512, 512).to(torch.bfloat16)
    with arena.reused():
        inside = [halves @ halves, torch.conv2d(torch.randn(2, 8, 64, 64), torch.randn(8, 8, 3, 3))]
    del arena
    outside = halves @ halves
    torch.testing.assert_close(inside[0], outside)
    assert bool(inside[1].isfinite().all())


def test_other_threads_are_served_as_ever():
    arena = Arena()
    with arena.reused():
        thread = threading.Thread(target=address)
        thread.start()
        thread.join()
        assert arena.bytes == 0


def test_one_owner_inside_another():
    outer, inner = Arena(), Arena()
    with outer.reused():
        first = address()
        with inner.reused():
            assert address() != first
        assert address() == first
    assert outer.bytes > 0
    assert inner.bytes > 0


def test_an_error_ends_it():
    arena = Arena()
    with pytest.raises(RuntimeError, match="shape"), arena.reused():
        torch.empty(LARGE).view(3, -1)
    held = arena.bytes
    assert held > 0
    address()
    assert arena.bytes == held


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_start_empty(copied):
    arena = Arena()
    with arena.reused():
        address()
    other = copied(arena)
    assert other.bytes == 0
    with other.reused():
        address()
    assert other.bytes > 0


def test_without_the_kernels_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(choice._State, "loaded", False)
    arena = Arena()
    with arena.reused():
        address()
    assert arena.bytes == 0


def test_a_calculator_computes_the_same_from_old_blocks():
    model = random_potential(d_pet=64, cutoff=5.0, dtype=torch.float32)
    old = PETCalculator(model, skin=0.0)
    atoms = bulk("Si", cubic=True) * (4, 4, 4)
    for seed in range(3):
        atoms.rattle(0.05, seed=seed)
        found = old.get_forces(atoms)
    assert old._arena.bytes > 4 * MB
    expected = PETCalculator(model, skin=0.0).get_forces(atoms)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
