"""Gathers and their hand-written gradients, once and twice differentiated."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.backends.reference import (
    attend,
    attend_once,
    pad_keys,
    pad_rows,
    permute_rows,
    unpad_rows,
)
from pet_finetune.graph import Layout, make_layout


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


HEADS, HEAD = 2, 5


def attention_of(function, counts, dtype, *more):
    """What attention gives, and its derivatives by tokens and by logarithms of cutoff factors."""
    where, tokens = layout(counts)
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(tokens, 3 * HEADS * HEAD, generator=generator, dtype=dtype)
    logarithms = torch.rand(sum(counts), generator=generator, dtype=dtype).log()
    logarithms[:1] = -34.5  # of an edge that is about to vanish
    inputs = qkv.requires_grad_(), logarithms.requires_grad_()
    bias = pad_keys(logarithms, Layout(torch.empty(0), where))
    out = function(qkv, where, bias, HEADS, 0.4, *more)
    cotangent = torch.randn(out.shape, generator=generator, dtype=dtype)
    return out, *torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("counts", [[2, 0, 3], [2, 2], [7, 1, 1, 4]], ids=str)
@pytest.mark.parametrize("scripted", [False, True])
def test_fused_attention_is_the_plain_one(counts, scripted):
    once = torch.jit.script(attend_once) if scripted else attend_once
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found, expected = attention_of(once, counts, dtype, 2), attention_of(attend, counts, dtype)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=near, atol=near)
        assert float(expected[2].abs().max()) > 1e-3
