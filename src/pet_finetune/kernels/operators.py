"""The fused operations, thin wrappers over the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import active
from .halves import halves

_FLOATS = (torch.float32, torch.float64)


def usable(rows: Tensor) -> bool:
    """Whether a tensor can go through the kernels: [n, d] floats on the CPU, library loaded.

    Within torch's autocast it cannot: whoever opens it wants the products in fewer digits.
    """
    return (
        active()
        and rows.dim() == 2
        and rows.device.type == "cpu"
        and rows.dtype in _FLOATS
        and not torch.is_autocast_enabled("cpu")
    )


def attention(qkv: Tensor, key_bias: Tensor, starts: Tensor, heads: int, scale: float) -> Tensor:
    """Multi-head attention within each atom's neighbourhood.

    Args:
        qkv: [n_atoms + n_edges, 3 * width], queries, keys and values; centre tokens first.
        key_bias: [n_edges], added to the scores of each edge's key; the centre's is 0.
        starts: [n_atoms + 1] int64, the first edge of each atom.
        heads: number of heads, dividing ``width``.
        scale: what the products of queries and keys are multiplied with.

    Returns:
        [n_atoms + n_edges, width].
    """
    out: Tensor = torch.ops.pet_finetune.attention(qkv, key_bias, starts, heads, scale)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axis of [n, d]."""
    out: Tensor = torch.ops.pet_finetune.layer_norm(x, weight, bias, eps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last axis of [n, d]."""
    out: Tensor = torch.ops.pet_finetune.rms_norm(x, weight, eps)
    return out


def swiglu(x: Tensor) -> Tensor:
    """First half times the sigmoid of the second half, [n, 2 d] to [n, d]."""
    out: Tensor = torch.ops.pet_finetune.swiglu(x)
    return out


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, [n, d]."""
    out: Tensor = torch.ops.pet_finetune.silu(x)
    return out


def pack(weight: Tensor, *, exact: bool = False) -> Tensor:
    """A weight [out, in], both multiples of :func:`lanes`, in the form the processor reads best.

    Args:
        weight: numbers to multiply with.
        exact: in its own digits also within :func:`in_bfloat16`.
    """
    rounds = not exact and _rounds(weight)
    operators = torch.ops.pet_finetune
    packed: Tensor = operators.pack_halves(weight) if rounds else operators.pack(weight)
    return packed


def _rounds(weight: Tensor) -> bool:
    return halves() and weight.dtype == torch.float32


def lanes(dtype: torch.dtype) -> int:
    """How many numbers the kernels take at once; widths of projections are multiples of it."""
    return 64 // dtype.itemsize


def projection(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    *,
    prologue: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer of a norm or a gate of the input: ``prologue(x) @ weight.T + bias``.

    Args:
        x: [n, in], or [n, 2 * in] before ``swiglu``.
        weight: [out, in]; with a low-rank update, ``scaling * b @ a`` is in it already.
        packed: the same from :func:`pack`, for a weight that stays; None packs it whenever it is
            needed and keeps nothing, which takes longer and spares twice the weight's memory.
        bias: [out] or None.
        prologue: ``none``, ``rms_norm``, ``layer_norm``, ``silu`` or ``swiglu``.
        norm_weight: [in], of the norm.
        norm_bias: [in], of a layer norm.
        eps: of the norm.
        a: [r, in], of a low-rank update; receives its gradient without the dense one.
        b: [out, r], likewise.
        scaling: of ``b @ a``.
        residual: [n, out], added to the result.

    Returns:
        [n, out].
    """
    out: Tensor = torch.ops.pet_finetune.projection(
        x, weight, packed, bias, prologue, norm_weight, norm_bias, eps, a, b, scaling, residual,
        _rounds(weight),
    )  # fmt: skip
    return out


def grouped_projection(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    leading: int,
    *,
    prologue: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A projection with another weight for each of several groups of rows; differentiates once.

    Args:
        x: [n, in], or [n, 2 * in] before ``swiglu``: ``leading`` rows of each group in turn, then
            equal shares of what is left.
        packed: [groups, 2, out * in], each from :func:`pack`.
        bias: [groups, out] or None.
        leading: how many of a group's rows come in the first turn.
        prologue: as in :func:`projection`.
        norm_weight: as in :func:`projection`.
        norm_bias: as in :func:`projection`.
        eps: as in :func:`projection`.
        residual: as in :func:`projection`.

    Returns:
        [n, out].
    """
    out: Tensor = torch.ops.pet_finetune.grouped_projection(
        x, packed, bias, leading, prologue, norm_weight, norm_bias, eps, residual
    )
    return out


def weigh_edges(
    vectors: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    reverse: Tensor,
    *,
    cutoff: float,
    width: float,
    cosine: bool,
    smallest: float,
    tiny: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """The edges within a cutoff and how much they count; nothing of it is known to autograd.

    Args:
        vectors: [n_edges, 3].
        centers: [n_edges] int64.
        neighbors: [n_edges] int64.
        reverse: [n_edges] int64.
        cutoff: where the factors end.
        width: over which length they fall.
        cosine: the cosine instead of the bump.
        smallest: the logarithms are of factors of at least this.
        tiny: under the root of the distances.

    Returns:
        The vectors of the edges that are left [n, 3]; distances, logarithms, factors and the
        derivatives of these two by the distance [5, n]; centres, neighbours and reverse [n]; and
        which edges they are [n], empty where all are left.
    """
    left, numbers, *indices, which = torch.ops.pet_finetune.weigh_edges(
        vectors, centers, neighbors, reverse, cutoff, width, cosine, smallest, tiny
    )
    return left, numbers, (indices[0], indices[1], indices[2]), which
