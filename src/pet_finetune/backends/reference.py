"""The network's operators by plain torch, which computes where nothing else can.

TorchScript compiles these functions where they are part of an exported network.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible. Where
each row goes to exactly one place, the gradient is another gather. Both cases of PET are of that
kind: turning edges around, and laying tokens out in padded rectangles (:mod:`.attention`).

Norms, gates, attention and products with weights that train have a first and a second derivative
of their own (:mod:`.formula`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .formula import Formula, Gradients, Tensors, Waiting, twice


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
    norm = (RowNorm if _has_kernels(x) else Norm)(op.kind, eps)
    if op.bias is None or op.kind == "rms_norm":
        return twice(norm, x, op.weight)
    return twice(norm, x, op.weight, op.bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear` with a weight that trains."""
    if x.dim() != 2 or not weight.requires_grad or autocasts(x.device.type):
        return nn.functional.linear(x, weight, bias)
    return twice(Product(), x, weight) if bias is None else twice(Product(), x, weight, bias)


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
        self, grad: Tensor, kept: Gradients, waiting: Waiting | None, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        to_x = self._slopes(grad, cast("Tensors", kept)[0])
        for first, towards, s, a in waiting or ():
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
        self, grad: Tensor, kept: Gradients, waiting: Waiting | None, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        inverse, n, weight, *_ = cast("Tensors", kept)
        h, per = self._part(grad * weight), -1.0 / n.size(-1)
        to_weight = _summed(grad * n) if asked[1] else None
        for *_, of_weight, of_h in waiting or ():
            if to_weight is not None and of_weight is not None:
                to_weight += of_weight
            h = h if of_h is None else h + of_h
        along = row_dots(h, n)
        for *_, vt, _, _ in waiting or ():
            along += vt
        to_x = torch.addcmul(h, n, along, value=per)
        for p, t, nv, nh, *_ in waiting or ():
            to_x.addcmul_(p, nh, value=per).addcmul_(t, nv, value=per)
        to_x.mul_(inverse)
        to_bias = [_summed(grad) if needed else None for needed in asked[2:]]
        trains = weight.requires_grad
        return (to_x, to_weight, *to_bias), (to_x, along, grad if trains else None)

    def second(self, towards: Gradients, kept: Gradients, first: Gradients) -> tuple[Tensor, Any]:
        """See :class:`Formula`."""
        (t, nh, grad), (v, of_weight, *of_bias) = first, towards
        assert t is not None
        assert v is not None
        p, n, nv = self._of_cotangent(v, cast("Tensors", kept))
        to_grad, to_weight, to_h = p * cast("Tensor", kept[2]), None, None
        if grad is not None:
            to_weight = _summed(grad * p)
            if of_weight is not None:
                to_grad.addcmul_(self._unit(n, cast("Tensors", kept)), of_weight)
                to_h = self._part(grad * of_weight)
        for of in of_bias:
            to_grad = to_grad if of is None else to_grad + of
        return to_grad, (p, t, nv, nh, row_dots(v, t), to_weight, to_h)

    def _of_cotangent(self, v: Tensor, kept: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """What are called p, n and n v above."""
        inverse, n, *_ = kept
        v = self._part(v)
        nv = row_dots(v, n)
        return torch.addcmul(v, n, nv, value=-1.0 / n.size(-1)).mul_(inverse), n, nv

    def _unit(self, n: Tensor, kept: Tensors) -> Tensor:
        """The rows n, made of what :meth:`_of_cotangent` gives in their place."""
        return n

    def _part(self, rows: Tensor) -> Tensor:
        """Rows less their mean, where the norm does that."""
        return rows - rows.mean(-1, keepdim=True) if self.centered else rows


class RowNorm(Norm):
    """:class:`Norm` by torch's kernels for whole rows, each of which is started once on a GPU.

    In place of n it has c, which is x, or x less its mean; n = c / r.
    """

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Gradients]:
        """See :class:`Formula`."""
        x, weight, *bias = inputs
        if self.centered:
            out, mean, inverse = torch.native_layer_norm(x, [x.size(-1)], weight, bias[0], self.eps)
            return out, (inverse, x, weight, mean)
        out, inverse = torch._fused_rms_norm(x, [x.size(-1)], weight, self.eps)
        return out, (inverse, x, weight)

    def backward(
        self, grad: Tensor, kept: Gradients, waiting: Waiting | None, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        inverse, x, weight, *_ = kept = cast("Tensors", kept)
        to_x, to_weight = self._slopes(grad, kept, weight, asked[1])
        for p, t, cv, ch, vt, of_weight, of_h in waiting or ():
            turned = (self._c(kept) * vt).addcmul_(p, ch).addcmul_(t, cv)
            to_x.addcmul_(turned, inverse.square(), value=-1.0 / x.size(-1))
            if of_h is not None:
                to_x += self._slopes(of_h, kept)[0]
            if to_weight is not None and of_weight is not None:
                to_weight += of_weight
        to_bias = [_summed(grad) if needed else None for needed in asked[2:]]
        first: Gradients = ()
        if waiting is None:
            ch = row_dots(self._c(kept), grad * weight)
            first = to_x, ch, grad if weight.requires_grad else None
        return (to_x, to_weight, *to_bias), first

    def _of_cotangent(self, v: Tensor, kept: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        c = self._c(kept)
        return self._slopes(v, kept)[0], c, row_dots(c, v)

    def _unit(self, n: Tensor, kept: Tensors) -> Tensor:
        return n * kept[0]

    def _c(self, kept: Tensors) -> Tensor:
        return kept[1] - kept[3] if self.centered else kept[1]

    def _slopes(
        self, grad: Tensor, kept: Tensors, weight: Tensor | None = None, trains: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the rows and, if it trains, of the weight, or with none of it."""
        inverse, x, _, *mean = kept
        shape = [x.size(-1)]
        if self.centered:
            found = torch.ops.aten.native_layer_norm_backward(
                grad, x, shape, *mean, inverse, weight, None, [True, trains, False]
            )
        else:
            found = torch.ops.aten._fused_rms_norm_backward(
                grad, x, shape, inverse, weight, [True, trains]
            )
        return found[0], found[1] if trains else None


def _has_kernels(x: Tensor) -> bool:
    """Whether torch has those of :class:`RowNorm`: for GPUs from 2.9 on."""
    kind = x.device.type
    if kind in _SUMMED or type(x) not in (Tensor, nn.Parameter):  # a compiler makes its own
        return False
    key = "Meta" if kind == "meta" else kind.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm_backward", key)


class Product(Formula):
    """``x W^T + b`` of rows x [n, in], a weight W [out, in] and maybe a bias b [out].

    Both parts of the weight's gradient, of which one is known with the second derivative, are added
    up by the product that makes the other.
    """

    def plain(self, *inputs: Tensor) -> Tensor:
        """See :class:`Formula`."""
        return nn.functional.linear(*inputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """See :class:`Formula`."""
        return self.plain(*inputs), inputs[:2]

    def backward(
        self, grad: Tensor, kept: Gradients, waiting: Waiting | None, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        x, weight = cast("Tensors", kept)
        to_x = torch.mm(grad, weight) if asked[0] else None
        to_weight = None
        for partial, of_weight in waiting or ():
            if to_x is not None and of_weight is not None:
                to_x.addmm_(*of_weight)
            to_weight = partial if to_weight is None else to_weight.add_(partial)
        if asked[1]:
            own = grad.mT, x
            to_weight = torch.mm(*own) if to_weight is None else to_weight.addmm_(*own)
        to_bias = [_summed(grad) if needed else None for needed in asked[2:]]
        return (to_x, to_weight if asked[1] else None, *to_bias), (grad,)

    def second(self, towards: Gradients, kept: Gradients, first: Gradients) -> tuple[Tensor, Any]:
        """See :class:`Formula`."""
        (v, of_weight, *of_bias), (x, weight) = towards, cast("Tensors", kept)
        (grad,) = cast("Tensors", first)
        assert v is not None
        to_grad = torch.mm(v, weight.mT)
        if of_weight is not None:
            to_grad.addmm_(x, of_weight.mT)
        for of in of_bias:
            to_grad = to_grad if of is None else to_grad + of
        partial = torch.mm(grad.mT, v) if weight.requires_grad else None
        return to_grad, (partial, None if of_weight is None else (grad, of_weight))


#: Where products of rows are summed in two operations: a batched product is slower there.
_SUMMED = ["cpu"]
#: And from so many rows on, elsewhere too: then operations take longer than to start them.
_MANY_ROWS = 65536


def row_dots(one: Tensor, other: Tensor) -> Tensor:
    """Of each row the product with another one, [..., 1]."""
    device, width = one.device.type, one.size(-1)
    followed = type(one) not in (Tensor, nn.Parameter)  # for a compiler, which fuses sums
    if device in _SUMMED or followed or one.numel() >= _MANY_ROWS * width or autocasts(device):
        return (one * other).sum(-1, keepdim=True)
    left, right = one.reshape(-1, 1, width), other.reshape(-1, width, 1)
    return torch.bmm(left, right).view(*one.shape[:-1], 1)


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
