"""Gathers and their hand-written gradients, once and twice differentiated."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.backends.reference import pad_rows, permute_rows, unpad_rows
from pet_finetune.graph import make_layout


def rows(count, seed=0, width=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64, requires_grad=True)


def layout(counts):
    """Slots of atoms with the given numbers of neighbours, and how many tokens they hold."""
    centers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rectangle = make_layout(centers, len(counts), rectangle=True).rectangle
    return rectangle, len(counts) + len(centers)


def check_twice(function, inputs):
    # Squared, so that the second derivative is not identically zero.
    assert torch.autograd.gradcheck(lambda x: function(x) ** 2, (inputs,))
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 2, (inputs,))


def test_permute():
    index = torch.tensor([2, 0, 3, 1])
    inverse = torch.argsort(index)
    x = rows(4)
    assert torch.equal(permute_rows(x, index, inverse), x[index])
    check_twice(lambda r: permute_rows(r, index, inverse), x)


LAYOUTS = pytest.mark.parametrize("counts", [[2, 0, 3], [2, 2], [0, 0]], ids=str)


@LAYOUTS
def test_pad_puts_each_row_into_its_slot_and_nothing_else(counts):
    where, tokens = layout(counts)
    x = rows(tokens)
    padded = pad_rows(x, where).flatten(0, 1)
    assert torch.equal(padded[where.slot_of_token], x)
    in_use = torch.zeros(len(padded), dtype=torch.bool)
    in_use[where.slot_of_token] = True
    assert (padded[~in_use] == 0).all()
    check_twice(lambda r: pad_rows(r, where), x)


@LAYOUTS
def test_unpad_takes_them_back(counts):
    where, tokens = layout(counts)
    x = rows(tokens)
    assert torch.equal(unpad_rows(pad_rows(x, where), where), x)
    shape = where.token_of_slot.shape
    padded = rows(shape.numel(), seed=1)
    check_twice(lambda r: unpad_rows(r.view(*shape, 2), where), padded)


@LAYOUTS
def test_pad_and_unpad_are_adjoint(counts):
    where, tokens = layout(counts)
    x, y = rows(tokens), rows(where.token_of_slot.numel(), seed=1)
    y = y.view(*where.token_of_slot.shape, 2)
    left = (pad_rows(x, where) * y).sum()
    right = (x * unpad_rows(y, where)).sum()
    torch.testing.assert_close(left, right)
