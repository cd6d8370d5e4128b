"""Gathers and their hand-written gradients, once and twice differentiated."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pet_finetune.backends import reference
from pet_finetune.backends.attention import (
    Attention,
    attend,
    attend_once,
    pad_keys,
    pad_rows,
    unpad_rows,
)
from pet_finetune.backends.formula import twice
from pet_finetune.backends.reference import Gate, Norm, Product, RowNorm, permute_rows
from pet_finetune.graph import Layout, make_layout


def rows(count, seed=0, width=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64, requires_grad=True)


def layout(counts):
    """Slots of atoms with the given numbers of neighbours, and how many tokens they hold."""
    each = torch.tensor(counts, dtype=torch.int64)
    centers = torch.arange(len(counts)).repeat_interleave(each)
    rectangles = make_layout(centers, len(counts), rectangles=True).rectangles
    return rectangles, len(counts) + len(centers)


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
    padded = pad_rows(x, where)
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
    check_twice(lambda r: unpad_rows(r, where), rows(len(where.empty), seed=1))


@LAYOUTS
def test_pad_and_unpad_are_adjoint(counts):
    where, tokens = layout(counts)
    x, y = rows(tokens), rows(len(where.empty), seed=1)
    left = (pad_rows(x, where) * y).sum()
    right = (x * unpad_rows(y, where)).sum()
    torch.testing.assert_close(left, right)


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


class RMSByRows(RowNorm):
    """With what a GPU has a kernel for and a CPU does not."""

    def _slopes(self, grad, kept, weight=None, trains=False):
        inverse, x, *_ = kept
        h, n = grad if weight is None else grad * weight, x * inverse
        to_x = (h - n * (h * n).mean(-1, keepdim=True)) * inverse
        return to_x, (grad * n).sum(0) if trains else None


#: Formulas, and the shapes of what they take.
FORMULAS = {
    "silu": (Gate("silu"), [(5, 6)]),
    "swiglu": (Gate("swiglu"), [(5, 6)]),
    "rms norm": (Norm("rms_norm", 0.1), [(5, 6), (6,)]),
    "layer norm": (Norm("layer_norm", 0.1), [(5, 6), (6,), (6,)]),
    "rms norm by rows": (RMSByRows("rms_norm", 0.1), [(5, 6), (6,)]),
    "layer norm by rows": (RowNorm("layer_norm", 0.1), [(5, 6), (6,), (6,)]),
    "product": (Product(), [(5, 6), (3, 6), (3,)]),
}


ATTENTION = {"attention": [2, 0, 3, 0], "attention of no atoms": []}


@pytest.fixture(params=[*FORMULAS, *ATTENTION])
def formula(request):
    if request.param in ATTENTION:
        where, tokens = layout(ATTENTION[request.param])
        inputs = [numbers(tokens, 3 * 4), numbers(len(where.empty), seed=1)]
        with torch.no_grad():
            inputs[1].masked_fill_(where.empty, -torch.inf)
        return Attention(where, 2, 0.4), inputs
    made, shapes = FORMULAS[request.param]
    return made, [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def derivatives(function, inputs, towards, again=False):
    """A function, its gradient, and the gradient of that; which can be differentiated again or not.

    A written second derivative is used where it cannot.
    """
    out = function(*inputs)
    first = torch.autograd.grad(out, inputs, towards, create_graph=True)
    cotangents = [numbers(*f.shape, seed=7 + i).detach() for i, f in enumerate(first)]
    pairs = [(f, c) for f, c in zip(first, cotangents, strict=True) if f.requires_grad]
    second = torch.autograd.grad(
        [f for f, _ in pairs], [*inputs, towards], [c for _, c in pairs], create_graph=again,
        allow_unused=True,
    )  # fmt: skip
    return [out, *first, *(torch.zeros(()) if s is None else s for s in second)]


@pytest.mark.parametrize("summed", [["cpu"], []], ids=["as on a CPU", "as on a GPU"])
def test_written_derivatives_are_those_of_autograd(formula, summed, monkeypatch):
    monkeypatch.setattr(reference, "_SUMMED", summed)
    made, inputs = formula
    towards = numbers(*made.plain(*inputs).shape, seed=5)
    found = [t.detach() for t in derivatives(partial(twice, made), inputs, towards)]
    expected = derivatives(made.plain, inputs, towards)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other.detach().to(own).expand_as(own))


def test_a_third_derivative_is_refused(formula):
    made, inputs = formula
    towards = numbers(*made.plain(*inputs).shape, seed=5)
    with pytest.raises(RuntimeError, match="can be differentiated twice"):
        derivatives(partial(twice, made), inputs, towards, again=True)


def test_passes_over_one_graph_leave_each_other_alone():
    """Also where one pass has no use for the first operator; and two derivatives of one."""
    x, w = numbers(5, 6), numbers(6, seed=1)

    def gradients(function):
        y = function(Gate("silu"), x)
        out = function(Norm("rms_norm", 0.1), y, w)
        ones, more = torch.ones_like(out), torch.full_like(out, 0.3)
        (slope,) = torch.autograd.grad(out, x, ones, create_graph=True)
        (other,) = torch.autograd.grad(out.square(), x, more, create_graph=True)
        loss = slope.square().sum() + other.square().sum() + (out**2).sum()
        return [torch.autograd.grad(loss, i, retain_graph=True)[0] for i in (w, x)]

    found, expected = gradients(twice), gradients(lambda made, *inputs: made.plain(*inputs))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_the_gradient_by_rows_computes_none_by_weights(monkeypatch):
    summed = []
    monkeypatch.setattr(reference, "_summed", lambda rows: summed.append(1) or rows.sum(0))
    x, weight = numbers(5, 6), numbers(6, seed=1)
    out = twice(Norm("rms_norm", 0.1), x, weight)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert not summed
    torch.autograd.grad(slope.square().sum(), [x, weight])
    assert summed


def test_a_derivative_that_nothing_depends_on_has_none():
    x = numbers(5, 6)
    (slope,) = torch.autograd.grad(twice(Gate("silu"), x).sum(), x, create_graph=True)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    assert torch.autograd.grad(Nothing.apply(slope), x, allow_unused=True) == (None,)


HEADS, HEAD = 2, 5


def attention_of(function, counts, dtype, *more):
    """What attention gives, and its derivatives by tokens and by logarithms of cutoff factors."""
    where, tokens = layout(counts)
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(tokens, 3 * HEADS * HEAD, generator=generator, dtype=dtype)
    logarithms = torch.rand(sum(counts), generator=generator, dtype=dtype).log()
    logarithms[:1] = -34.5  # of an edge that is about to vanish
    inputs = qkv.requires_grad_(), logarithms.requires_grad_()
    bias = pad_keys(logarithms, Layout(torch.empty(len(counts) + 1), where))
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


@pytest.mark.parametrize("function", [attend, attend_once])
def test_rectangles_of_an_exported_model_are_the_same(function):
    """With one crowded atom among many; forward, and the gradient by tokens."""
    counts = torch.tensor([5] * 40 + [90] + [7] * 40)
    centers = torch.arange(len(counts)).repeat_interleave(counts)
    found = []
    for make, attention in ((make_layout, attend), map(torch.jit.script, (make_layout, function))):
        made = make(centers, len(counts), True)
        assert [len(slots) > 1 for slots in made.rectangles.slots] == [True, True]
        qkv = numbers(len(counts) + len(centers), 3 * HEADS * HEAD)
        bias = pad_keys(torch.zeros(len(centers), dtype=torch.float64), Layout(*made))
        out = attention(qkv, made.rectangles, bias, HEADS, 0.4)
        found.append((out, *torch.autograd.grad((out**2).sum(), qkv)))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
