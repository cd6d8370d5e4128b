"""The network's operators by plain torch: what they mean, and what computes where nothing else can.

TorchScript compiles these functions where they are part of an exported network.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible.
Where each row goes to exactly one place, the gradient is another gather. Both cases of PET are
of that kind: turning edges around, and laying tokens out in a padded rectangle.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pet_finetune.graph import Layout, Rectangles

from .twice import Formula, Gradients, Tensors, twice

__all__ = [
    "RowOp",
    "apply_rows",
    "attend",
    "attend_once",
    "pad_keys",
    "pad_rows",
    "permute_rows",
    "unpad_rows",
]


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
        both = torch.cat([of_x, torch.addcmul(of_a, of_x, slope)], dim=-1)
        return to_grad, torch.ops.aten.sigmoid_backward(both.mul_(_double(grad)), _double(s))


def _double(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows], dim=-1)


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
        inverse = x.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        n = x * inverse
        out = n * inputs[1] if len(inputs) == 2 else torch.addcmul(inputs[2], n, inputs[1])
        return out, (inverse, n)

    def backward(self, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        inverse, n = kept
        h = self._part(grad * inputs[1])
        to_x = _across(h, n, _mean(h, n)).mul_(inverse)
        trained = zip(inputs[1:], (n, None), strict=False)
        return to_x, *[_summed(grad, factor) if w.requires_grad else None for w, factor in trained]

    def second(self, towards: Gradients, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        (inverse, n), weight = kept, inputs[1]
        assert towards[0] is not None
        v, h = self._part(towards[0]), self._part(grad * weight)
        of_grad, of_v, both = _mean(h, n), _mean(v, n), _mean(v, h)
        to_h = _across(v, n, of_v).mul_(inverse)
        to_n = n * torch.addcmul(both, of_grad, of_v, value=-3.0)
        to_n.addcmul_(v, of_grad).addcmul_(h, of_v)
        to_x, to_grad, to_weight = to_n.mul_(inverse.square()).neg_(), to_h * weight, None
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


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index), None, None


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, row_of_slot, slot_of_row, empty):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_of_slot, slot_of_row, empty)
        # A mask, which a compiler makes part of whatever reads the rectangle next.
        mask = empty.view([-1] + [1] * (rows.dim() - 1))
        return rows.index_select(0, row_of_slot).masked_fill(mask, 0.0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Unpad.apply(grad, *ctx.saved_tensors), None, None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, row_of_slot, slot_of_row, empty):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_of_slot, slot_of_row, empty)
        return padded.index_select(0, slot_of_row)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Pad.apply(grad, *ctx.saved_tensors), None, None, None


def permute_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``rows[index]`` for a permutation ``index`` of the rows with the given inverse, [n, ...]."""
    if torch.jit.is_scripting():  # placing a row has a gather as its gradient
        return torch.empty_like(rows).index_copy(0, inverse, rows)
    out: Tensor = _Permute.apply(rows, index, inverse)
    return out


def pad_rows(rows: Tensor, where: Rectangles) -> Tensor:
    """Tokens [n_atoms + n_edges, ...] to [n_slots, ...], zeros in empty slots."""
    if torch.jit.is_scripting():
        room = rows.new_zeros([where.empty.size(0)] + list(rows.shape[1:]))
        return room.index_copy(0, where.slot_of_token, rows)
    padded: Tensor = _Pad.apply(rows, where.token_of_slot, where.slot_of_token, where.empty)
    return padded


def unpad_rows(padded: Tensor, where: Rectangles) -> Tensor:
    """The adjoint of :func:`pad_rows`: empty slots are dropped."""
    if torch.jit.is_scripting():
        return padded.index_select(0, where.slot_of_token)
    out: Tensor = _Unpad.apply(padded, where.token_of_slot, where.slot_of_token, where.empty)
    return out


def pad_keys(logarithms: Tensor, layout: Layout) -> Tensor:
    """What is added to the scores of each key, as :func:`attend` takes it.

    Args:
        logarithms: [n_edges], of the edges; the centres' are 0.
        layout: with rectangles.

    Returns:
        [n_slots], with minus infinity in empty slots, so that nothing of a structure depends on
        what else is in its batch.
    """
    where = layout.rectangles
    assert where is not None
    of_centers = logarithms.new_zeros(layout.starts.size(0) - 1)
    padded = pad_rows(torch.cat([of_centers, logarithms]), where)
    return padded.masked_fill(where.empty, -torch.inf)


