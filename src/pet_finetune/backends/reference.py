"""The network's operators by plain torch: what they mean, and what computes where nothing else can.

TorchScript compiles these functions where they are part of an exported network.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible.
Where each row goes to exactly one place, the gradient is another gather. Both cases of PET are
of that kind: turning edges around, and laying tokens out in a padded rectangle.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pet_finetune.graph import Layout, Rectangle

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
    if op.kind == "silu":
        return nn.functional.silu(x)
    if op.kind == "swiglu":
        # PET's convention (metatrain); arXiv:2002.05202 multiplies with the gate's SiLU.
        value, gate = x.chunk(2, dim=-1)
        return value * torch.sigmoid(gate)
    if op.kind == "layer_norm":
        eps = op.eps
        assert eps is not None
        return nn.functional.layer_norm(x, [x.size(-1)], op.weight, op.bias, eps)
    weight = op.weight
    assert weight is not None
    # Torch's autocast knows LayerNorm as a thing to compute in float32, but not this one.
    x = x.to(weight.dtype)
    return torch.rms_norm(x, [x.size(-1)], weight, op.eps)


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


def pad_rows(rows: Tensor, rectangle: Rectangle) -> Tensor:
    """Tokens [n_atoms + n_edges, ...] to [n_atoms, width, ...], zeros in empty slots."""
    slots = rectangle.token_of_slot
    shape = list(slots.shape) + list(rows.shape[1:])
    if torch.jit.is_scripting():
        room = rows.new_zeros([slots.numel()] + list(rows.shape[1:]))
        return room.index_copy(0, rectangle.slot_of_token, rows).view(shape)
    padded: Tensor = _Pad.apply(rows, slots.flatten(), *rectangle[1:])
    return padded.view(shape)


def unpad_rows(padded: Tensor, rectangle: Rectangle) -> Tensor:
    """The adjoint of :func:`pad_rows`: empty slots are dropped."""
    rows = padded.flatten(0, 1)
    if torch.jit.is_scripting():
        return rows.index_select(0, rectangle.slot_of_token)
    out: Tensor = _Unpad.apply(rows, rectangle.token_of_slot.flatten(), *rectangle[1:])
    return out


def pad_keys(logarithms: Tensor, layout: Layout) -> Tensor:
    """What is added to the scores of each key, as :func:`attend` takes it.

    Args:
        logarithms: [n_edges], of the edges; the centres' are 0.
        layout: with a rectangle.

    Returns:
        [n_atoms, 1, 1, width of the rectangle], with minus infinity in empty slots, so that nothing
        of a structure depends on what else is in its batch.
    """
    rectangle = layout.rectangle
    assert rectangle is not None
    of_centers = logarithms.new_zeros(rectangle.token_of_slot.size(0))
    padded = pad_rows(torch.cat([of_centers, logarithms]), rectangle)
    flat = padded.flatten().masked_fill(rectangle.empty, -torch.inf)
    return flat.view(padded.size(0), 1, 1, padded.size(1))


def attend(qkv: Tensor, rectangle: Rectangle, bias: Tensor, heads: int, scale: float) -> Tensor:
    """Softmax attention within each neighbourhood, by plain torch.

    Plain matrix products and a softmax, because training on forces differentiates twice and
    torch's fused attention does not.

    Args:
        qkv: [n_atoms + n_edges, 3 * width], centre tokens first.
        rectangle: of the layout.
        bias: from :func:`pad_keys`.
        heads: number of heads.
        scale: of the scores.

    Returns:
        [n_atoms + n_edges, width].
    """
    queries, keys, values = _by_heads(qkv, rectangle, heads)
    scores = torch.matmul(queries * scale, keys.transpose(-2, -1)) + bias
    mixed = torch.matmul(scores.softmax(dim=-1), values)
    return unpad_rows(mixed.transpose(1, 2).flatten(2), rectangle)


def attend_once(
    qkv: Tensor,
    rectangle: Rectangle,
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
        rectangle: as for :func:`attend`.
        bias: as for :func:`attend`.
        heads: as for :func:`attend`.
        scale: as for :func:`attend`.
        most_atoms: in one call; on a GPU the derivative fails beyond.
    """
    queries, keys, values = _by_heads(qkv, rectangle, heads)
    width = values.size(3)
    more = 8 - width % 8  # columns, the first of them for the bias: kernels take multiples of 8
    # Empty slots have minus infinity, which would make NaN of the zeros in their rows.
    column = (bias.clamp_min(-1e4) / scale).transpose(2, 3).expand(-1, heads, -1, 1)
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
    mixed = torch.cat(parts)[..., :width]
    return unpad_rows(mixed.transpose(1, 2).flatten(2), rectangle)


def _by_heads(qkv: Tensor, rectangle: Rectangle, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [n_atoms, heads, slots, width of a head] each."""
    padded = pad_rows(qkv, rectangle)
    atoms, slots, width = padded.shape
    # Written out: -1 for the last would be ambiguous where there are no atoms.
    split = padded.view(atoms, slots, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]
