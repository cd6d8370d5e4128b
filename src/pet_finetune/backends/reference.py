"""The network's operators by plain torch, which computes where nothing else can.

TorchScript compiles these functions where they are part of an exported network.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible. Where
each row goes to exactly one place, the gradient is another gather. Both cases of PET are of that
kind: turning edges around, and laying tokens out in padded rectangles (:mod:`.attention`).

Norms, gates and attention have a first and a second derivative of their own (:func:`twice`).

Autograd forms the derivative of a derivative by the general rule: of one norm some 75 operations,
each of which reads and writes memory and is started by itself on a GPU. Written down, 20 do.

The second derivative comes in two parts: what follows from the inputs' cotangents at once, and what
the operator's inputs get, which waits for the gradient of its output and is computed with it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

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
        self, grad: Tensor, kept: Gradients, waiting: Waiting, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """The gradient of each input (or None), and the values for :meth:`second`.

        Args:
            grad: of the output.
            kept: from :meth:`forward`.
            waiting: from :meth:`second`, whose gradients on the inputs are to be added.
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
        gradients, first = ctx.formula.backward(grad, kept, (), asked)
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


class RowOp(NamedTuple):
    """Operation on each row of the input of a linear layer.

    Attributes:
        kind: ``rms_norm``, ``layer_norm``, ``silu`` or ``swiglu``.
        weight, bias: of a norm.
        eps: of a norm; None stands for the machine precision of the inputs' type.
    """

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None


def apply_rows(x: Tensor, op: RowOp) -> Tensor:
    """The operation by torch: [..., d] to [..., d], of ``swiglu`` [..., 2 d] to [..., d]."""
    if not torch.jit.is_scripting():
        return _apply_rows(x, op)
    weight, eps = op.weight, op.eps
    if op.kind == "silu":
        return nn.functional.silu(x)
    if op.kind == "swiglu":
        return nn.functional.glu(x)
    assert weight is not None
    if op.kind == "layer_norm":
        assert eps is not None
        return nn.functional.layer_norm(x, [x.size(-1)], weight, op.bias, eps)
    return torch.rms_norm(x.to(weight.dtype), [x.size(-1)], weight, eps)


def _apply_rows(x: Tensor, op: RowOp) -> Tensor:
    if op.weight is None:
        return twice(Gate(op.kind), x)
    x = x.to(op.weight.dtype)  # torch's autocast has norms in float32
    eps = torch.finfo(x.dtype).eps if op.eps is None else op.eps
    if op.bias is None or op.kind == "rms_norm":
        return twice(Norm(op.kind, eps), x, op.weight)
    return twice(Norm(op.kind, eps), x, op.weight, op.bias)


