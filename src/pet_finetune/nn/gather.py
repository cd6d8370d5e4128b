"""Gathers whose gradients are gathers too.

The gradient of ``x[index]`` is a scatter-add in general: slow, and on a GPU not reproducible.
Where each row goes to exactly one place, the gradient is another gather. Both cases of PET are
of that kind: turning edges around, and laying tokens out in a padded rectangle.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        if empty is not None:
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
    out: Tensor = _Permute.apply(rows, index, inverse)
    return out


def pad_rows(
    rows: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, empty: Tensor | None
) -> Tensor:
    """Each row into its slot, zeros into the empty slots.

    Args:
        rows: [n, ...].
        row_of_slot: [m] int64, any valid index where the slot is empty.
        slot_of_row: [n] int64, the inverse on the slots in use.
        empty: [k] int64, the empty slots; None when there is none.

    Returns:
        [m, ...].
    """
    out: Tensor = _Pad.apply(rows, row_of_slot, slot_of_row, empty)
    return out


def unpad_rows(
    padded: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, empty: Tensor | None
) -> Tensor:
    """The adjoint of :func:`pad_rows`: [m, ...] to [n, ...]; empty slots are dropped."""
    out: Tensor = _Unpad.apply(padded, row_of_slot, slot_of_row, empty)
    return out
