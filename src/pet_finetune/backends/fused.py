"""The compiled operators for CPUs, thin wrappers over ``torch.ops.pet_finetune``.

Each computes what its counterpart in :mod:`.operators` does in plain torch, in float32 or float64.
They differentiate twice, which training on forces needs; :class:`PackedLayer` and
:func:`grouped_projection` once, for predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .operators import PROLOGUES
from .reference import RowOp

__all__ = [
    "MANY_NUMBERS",
    "PackedLayer",
    "apply_rows",
    "attention",
    "grouped_projection",
    "lanes",
    "layer_norm",
    "multiplies_bfloat16",
    "pack",
    "permute",
    "projection",
    "rms_norm",
    "settings",
    "silu",
    "swiglu",
    "weigh_edges",
]

#: Numbers of a layer's input (rows times columns) from which on a prediction keeps the inputs of
#: its operators alone: some 2,400 atoms of water and 3 GB by the default model. With fewer it has
#: memory for what lies between, and computing that again takes longer.
MANY_NUMBERS = 3 * 2**22


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512_BF16); the library is loaded."""
    return bool(torch.ops.pet_finetune.multiplies_bfloat16())


def lanes(dtype: torch.dtype) -> int:
    """Vector width of the kernels; widths of projections are multiples of it."""
    return 64 // dtype.itemsize


def settings(op: RowOp | None, dtype: torch.dtype) -> dict[str, Any]:
    """Encoding of an operation on rows for :func:`projection`; empty for none."""
    if op is None:
        return {}
    eps = torch.finfo(dtype).eps if op.eps is None else op.eps
    return {
        "prologue": op.kind,
        "norm_weight": op.weight,
        "norm_bias": op.bias,
        "eps": eps if op.weight is not None else 0.0,
    }


def apply_rows(x: Tensor, op: RowOp) -> Tensor:
    """:func:`~.reference.apply_rows` of [n, d]."""
    if op.kind == "silu":
        return silu(x)
    if op.kind == "swiglu":
        return swiglu(x)
    assert op.weight is not None
    eps = settings(op, x.dtype)["eps"]
    out: Tensor = torch.ops.pet_finetune.norm(x, op.weight, op.bias, eps, op.bias is not None)
    return out


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
    out: Tensor = torch.ops.pet_finetune.norm(x, weight, bias, eps, True)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last axis of [n, d]."""
    out: Tensor = torch.ops.pet_finetune.norm(x, weight, None, eps, False)
    return out


def swiglu(x: Tensor) -> Tensor:
    """First half times the sigmoid of the second half, [n, 2 d] to [n, d]."""
    out: Tensor = torch.ops.pet_finetune.gate(x, False)
    return out


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, [n, d]."""
    out: Tensor = torch.ops.pet_finetune.gate(x, True)
    return out


def permute(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``rows[index]`` for a permutation of the rows with the given inverse, [n, ...]."""
    out: Tensor = torch.ops.pet_finetune.permute(rows, index, inverse)
    return out


def pack(weight: Tensor, *, rounds: bool = False) -> Tensor:
    """A weight [out, in], both multiples of :func:`lanes`, in the form the processor reads best.

    Args:
        weight: numbers to multiply with.
        rounds: to bfloat16; numbers of another type than float32 stay as they are.
    """
    operators, weight = torch.ops.pet_finetune, weight.detach()
    rounded = rounds and weight.dtype == torch.float32
    packed: Tensor = operators.pack_bfloat16(weight) if rounded else operators.pack(weight)
    return packed


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
    rounds: bool = False,
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
        rounds: the factors of float32 products to bfloat16; sums stay in float32. The derivatives
            of the result are rounded likewise, wherever they are computed.

    Returns:
        [n, out].
    """
    out: Tensor = torch.ops.pet_finetune.projection(
        x, weight, packed, bias, PROLOGUES[prologue], norm_weight, norm_bias, eps, a, b, scaling,
        residual, rounds and weight.dtype == torch.float32,
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
        x, packed, bias, leading, PROLOGUES[prologue], norm_weight, norm_bias, eps, residual
    )
    return out


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer behind a norm or an activation, for operators that keep their inputs alone.

    What lies within these is computed again when the derivative is taken, so they need a fraction
    of the memory. They compute, to the last bit, what the operators that they stand for compute,
    but can be differentiated once only and have no gradient of any parameter: that is all that the
    derivative of an energy by the geometry needs.

    Attributes:
        packed: from :func:`pack`.
        bias: [out] or None.
        prologue: settings as in :func:`projection`; empty for none.
    """

    packed: Tensor
    bias: Tensor | None
    prologue: dict[str, Any] = field(default_factory=dict)

    @property
    def _arguments(self) -> tuple[Any, ...]:
        own = self.prologue
        return (
            self.packed,
            self.bias,
            PROLOGUES[own.get("prologue", "none")],
            own.get("norm_weight"),
            own.get("norm_bias"),
            own.get("eps", 0.0),
        )

    def then(self, x: Tensor, second: PackedLayer, residual: Tensor | None) -> Tensor:
        """This layer and another, of which only the first may have a norm: [n, in] to [n, out].

        Args:
            x: [n, in].
            second: with no prologue or an activation.
            residual: [n, out], added to the result; ``x`` itself costs nothing extra.
        """
        onto_x = residual is x
        activation = PROLOGUES[second.prologue.get("prologue", "none")]
        out: Tensor = torch.ops.pet_finetune.two_layers(
            x, *self._arguments, second.packed, second.bias, activation,
            None if onto_x else residual, onto_x,
        )  # fmt: skip
        return out

    def attend(
        self,
        tokens: Tensor,
        key_bias: Tensor,
        starts: Tensor,
        heads: int,
        scale: float,
        output: PackedLayer,
    ) -> Tensor:
        """This layer makes queries, keys and values of the tokens, another takes the attention's.

        Args:
            tokens: [n_atoms + n_edges, width], centre tokens first.
            key_bias: as in :func:`attention`.
            starts: as in :func:`attention`.
            heads: as in :func:`attention`.
            scale: as in :func:`attention`.
            output: with no prologue.

        Returns:
            [n_atoms + n_edges, width].
        """
        out: Tensor = torch.ops.pet_finetune.attention_layer(
            tokens, key_bias, starts, heads, scale, *self._arguments, output.packed, output.bias
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