def attend(qkv: Tensor, where: Rectangles, bias: Tensor, heads: int, scale: float) -> Tensor:
    """Softmax attention within each neighbourhood, by plain torch.

    Plain matrix products and a softmax, because training on forces differentiates twice and
    torch's fused attention does not.

    Args:
        qkv: [n_atoms + n_edges, 3 * width], centre tokens first.
        where: rectangles of the layout.
        bias: from :func:`pad_keys`.
        heads: number of heads.
        scale: of the scores.

    Returns:
        [n_atoms + n_edges, width].
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles both parts of `and`
        if qkv.dtype == bias.dtype and not _autocasts(qkv.device.type):
            return twice(Attention(where, heads, scale), qkv, bias)
    mixed: list[Tensor] = []
    for queries, keys, values, own in _by_heads(qkv, where, bias, heads):
        scores = torch.matmul(queries * scale, keys.transpose(-2, -1)) + own
        mixed.append(torch.matmul(scores.softmax(dim=-1), values).transpose(1, 2).flatten(2))
    return _joined(mixed, where)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def attend_once(
    qkv: Tensor,
    where: Rectangles,
    bias: Tensor,
    heads: int,
    scale: float,
    most_atoms: int = 65535,
) -> Tensor:
    """:func:`attend` by torch's fused attention, which can be differentiated once.

    A mask that depends on positions would rule out its fastest kernels. So what is added to the
    scores of a key is one more column of the keys, with ones in the queries.

    Args:
        qkv: as for :func:`attend`.
        where: as for :func:`attend`.
        bias: as for :func:`attend`.
        heads: as for :func:`attend`.
        scale: as for :func:`attend`.
        most_atoms: in one call; on a GPU the derivative fails beyond.
    """
    mixed: list[Tensor] = []
    for queries, keys, values, own in _by_heads(qkv, where, bias, heads):
        width = values.size(3)
        more = 8 - width % 8  # columns, the first of them for the bias: kernels like multiples of 8
        # Empty slots have minus infinity, which would make NaN of the zeros in their rows.
        column = (own.clamp_min(-1e4) / scale).transpose(2, 3).expand(-1, heads, -1, 1)
        room = [queries.size(0), heads, queries.size(2), more - 1]
        zeros, ones = queries.new_zeros(room), torch.ones_like(queries[..., :1])
        queries = torch.cat([queries, ones, zeros], dim=-1)
        keys = torch.cat([keys, column, zeros], dim=-1)
        values = nn.functional.pad(values, [0, more])
        parts: list[Tensor] = []
        for q, k, v in zip(  # noqa: B905 - TorchScript knows no strict
            queries.split(most_atoms), keys.split(most_atoms), values.split(most_atoms)
        ):
            parts.append(nn.functional.scaled_dot_product_attention(q, k, v, scale=scale))
        mixed.append(torch.cat(parts)[..., :width].transpose(1, 2).flatten(2))
    return _joined(mixed, where)


def _by_heads(
    qkv: Tensor, where: Rectangles, bias: Tensor, heads: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each rectangle queries, keys and values, [atoms, heads, slots, d], and the keys' bias."""
    sizes = [slots.numel() for slots in where.slots]
    padded = pad_rows(qkv, where).split(sizes)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for slots, rows, own in zip(where.slots, padded, bias.split(sizes)):  # noqa: B905
        atoms, width = slots.shape
        # Written out: -1 for the last would be ambiguous where there are no atoms.
        split = rows.view(atoms, width, 3, heads, qkv.size(1) // (3 * heads)).permute(2, 0, 3, 1, 4)
        parts.append((split[0], split[1], split[2], own.view(atoms, 1, 1, width)))
    return parts


def _joined(mixed: list[Tensor], where: Rectangles) -> Tensor:
    """Of rectangles [atoms, slots, width] the tokens, [n_atoms + n_edges, width]."""
    return unpad_rows(torch.cat([part.flatten(0, 1) for part in mixed]), where)


class Attention(Formula):
    """:func:`attend`, of queries, keys and values in one array and of the keys' bias.

    In a rectangle of one head, with scores S = s Q K^T + b, P = softmax(S), O = P V and D = dO V^T:

        G = P * (D - rowsum(P * D)),  dQ = s G K,  dK = s G^T Q,  dV = P^T dO,  db = G^T 1.

    Of cotangents q, k, v, b of those four, with W = s (q K^T + Q k^T) + 1 b^T, centred by its mean
    under P: E = P * W, Y = W * G + P * (dO v^T), H = Y - P * rowsum(Y),

        to dO: P v + E V,  to Q: s (G k + H K),  to K: s (G^T q + H^T Q),
        to V: E^T dO,  to b: H^T 1.

    What is in empty slots of queries, keys and values reaches nothing that is read.

    Args:
        where: rectangles of the layout.
        heads: number of heads.
        scale: s.
    """

    def __init__(self, where: Rectangles, heads: int, scale: float) -> None:
        self.where, self.heads, self.scale = where, heads, scale

    def plain(self, *inputs: Tensor) -> Tensor:
        """See :class:`Formula`."""
        qkv, bias = inputs
        mixed = []
        for queries, keys, values, own in _by_heads(qkv, self.where, bias, self.heads):
            scores = torch.matmul(queries * self.scale, keys.mT) + own
            mixed.append(torch.matmul(scores.softmax(dim=-1), values).transpose(1, 2).flatten(2))
        return _joined(mixed, self.where)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """See :class:`Formula`."""
        qkv, bias = inputs
        mixed, kept = [], []
        for slots, own in self._with(bias):
            q, k, v = self._taken(qkv, slots, 3)
            scores = self._square(torch.bmm(q, k.mT), slots)
            weights = torch.add(own, scores, alpha=self.scale).softmax(-1)
            mixed.append(torch.bmm(weights.flatten(0, 1), v))
            kept.append(weights)
        return self._tokens([[part] for part in mixed]), kept

    def backward(self, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        qkv, _ = inputs
        to_qkv, to_bias = [], []
        for (slots, empty), weights in zip(self._with(self.where.empty), kept, strict=True):
            (q, k, v), p = self._taken(qkv, slots, 3), weights.flatten(0, 1)
            g = self._gradient(grad, slots, empty)
            to_scores = _of_scores(torch.bmm(g, v.mT), p)
            scaled = to_scores * self.scale
            to_qkv.append([torch.bmm(scaled, k), torch.bmm(scaled.mT, q), torch.bmm(p.mT, g)])
            to_bias.append(self._of_keys(to_scores, slots))
        return self._tokens(to_qkv), torch.cat(to_bias)

    def second(self, towards: Gradients, grad: Tensor, inputs: Tensors, kept: Tensors) -> Gradients:
        """See :class:`Formula`."""
        (qkv, _), (to_qkv, to_bias) = inputs, towards
        assert to_qkv is not None
        assert to_bias is not None
        of_grad, of_qkv, of_bias = [], [], []
        empties = (empty for _, empty in self._with(self.where.empty))
        for (slots, cb), empty, weights in zip(self._with(to_bias), empties, kept, strict=True):
            (q, k, v), p = self._taken(qkv, slots, 3), weights.flatten(0, 1)
            cq, ck, cv = self._taken(to_qkv, slots, 3)
            g = self._gradient(grad, slots, empty)
            to_scores = _of_scores(torch.bmm(g, v.mT), p)
            products = self._square(torch.baddbmm(torch.bmm(cq, k.mT), q, ck.mT), slots)
            w = torch.add(cb, products, alpha=self.scale).flatten(0, 1)
            w = w - (p * w).sum(-1, keepdim=True)
            e = p * w
            y = (p * torch.bmm(g, cv.mT)).addcmul_(w, to_scores)
            h = torch.addcmul(y, p, y.sum(-1, keepdim=True), value=-1.0)
            of_grad.append([torch.baddbmm(torch.bmm(p, cv), e, v)])
            of_bias.append(self._of_keys(h, slots))
            h, scaled = h * self.scale, to_scores * self.scale
            of_q = torch.baddbmm(torch.bmm(scaled, ck), h, k)
            of_k = torch.baddbmm(torch.bmm(scaled.mT, cq), h.mT, q)
            of_qkv.append([of_q, of_k, torch.bmm(e.mT, g)])
        return self._tokens(of_grad), self._tokens(of_qkv), torch.cat(of_bias)

    def _with(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each rectangle's slots, and its part of [n_slots] numbers as [atoms, 1, slots]."""
        sizes = [slots.numel() for slots in self.where.slots]
        for slots, own in zip(self.where.slots, flat.split(sizes), strict=True):
            yield slots, own.view(slots.size(0), 1, slots.size(1))

    def _taken(self, rows: Tensor, slots: Tensor, parts: int) -> Tensor:
        """Tokens in their slots: [parts, heads * atoms, slots, d]."""
        split = rows.view(rows.size(0), parts * self.heads, -1).transpose(0, 1)
        atoms, width = slots.shape
        taken = split.index_select(1, slots.flatten())
        return taken.view(parts, self.heads * atoms, width, split.size(2))

    def _gradient(self, grad: Tensor, slots: Tensor, empty: Tensor) -> Tensor:
        """The gradient of the output, zero in empty slots."""
        (taken,) = self._taken(grad, slots, 1)
        of_heads = taken.view(self.heads, *slots.shape, -1)
        return of_heads.masked_fill(empty.mT, 0.0).flatten(0, 1)

    def _tokens(self, parts: list[list[Tensor]]) -> Tensor:
        """The opposite of :meth:`_taken`; of each rectangle one array for each part."""
        rows = [
            (torch.stack(p) if len(p) > 1 else p[0]).view(len(p) * self.heads, -1, p[0].size(2))
            for p in parts
        ]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return joined.transpose(0, 1).index_select(0, self.where.slot_of_token).flatten(1)

    def _square(self, scores: Tensor, slots: Tensor) -> Tensor:
        """[heads * atoms, slots, slots] as [heads, atoms, slots, slots]."""
        return scores.view(self.heads, slots.size(0), *scores.shape[1:])

    def _of_keys(self, scores: Tensor, slots: Tensor) -> Tensor:
        """The sum over heads and queries, [atoms * slots]."""
        return self._square(scores, slots).sum((0, 2)).flatten()


def _of_scores(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of scores, of that of their softmax."""
    return torch._softmax_backward_data(grad, weights, -1, grad.dtype)
