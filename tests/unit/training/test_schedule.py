"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from pet_finetune.training.optimizer import learning_rate_factor


def factors(total, warmup, scheduler="cosine"):
    return [learning_rate_factor(step, total, warmup, scheduler) for step in range(total)]


def test_warms_up_in_equal_steps_and_falls_as_a_cosine():
    found = factors(100, 0.1)
    assert found[:10] == pytest.approx([(k + 1) / 11 for k in range(10)])
    assert found[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 90) for k in range(90)])
    assert max(found) == found[10] == 1.0


def test_constant_after_the_warm_up():
    assert factors(10, 0.2, "constant") == pytest.approx([1 / 3, 2 / 3] + 8 * [1.0])


@pytest.mark.parametrize("total", [1, 2, 3, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.5, 0.99])
def test_never_zero_or_above_one(total, warmup):
    assert all(0.0 < factor <= 1.0 for factor in factors(total, warmup))


def test_steps_beyond_the_end_do_not_rise_again():
    assert learning_rate_factor(150, 100, 0.0, "cosine") == pytest.approx(0.0)
