"""Operators whose first and second derivative are written down.

Autograd forms the derivative of a derivative by the general rule: of one norm some 75 operations,
each of which reads and writes memory and is started by itself on a GPU. Written down, 20 do, or 14
with torch's kernels for whole rows.

The second derivative comes in two parts: what follows from the inputs' cotangents at once, and what
the operator's inputs get, which waits for the gradient of its output and is computed with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Gradients = Sequence[Tensor | None]
Waiting = Sequence[Any]


class Formula:
    """An operator; what is no tensor of floats is part of it."""

    def plain(self, *inputs: Tensor) -> Tensor:
        """The operator, which autograd can differentiate."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Gradients]:
        """The same result, and the values that the derivatives need."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, kept: Gradients, waiting: Waiting | None, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """The gradient of each input (or None), and the values for :meth:`second`.

        Args:
            grad: of the output.
            kept: from :meth:`forward`.
            waiting: from :meth:`second`, whose gradients on the inputs are to be added, and which
                this may use up. None where this derivative will itself be differentiated.
            asked: of which inputs gradients are needed, beside those of rows.
        """
        raise NotImplementedError

    def second(self, towards: Gradients, kept: Gradients, first: Gradients) -> tuple[Tensor, Any]:
        """The gradient of :meth:`backward` on its ``grad``, and what is left for later.

        Args:
            towards: the cotangents of the gradients that :meth:`backward` returns; of the first
                input there is one.
            kept: from :meth:`forward`.
            first: from :meth:`backward`.
        """
        raise NotImplementedError


def twice(formula: Formula, *inputs: Tensor) -> Tensor:
    """The operator of a formula, which can be differentiated twice."""
    # Weights as views, for autograd does not tell of leaves whether their gradients are needed.
    given = [i.view_as(i) if i.is_leaf and i.requires_grad else i for i in inputs]
    out: Tensor = _Forward.apply(formula, *given)[0]
    return out


class _Forward(torch.autograd.Function):
    """The operator; only its result, because its inputs have been differentiated."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, kept = formula.forward(*inputs)
        nothing = out.new_empty(0)
        ctx.formula, ctx.count, ctx.waiting = formula, len(inputs), []
        ctx.shapes = inputs[0].shape, out.shape
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
            grad = nothing.new_zeros(ctx.shapes[1])
        needed = torch._C._will_engine_execute_node
        asked = [node is not None and needed(node) for node, _ in ctx.next_functions]
        if torch.is_grad_enabled():
            return None, *_Backward.apply(ctx, asked, grad, nothing, *kept)
        return None, *ctx.formula.backward(grad, kept, waiting, asked)[0]


class _Backward(torch.autograd.Function):
    """The first derivative. It reads ``nothing``, so that what is differentiated first is it."""

    @staticmethod
    def forward(
        ctx: Any, of: Any, asked: Sequence[bool], grad: Tensor, _: Tensor, *kept: Tensor | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.waiting, ctx.count = of.formula, of.waiting, len(kept)
        ctx.shape = of.shapes[0]
        gradients, first = ctx.formula.backward(grad, kept, None, asked)
        ctx.save_for_backward(*kept, *first)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *towards: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The network can be differentiated twice: leave create_graph out the second time."
            )
        saved, v = ctx.saved_tensors, towards[0]
        kept, first = saved[: ctx.count], saved[ctx.count :]
        if v is None:
            told = next((t for t in towards if t is not None), None)
            if told is None:
                return (None,) * (4 + ctx.count)
            towards = told.new_zeros(ctx.shape), *towards[1:]
        to_grad, left = ctx.formula.second(towards, kept, first)
        ctx.waiting.append((torch._C._current_graph_task_id(), left))
        return None, None, to_grad, None, *[None] * ctx.count
