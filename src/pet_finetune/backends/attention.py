"""Attention within each atom's neighbourhood, by plain torch, in padded rectangles.

TorchScript compiles these functions where they are part of an exported network.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pet_finetune.graph import Layout, Rectangles

from .formula import Formula, Gradients, Tensors, Waiting, twice
from .reference import autocasts, row_dots


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, row_of_slot, slot_of_row, empty, fill=0.0):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_of_slot, slot_of_row, empty)
        # A mask, which a compiler makes part of whatever reads the rectangle next.
        mask = empty.view([-1] + [1] * (rows.dim() - 1))
        return rows.index_select(0, row_of_slot).masked_fill(mask, fill)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Unpad.apply(grad, *ctx.saved_tensors), None, None, None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, row_of_slot, slot_of_row, empty):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_of_slot, slot_of_row, empty)
        return padded.index_select(0, slot_of_row)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Pad.apply(grad, *ctx.saved_tensors), None, None, None


def pad_rows(rows: Tensor, where: Rectangles, fill: float = 0.0) -> Tensor:
    """Tokens [n_atoms + n_edges, ...] to [n_slots, ...], and what fills empty slots."""
    if torch.jit.is_scripting():
        room = rows.new_full([where.empty.size(0)] + list(rows.shape[1:]), fill)
        return room.index_copy(0, where.slot_of_token, rows)
    padded: Tensor = _Pad.apply(rows, where.token_of_slot, where.slot_of_token, where.empty, fill)
    return padded


def unpad_rows(padded: Tensor, where: Rectangles) -> Tensor:
    """The adjoint of :func:`pad_rows`: empty slots are dropped."""
    if torch.jit.is_scripting():
        return padded.index_select(0, where.slot_of_token)
    out: Tensor = _Unpad.apply(padded, where.token_of_slot, where.slot_of_token, where.empty)
    return out


def pad_keys(logarithms: Tensor, layout: Layout) -> Tensor:
    """Bias of the scores of each key, in the form of :func:`attend`.

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
    return pad_rows(torch.cat([of_centers, logarithms]), where, -torch.inf)


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
        if qkv.dtype == bias.dtype and not autocasts(qkv.device.type):
            return twice(Attention(where, heads, scale), qkv, bias)
    return _attend(qkv, where, bias, heads, scale)


def _attend(qkv: Tensor, where: Rectangles, bias: Tensor, heads: int, scale: float) -> Tensor:
    """:func:`attend`, with derivatives by autograd."""
    mixed: list[Tensor] = []
    for queries, keys, values, own in _by_heads(qkv, where, bias, heads):
        scores = torch.matmul(queries * scale, keys.transpose(-2, -1)) + own
        mixed.append(torch.matmul(scores.softmax(dim=-1), values).transpose(1, 2).flatten(2))
    return _joined(mixed, where)


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
    """Queries, keys and values of each rectangle, [atoms, heads, slots, d], and the keys' bias."""
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
    """Collect the tokens [n_atoms + n_edges, width] from rectangles [atoms, slots, width]."""
    return unpad_rows(torch.cat([part.flatten(0, 1) for part in mixed]), where)


