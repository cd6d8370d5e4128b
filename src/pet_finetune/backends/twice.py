"""Operators of plain torch with a first and a second derivative of their own.

Autograd forms the derivative of a derivative by the general rule: of one norm some 75 operations,
each of which reads and writes memory and is started by itself on a GPU. Written down, half do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Formula", "twice"]

Tensors = Sequence[Tensor]
Gradients = Sequence[Tensor | None]


class Formula:
    """An operator; what is no tensor of floats is part of it."""

    def plain(self, *inputs: Tensor) -> Tensor:
        """The operator, which autograd can differentiate: what third derivatives are made by."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """The same, and what the derivatives shall have of it, on which nothing else depends."""
        raise NotImplementedError

    def backward(self, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """The gradient on each input; None where it has none."""
        raise NotImplementedError

    def second(self, towards: Gradients, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """The gradient of :meth:`backward`, on ``grad`` and then on each input.

        Args:
            towards: the cotangents of what :meth:`backward` returns.
            grad: its argument.
            inputs: those of the operator.
            kept: from :meth:`forward`.
        """
        raise NotImplementedError


def twice(formula: Formula, *inputs: Tensor) -> Tensor:
    """The operator of a formula, differentiable as often as anyone likes."""
    out: Tensor = _Forward.apply(formula, *inputs)
    return out


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, *inputs: Tensor) -> Tensor:
        out, kept = formula.forward(*inputs)
        ctx.formula, ctx.count = formula, len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *_Backward.apply(ctx.formula, ctx.count, grad, *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, count: int, grad: Tensor, *saved: Tensor) -> Any:
        ctx.formula, ctx.count = formula, count
        ctx.save_for_backward(grad, *saved)
        return tuple(formula.backward(grad, saved[:count], saved[count:]))

    @staticmethod
    def backward(ctx: Any, *towards: Tensor | None) -> Any:
        grad, *saved = ctx.saved_tensors
        inputs, kept = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():
            found = _by_autograd(ctx.formula, towards, grad, inputs)
        else:
            found = ctx.formula.second(towards, grad, inputs, kept)
        return None, None, *found, *[None] * len(kept)


def _by_autograd(
    formula: Formula, towards: Gradients, grad: Tensor, inputs: Tensors
) -> list[Tensor | None]:
    """:meth:`Formula.second`, to be differentiated again."""
    # Views, so that what ``grad`` owes to the inputs is left to the rest of the graph.
    grad, *inputs = (tensor.view_as(tensor) for tensor in (grad, *inputs))
    asked = [i for i in inputs if i.requires_grad]
    first = torch.autograd.grad(formula.plain(*inputs), asked, grad, create_graph=True)
    own = [t for t, i in zip(towards, inputs, strict=True) if i.requires_grad]
    pairs = [(f, t) for f, t in zip(first, own, strict=True) if t is not None and f.requires_grad]
    both = [x for x in (grad, *inputs) if x.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, both, cotangents, create_graph=True, allow_unused=True)
    made = iter(found)
    return [next(made) if x.requires_grad else None for x in (grad, *inputs)]