class Gate(Formula):
    """``silu``, x sigmoid(x), or ``swiglu``, a sigmoid(x) of rows [..., a x].

    That is PET's convention (metatrain); arXiv:2002.05202 multiplies with the gate's SiLU.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.silu = kind, kind == "silu"

    def plain(self, *inputs: Tensor) -> Tensor:
        """See :class:`Formula`."""
        return nn.functional.silu(inputs[0]) if self.silu else nn.functional.glu(inputs[0])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """See :class:`Formula`."""
        return self.plain(*inputs), inputs

    def backward(
        self, grad: Tensor, kept: Gradients, waiting: Waiting, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        to_x = self._slopes(grad, cast("Tensors", kept)[0])
        for first, towards, s, a in waiting:
            slope = torch.addcmul(a, a, s, value=-2.0)  # a (1 - 2 s)
            if self.silu:
                curvature = torch.ops.aten.sigmoid_backward(slope.add_(2.0), s)
                to_x.addcmul_(curvature, towards * first)
                continue
            (of_a, of_x), (to_a, to_gate) = towards.chunk(2, dim=-1), to_x.chunk(2, dim=-1)
            of_s = torch.ops.aten.sigmoid_backward(first, s)
            to_a.addcmul_(of_x, of_s)
            to_gate.addcmul_(torch.addcmul(of_a, of_x, slope), of_s)
        return (to_x,), (grad,)

    def second(self, towards: Gradients, kept: Gradients, first: Gradients) -> tuple[Tensor, Any]:
        """See :class:`Formula`."""
        (v,), (x,) = cast("Tensors", towards), cast("Tensors", kept)
        if self.silu:
            return self._slopes(v, x), (first[0], v, torch.sigmoid(x), x)
        (of_a, of_x), (a, gate) = v.chunk(2, dim=-1), x.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        _, by_gate = self._slopes(of_x, x).chunk(2, dim=-1)
        return torch.addcmul(by_gate, of_a, s), (first[0], v, s, a)

    def _slopes(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.silu:
            return torch.ops.aten.silu_backward(grad, x)
        return torch.ops.aten.glu_backward(grad, x, -1)


class Norm(Formula):
    """``rms_norm`` or ``layer_norm`` of rows [..., d], with a weight and maybe a bias [d].

    Of a row less its mean, or as it is, n = x / r with r^2 = x x / d + eps. With h = w dy:

        t = (h - n (n h) / d) / r,  and of the cotangent v of t, p = (v - n (n v) / d) / r:
        to dy: w p,  to x: -(n (v t) + p (n h) + t (n v)) / (d r),  to w: sum of dy p.
    """

    def __init__(self, kind: str, eps: float) -> None:
        self.centered, self.eps = kind == "layer_norm", eps

    def plain(self, *inputs: Tensor) -> Tensor:
        """See :class:`Formula`."""
        x, weight, *bias = inputs
        shape = [x.size(-1)]
        if self.centered:
            return nn.functional.layer_norm(x, shape, weight, bias[0], self.eps)
        return torch.rms_norm(x, shape, weight, self.eps)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Gradients]:
        """See :class:`Formula`."""
        x, weight = self._part(inputs[0]), inputs[1]
        # The mean of squares and eps: one operation, as it is with a factor and a number.
        inverse = torch.rsub(row_dots(x, x), self.eps, alpha=-1.0 / x.size(-1)).rsqrt_()
        n = x * inverse
        out = n * weight if len(inputs) == 2 else torch.addcmul(inputs[2], n, weight)
        return out, (inverse, n, *inputs[1:])

    def backward(
        self, grad: Tensor, kept: Gradients, waiting: Waiting, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        inverse, n, weight, *_ = cast("Tensors", kept)
        h, per = self._part(grad * weight), -1.0 / n.size(-1)
        along, to_weight = None, _summed(grad * n) if asked[1] else None
        for *_, vt, of_weight, of_h in waiting:
            along = vt if along is None else along + vt
            if to_weight is not None and of_weight is not None:
                to_weight = to_weight + of_weight
            h = h if of_h is None else h + of_h
        along = row_dots(h, n, along)
        to_x = torch.addcmul(h, n, along, value=per)
        for p, t, nv, nh, *_ in waiting:
            to_x.addcmul_(p, nh, value=per).addcmul_(t, nv, value=per)
        to_x.mul_(inverse)
        to_bias = [_summed(grad) if needed else None for needed in asked[2:]]
        trains = weight.requires_grad
        return (to_x, to_weight, *to_bias), (to_x, along, grad if trains else None)

    def second(self, towards: Gradients, kept: Gradients, first: Gradients) -> tuple[Tensor, Any]:
        """See :class:`Formula`."""
        inverse, n, weight, *_ = cast("Tensors", kept)
        (t, nh, grad), (v, of_weight, *of_bias) = first, towards
        assert t is not None
        assert v is not None
        v = self._part(v)
        nv = row_dots(v, n)
        p = torch.addcmul(v, n, nv, value=-1.0 / n.size(-1)).mul_(inverse)
        to_grad, to_weight, to_h = p * weight, None, None
        if grad is not None:
            to_weight = _summed(grad * p)
            if of_weight is not None:
                to_grad.addcmul_(n, of_weight)
                to_h = self._part(grad * of_weight)
        for of in of_bias:
            to_grad = to_grad if of is None else to_grad + of
        return to_grad, (p, t, nv, nh, row_dots(v, t), to_weight, to_h)

    def _part(self, rows: Tensor) -> Tensor:
        """Rows less their mean, where the norm does that."""
        return rows - rows.mean(-1, keepdim=True) if self.centered else rows


#: Where products of rows are summed in two operations: a batched product is slower there.
_SUMMED = ["cpu"]
#: And from so many rows on, elsewhere too: then operations take longer than to start them.
_MANY_ROWS = 65536


def row_dots(one: Tensor, other: Tensor, plus: Tensor | None = None) -> Tensor:
    """Of each row the product with another one, [..., 1], and what is to be added to it."""
    device, width = one.device.type, one.size(-1)
    followed = type(one) not in (Tensor, nn.Parameter)  # for a compiler, which fuses sums
    if device in _SUMMED or followed or one.numel() >= _MANY_ROWS * width or autocasts(device):
        dots = (one * other).sum(-1, keepdim=True)
        return dots if plus is None else dots.add_(plus)
    left, right = one.reshape(-1, 1, width), other.reshape(-1, width, 1)
    if plus is None:
        return torch.bmm(left, right).view(*one.shape[:-1], 1)
    return torch.baddbmm(plus.view(-1, 1, 1), left, right).view_as(plus)


def autocasts(device: str) -> bool:
    """Whether torch chooses the type that products are computed in."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _summed(rows: Tensor) -> Tensor:
    """Over all rows, [d]."""
    return rows.flatten(0, -2).sum(0)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dim, *parts):  # type: ignore[no-untyped-def]
        ctx.dim, ctx.sizes = dim, [part.size(dim) for part in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, *grad.split(ctx.sizes, ctx.dim)


def join(parts: list[Tensor], dim: int) -> Tensor:
    """:func:`torch.cat`, whose second derivative adds up no slices in tensors of zeros."""
    if torch.jit.is_scripting():
        return torch.cat(parts, dim)
    out: Tensor = _Join.apply(dim, *parts)
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index), None, None


def permute_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``rows[index]`` for a permutation ``index`` of the rows with the given inverse, [n, ...]."""
    if torch.jit.is_scripting():  # placing a row has a gather as its gradient
        return torch.empty_like(rows).index_copy(0, inverse, rows)
    out: Tensor = _Permute.apply(rows, index, inverse)
    return out