class Attention(Formula):
    """:func:`attend`, of queries, keys and values in one array and of the keys' bias.

    In a rectangle of one head, with scores S = s Q K^T + b, P = softmax(S) with zeros in empty
    rows, O = P V, D = dO V^T less its mean under P in each row, and G = P * D:

        dQ = s G K,  dK = s G^T Q,  dV = P^T dO,  db = G^T 1.

    Of cotangents q, k, v, b of those four, with W = s (q K^T + Q k^T) + 1 b^T, less its mean
    under P: E = P * W, Y = D * W + dO v^T, H = P * (Y less its mean under P),

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
        return _attend(qkv, self.where, bias, self.heads, self.scale)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """See :class:`Formula`."""
        qkv, bias = inputs
        mixed, kept = [], []
        empties = (empty for _, empty in self._with(self.where.empty))
        for (slots, own), empty in zip(self._with(bias), empties, strict=True):
            taken = self._taken(qkv, slots, 3)
            q, k, v = taken
            scores = self._square(torch.bmm(q, k.mT), slots)
            weights = torch.add(own, scores, alpha=self.scale).softmax(-1)
            weights = weights.masked_fill(empty.mT, 0.0).flatten(0, 1)
            mixed.append(torch.bmm(weights, v))
            kept += [taken, weights]
        return self._tokens(mixed), kept

    def backward(
        self, grad: Tensor, kept: Gradients, waiting: Waiting | None, asked: Sequence[bool]
    ) -> tuple[Gradients, Gradients]:
        """See :class:`Formula`."""
        kept = cast("Tensors", kept)
        to_qkv, to_bias, first = [], [], []
        for number, slots in enumerate(self.where.slots):
            (q, k, v), p = kept[2 * number : 2 * number + 2]
            g = self._taken(grad, slots, 1)[0]
            lefts = [left[number] for left in waiting or ()]
            # In place wherever the numbers are ours: a GPU copies what is added to a product first.
            to_parts = torch.empty_like(kept[2 * number])
            # One by one: compiling fixes sizes where parts that unpacking gives are written to.
            to_q, to_k, to_v = to_parts[0], to_parts[1], to_parts[2]
            to_v.baddbmm_(p.mT, g, beta=0.0)
            d = None
            for _, _, _, y, e, g1 in lefts:
                to_v.baddbmm_(e.mT, g1)
                d = y if d is None else d.add_(y)
            d = torch.bmm(g, v.mT) if d is None else d.baddbmm_(g, v.mT)
            if waiting is None:
                d -= row_dots(d, p)
                to_scores = p * d
                first += [g, d, to_scores]
            else:
                to_scores = torch._softmax_backward_data(d, p, -1, d.dtype)
            to_q.baddbmm_(to_scores, k, beta=0.0, alpha=self.scale)
            to_k.baddbmm_(to_scores.mT, q, beta=0.0, alpha=self.scale)
            for s, cq, ck, *_ in lefts:
                to_q.baddbmm_(s, ck, alpha=self.scale)
                to_k.baddbmm_(s.mT, cq, alpha=self.scale)
            to_qkv.append(to_parts)
            if asked[1]:
                to_bias.append(self._square(to_scores, slots).sum((0, 2)).flatten())
        return (self._tokens(to_qkv), _flat(to_bias) if asked[1] else None), first

    def second(self, towards: Gradients, kept: Gradients, first: Gradients) -> tuple[Tensor, Any]:
        """See :class:`Formula`."""
        (to_qkv, to_bias), kept = towards, cast("Tensors", kept)
        assert to_qkv is not None
        if to_bias is None:
            to_bias = to_qkv.new_zeros(self.where.empty.shape)
        of_grad: list[Tensor] = []
        left: list[Tensors] = []
        for number, (slots, cb) in enumerate(self._with(to_bias)):
            (q, k, v), p = kept[2 * number : 2 * number + 2]
            g, d, to_scores = cast("Tensors", first[3 * number : 3 * number + 3])
            cq, ck, cv = self._taken(to_qkv, slots, 3)
            products = self._square(torch.bmm(cq, k.mT).baddbmm_(q, ck.mT), slots)
            w = torch.add(cb, products, alpha=self.scale).flatten(0, 1)
            w -= row_dots(w, p)
            e = p * w
            of_grad.append(torch.bmm(p, cv).baddbmm_(e, v))
            y = w.mul_(d).baddbmm_(g, cv.mT)
            left.append((to_scores, cq, ck, y, e, g))
        return self._tokens(of_grad), left

    def _with(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each rectangle's slots, and its part of [n_slots] numbers as [atoms, 1, slots]."""
        sizes = [slots.numel() for slots in self.where.slots]
        for slots, own in zip(self.where.slots, flat.split(sizes), strict=True):
            yield slots, own.view(slots.size(0), 1, slots.size(1))

    def _taken(self, rows: Tensor, slots: Tensor, parts: int) -> Tensor:
        """Tokens in their slots: [parts, heads * atoms, slots, d]."""
        columns = parts * self.heads
        # Written out: -1 for the last would be ambiguous where there are no atoms.
        split = rows.view(rows.size(0), columns, rows.size(1) // columns).transpose(0, 1)
        atoms, width = slots.shape
        taken = split.index_select(1, slots.flatten())
        return taken.view(parts, self.heads * atoms, width, split.size(2))

    def _tokens(self, parts: list[Tensor]) -> Tensor:
        """The opposite of :meth:`_taken`; of each rectangle one array."""
        columns = self.heads * (len(parts[0]) if parts[0].dim() == 4 else 1)
        rows = [p.view(columns, -1, p.size(-1)) for p in parts]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return joined.transpose(0, 1).index_select(0, self.where.slot_of_token).flatten(1)

    def _square(self, scores: Tensor, slots: Tensor) -> Tensor:
        """[heads * atoms, slots, slots] as [heads, atoms, slots, slots]."""
        return scores.view(self.heads, slots.size(0), *scores.shape[1:])


def _flat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
