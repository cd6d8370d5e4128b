"""The network's operators by plain torch: what they mean, and what computes where nothing else can.

TorchScript compiles these functions where they are part of an exported network.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible.
Where each row goes to exactly one place, the gradient is another gather. Both cases of PET are
of that kind: turning edges around, and laying tokens out in padded rectangles (:mod:`.attention`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .twice import Formula, Gradients, Tensors, twice

__all__ = ["Gate", "Norm", "RowOp", "apply_rows", "join", "permute_rows"]


class RowOp(NamedTuple):
    """What is done to each row of the input of a linear layer.

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
        return self.plain(*inputs), ()

    def backward(self, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        if self.silu:
            return (torch.ops.aten.silu_backward(grad, inputs[0]),)
        return (torch.ops.aten.glu_backward(grad, inputs[0], -1),)

    def second(self, towards: Gradients, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        (towards_x,) = towards
        assert towards_x is not None
        a, x = (inputs[0], inputs[0]) if self.silu else inputs[0].chunk(2, dim=-1)
        s = torch.sigmoid(x)
        slope = torch.addcmul(a, a, s, value=-2.0)  # a (1 - 2 s)
        if self.silu:
            to_grad = torch.ops.aten.silu_backward(towards_x, x)
            curvature = slope.add_(2.0).mul_(towards_x).mul_(grad)
            return to_grad, torch.ops.aten.sigmoid_backward(curvature, s)
        of_a, of_x = towards_x.chunk(2, dim=-1)
        to_grad = torch.addcmul(of_a, of_x, torch.addcmul(a, a, s, value=-1.0)).mul_(s)
        both = torch.stack([of_x, torch.addcmul(of_a, of_x, slope)], dim=-2)
        of_s = torch.ops.aten.sigmoid_backward(grad, s)
        return to_grad, both.mul_(of_s.unsqueeze(-2)).flatten(-2)


class Norm(Formula):
    """``rms_norm`` or ``layer_norm`` of rows [..., d], with a weight and maybe a bias [d]."""

    def __init__(self, kind: str, eps: float) -> None:
        self.centered, self.eps = kind == "layer_norm", eps

    def plain(self, *inputs: Tensor) -> Tensor:
        """See :class:`Formula`."""
        x, weight, *bias = inputs
        shape = [x.size(-1)]
        if self.centered:
            return nn.functional.layer_norm(x, shape, weight, bias[0], self.eps)
        return torch.rms_norm(x, shape, weight, self.eps)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """See :class:`Formula`."""
        x = self._part(inputs[0])
        square = x.square().mean(-1, keepdim=True).add_(self.eps)
        inverse = square.rsqrt()
        n = x * inverse
        out = n * inputs[1] if len(inputs) == 2 else torch.addcmul(inputs[2], n, inputs[1])
        return out, (inverse, n, square)

    def backward(self, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        inverse, n, _ = kept
        h = self._part(grad * inputs[1])
        to_x = _across(h, n, _mean(h, n)).mul_(inverse)
        trained = zip(inputs[1:], (n, None), strict=False)
        return to_x, *[_summed(grad, factor) if w.requires_grad else None for w, factor in trained]

    def second(self, towards: Gradients, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        (inverse, n, square), weight = kept, inputs[1]
        assert towards[0] is not None
        v, h = self._part(towards[0]), self._part(grad * weight)
        of_grad, of_v, both = _mean(h, n), _mean(v, n), _mean(v, h)
        to_h = _across(v, n, of_v).mul_(inverse)
        to_n = n * torch.addcmul(both, of_grad, of_v, value=-3.0)
        to_n.addcmul_(v, of_grad).addcmul_(h, of_v)
        to_x, to_grad, to_weight = to_n.div_(square.neg()), to_h * weight, None
        if weight.requires_grad:  # then what it adds to the gradient depends on both, too
            to_weight = _summed(grad, to_h)
            if (u := towards[1]) is not None:
                to_grad = to_grad.addcmul_(n, u)
                h = self._part(grad * u)
                to_x = to_x.addcmul_(_across(h, n, _mean(h, n)), inverse)
        if len(inputs) == 2:
            return to_grad, to_x, to_weight
        if inputs[2].requires_grad and (u := towards[2]) is not None:
            to_grad = to_grad + u
        return to_grad, to_x, to_weight, None

    def _part(self, rows: Tensor) -> Tensor:
        """Rows less their mean, where the norm does that."""
        return rows - rows.mean(-1, keepdim=True) if self.centered else rows


def _mean(one: Tensor, other: Tensor) -> Tensor:
    """Of the products of two rows, [..., 1]."""
    return (one * other).mean(-1, keepdim=True)


def _across(rows: Tensor, n: Tensor, along: Tensor) -> Tensor:
    """What is left of rows when their part along ``n`` is taken out."""
    return torch.addcmul(rows, n, along, value=-1.0)


def _summed(rows: Tensor, factor: Tensor | None) -> Tensor:
    """Over all rows, [d]."""
    return (rows if factor is None else rows * factor).flatten(0, -2).sum(0)


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
