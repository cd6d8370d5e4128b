"""Operators of plain torch with a first and a second derivative of their own.

Autograd forms the derivative of a derivative by the general rule: of one norm some 75 operations,
each of which reads and writes memory and is started by itself on a GPU. Written down, 20 do.

The second derivative comes in two parts: what follows from the inputs' cotangents at once, and what
the operator's inputs get, which waits for the gradient of its output and is computed with it.
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
        """The operator, which autograd can differentiate."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """The same, and what the derivatives shall have of it."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, kept: Tensors, waiting: Sequence[Gradients] = ()
    ) -> tuple[Gradients, Gradients]:
        """The gradient on each input, None where it has none; and what :meth:`second` shall have.

        Args:
            grad: of the output.
            kept: from :meth:`forward`.
            waiting: from :meth:`second`, whose gradients on the inputs are to be added.
        """
        raise NotImplementedError

    def second(
        self, towards: Gradients, kept: Tensors, first: Gradients
    ) -> tuple[Tensor, Gradients]:
        """The gradient of :meth:`backward` on its ``grad``, and what is left for later.

        Args:
            towards: the cotangents of the gradients that :meth:`backward` returns.
            kept: from :meth:`forward`.
            first: from :meth:`backward`.
        """
        raise NotImplementedError


def twice(formula: Formula, *inputs: Tensor) -> Tensor:
    """The operator of a formula, which can be differentiated twice."""
    out: Tensor = _Forward.apply(formula, *inputs)[0]
    return out


class _Forward(torch.autograd.Function):
    """The operator; beside its result, nothing: what that depends on has been differentiated."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, kept = formula.forward(*inputs)
        nothing = out.new_empty(0)
        ctx.formula, ctx.count, ctx.shape, ctx.waiting = formula, len(inputs), out.shape, []
        ctx.save_for_backward(*kept, nothing)
        return out, nothing

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Any:
        *kept, nothing = ctx.saved_tensors
        # Of this backward pass alone: another one may have had no use for this part of the graph.
        task = torch._C._current_graph_task_id()
        waiting = [left for number, left in ctx.waiting if number == task]
        ctx.waiting.clear()
        if grad is None:
            if not waiting:
                return None, *[None] * ctx.count
            grad = nothing.new_zeros(ctx.shape)
        if torch.is_grad_enabled():
            return None, *_Backward.apply(ctx.formula, ctx.waiting, grad, nothing, *kept)
        return None, *ctx.formula.backward(grad, kept, waiting)[0]


class _Backward(torch.autograd.Function):
    """The first derivative. It reads ``nothing``, so that what is differentiated first is it."""

    @staticmethod
    def forward(
        ctx: Any, formula: Formula, waiting: list[Any], grad: Tensor, _: Tensor, *kept: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.waiting, ctx.count = formula, waiting, len(kept)
        gradients, first = formula.backward(grad, kept)
        ctx.save_for_backward(*kept, *first)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *towards: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The network can be differentiated twice: leave create_graph out the second time."
            )
        kept, first = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        to_grad, left = ctx.formula.second(towards, kept, first)
        ctx.waiting.append((torch._C._current_graph_task_id(), left))
        return None, None, to_grad, None, *[None] * ctx.count
