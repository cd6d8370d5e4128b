"""Cutoff functions: 1 inside, 0 outside, and no step or kink between."""

from __future__ import annotations

import math

import pytest
import torch

from pet_finetune.nn.neighborhood import bump_step, cosine_step


def bump(distances, cutoff, width):
    return bump_step((distances - (cutoff - width)) / width)


def cosine(distances, cutoff, width):
    return cosine_step((distances - (cutoff - width)) / width)


CUTOFF_FUNCTIONS = {"Bump": bump, "Cosine": cosine}
BOTH = pytest.mark.parametrize("function", CUTOFF_FUNCTIONS.values(), ids=CUTOFF_FUNCTIONS)


@BOTH
def test_one_inside_zero_outside(function):
    distances = torch.tensor([0.1, 2.0, 3.5, 4.0, 7.0], dtype=torch.float64)
    assert function(distances, 4.0, 0.5).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


@BOTH
def test_falls_all_the_way(function):
    factors = function(torch.linspace(3.55, 3.95, 50, dtype=torch.float64), 4.0, 0.5)
    assert (factors.diff() < 0).all()
    middle = function(torch.tensor(3.75, dtype=torch.float64), 4.0, 0.5)
    assert float(middle) == pytest.approx(0.5)


def test_values_of_the_formulas():
    quarter = torch.tensor(3.625, dtype=torch.float64)
    assert float(cosine(quarter, 4.0, 0.5)) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    expected = 0.5 * (1 + math.tanh(1 / math.tan(math.pi / 4)))
    assert float(bump(quarter, 4.0, 0.5)) == pytest.approx(expected)


@BOTH
def test_gradient_is_that_of_the_values(function):
    distances = torch.tensor([1.0, 3.7, 3.75, 3.9, 5.0], dtype=torch.float64, requires_grad=True)
    cutoffs = torch.tensor([4.0, 4.1, 4.0, 4.2, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, c: function(d, c, 0.5), (distances, cutoffs))
    assert torch.autograd.gradgradcheck(lambda d, c: function(d, c, 0.5), (distances, cutoffs))


@BOTH
@pytest.mark.parametrize("edge", [3.5, 4.0])
def test_no_kink_at_the_ends_of_the_taper(function, edge):
    near = torch.tensor([edge - 1e-5, edge + 1e-5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(near, 4.0, 0.5).sum(), near)
    assert slope.abs().max() < 1e-3
    assert slope.isfinite().all()
