"""Gathers whose gradients are gathers too.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible.
Where each row goes to exactly one place, the gradient is another gather. Both cases of PET are
of that kind: turning edges around, and laying tokens out in a padded rectangle.
"""

import torch
from torch import Tensor

from pet_finetune.graph import Rectangle


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
        padded = rows.index_select(0, row_of_slot)
        if len(empty):
            padded.index_fill_(0, empty, 0.0)
        return padded

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
    shape = [-1, rectangle.width] + list(rows.shape[1:])
    if torch.jit.is_scripting():
        room = rows.new_zeros([rectangle.token_of_slot.size(0)] + list(rows.shape[1:]))
        return room.index_copy(0, rectangle.slot_of_token, rows).view(shape)
    padded: Tensor = _Pad.apply(rows, *rectangle[:3])
    return padded.view(shape)


def unpad_rows(padded: Tensor, rectangle: Rectangle) -> Tensor:
    """The adjoint of :func:`pad_rows`: empty slots are dropped."""
    rows = padded.flatten(0, 1)
    if torch.jit.is_scripting():
        return rows.index_select(0, rectangle.slot_of_token)
    out: Tensor = _Unpad.apply(rows, *rectangle[:3])
    return out
