"""Linear layers together with the norm or activation before them and the residual after them.

One operation of the fused kernels where they can be used: what lies between the norm and the
product never leaves the processor's caches. By torch's own modules everywhere else.
"""

from __future__ import annotations

from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pet_finetune import kernels
from pet_finetune.kernels.listing import CannotRecord, Listing, Row, Rows

from .grouped import GroupedLinear
from .rowwise import Prologue, RowOp, apply_rows, settings


class LowRankUpdate(NamedTuple):
    """An update ``scaling * b @ a`` of a weight that is otherwise fixed.

    Attributes:
        weight: [out, in], with the update as it is now; no gradient flows through it.
        a: [r, in].
        b: [out, r].
        scaling: a number.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scaling: float


class Adapted(nn.Linear):
    """A linear layer whose weight is not what ``weight`` holds; adapters derive from it."""

    @property
    def fusable(self) -> bool:
        """Whether the kernels may multiply with :meth:`effective_weight`."""
        return True

    def effective_weight(self) -> Tensor:
        """[out, in], differentiable."""
        return self.weight

    def low_rank_update(self) -> LowRankUpdate | None:
        """The trained part of the weight, if it is of low rank and nothing else trains."""
        return None

    def apart(self, x: Tensor) -> Tensor | None:
        """[n, in] to [n, out]: what is to be added to the product with the weight, if anything."""
        return None


# The weights that do not train, in the kernels' form. Holding on to the tensor itself keeps its
# memory from being given to another one that would look like it.
_PACKED: WeakKeyDictionary[nn.Module, tuple[Tensor, int, Tensor]] = WeakKeyDictionary()


def _packed(linear: nn.Linear, weight: Tensor) -> Tensor | None:
    """The weight in the kernels' form, which is kept; None for one that will soon be another."""
    fixed = weight is linear.weight and not weight.requires_grad
    if not fixed:
        return None
    known = _PACKED.get(linear)
    if known is not None:
        tensor, version, packed = known
        same = tensor.data_ptr() == weight.data_ptr() and version == weight._version
        if same and (packed.dtype == torch.bfloat16) == kernels.halves():
            return packed
    packed = kernels.pack(weight)
    _PACKED[linear] = (weight.detach(), weight._version, packed)
    return packed


def plain_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer made of these parameters, [out, in] and [out], without drawing any."""
    out_features, in_features = weight.shape
    plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = weight
    plain.bias = bias  # type: ignore[assignment]  # None without one, as torch has it
    return plain


def _fits(linear: nn.Module, x: Tensor) -> bool:
    """Whether the kernels know what this layer computes, and its widths suit them."""
    adapted = isinstance(linear, Adapted) and linear.fusable
    if not (adapted or type(linear) is nn.Linear):
        return False
    linear = cast("nn.Linear", linear)
    lanes = kernels.lanes(x.dtype)
    return linear.in_features % lanes == 0 and linear.out_features % lanes == 0


def project(
    linear: nn.Module,
    x: Tensor,
    prologue: RowOp | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``linear(prologue(x)) + residual``.

    Args:
        linear: a linear layer, adapted or not, ours or anyone's.
        x: [n, in], or what the prologue makes into that.
        prologue: what is done to the rows first.
        residual: [n, out].

    Returns:
        [n, out].
    """
    if isinstance(linear, GroupedLinear):
        return linear.project(x, prologue, residual)
    if kernels.usable(x) and _fits(linear, x):
        return _fused(cast("nn.Linear", linear), x, prologue, residual)
    out: Tensor = linear(_rows(x, prologue))
    return out if residual is None else out + residual


def _rows(x: Tensor, op: RowOp | None) -> Tensor:
    return x if op is None else apply_rows(x, op)


def _fused(linear: nn.Linear, x: Tensor, prologue: RowOp | None, residual: Tensor | None) -> Tensor:
    weight, a, b, scaling = linear.weight, None, None, 0.0
    if isinstance(linear, Adapted):
        extra = linear.apart(_rows(x, prologue))
        if extra is not None:
            residual = extra if residual is None else residual + extra
        update = linear.low_rank_update()
        if update is None:
            weight = linear.effective_weight()
        else:
            weight, a, b, scaling = update
    return kernels.projection(
        x,
        weight,
        _packed(linear, weight),
        linear.bias,
        a=a,
        b=b,
        scaling=scaling,
        residual=residual,
        **settings(prologue, x.dtype),
    )


def packed_layer(
    linear: nn.Module, x: Tensor, prologue: RowOp | None = None
) -> kernels.PackedLayer | None:
    """The layer for operations that keep their inputs alone; None where it cannot be part of one.

    Args:
        linear: a linear layer, adapted or not, ours or anyone's.
        x: the rows that go through it, or through what comes before it.
        prologue: what is done to the rows first.
    """
    if not (kernels.compacts(x) and kernels.usable(x) and _fits(linear, x)) or kernels.halves():
        return None
    linear = cast("nn.Linear", linear)
    weight = linear.weight
    if isinstance(linear, Adapted):
        if linear.training:  # dropout has a way of its own
            return None
        update = linear.low_rank_update()
        weight = linear.effective_weight() if update is None else update.weight
    packed = _packed(linear, weight)
    if packed is None:
        packed = kernels.pack(weight)
    return kernels.PackedLayer(packed, linear.bias, settings(prologue, x.dtype))


def two_layers(
    first: nn.Module,
    second: nn.Module,
    x: Tensor,
    norm: RowOp | None,
    activation: RowOp,
    residual: Tensor | None,
) -> Tensor:
    """``second(activation(first(norm(x)))) + residual``, [n, in] to [n, out]; rows as above."""
    one = packed_layer(first, x, norm)
    two = None if one is None else packed_layer(second, x, activation)
    if one is None or two is None:
        return project(second, project(first, x, norm), activation, residual)
    return one.then(x, two, residual)


def chain(
    layers: nn.Module, x: Tensor, norm: RowOp | None = None, residual: Tensor | None = None
) -> Tensor:
    """Linear layers with activations between them, ``layers(norm(x)) + residual``.

    Args:
        layers: a sequence of linear layers and prologues in turn, the first one linear.
        x: [n, in].
        norm: before the first layer.
        residual: [n, out]; only where the last layer is linear.

    Returns:
        [n, out].
    """
    if not isinstance(layers, nn.Sequential):  # wrapped, by another library's adapters say
        x = layers(_rows(x, norm))
        return x if residual is None else x + residual
    pending, members = norm, list(layers.children())
    last = members[-1]
    if norm is not None and len(members) == 3 and isinstance(members[1], Prologue):
        # The input of the norm is kept in any case. Without one only what is between would be.
        return two_layers(members[0], last, x, norm, members[1].op(), residual)
    for layer in members:
        if isinstance(layer, Prologue):
            pending = layer.op()
        else:
            x = project(layer, x, pending, residual if layer is last else None)
            pending = None
    return members[-1](x) if pending is not None else x


def record_chain(
    to: Listing,
    layers: nn.Module,
    x: Rows,
    norm: RowOp | None = None,
    residual: Rows | None = None,
) -> Rows:
    """:func:`chain` as instructions; it ends in a linear layer."""
    if not isinstance(layers, nn.Sequential):
        raise CannotRecord("layers that are no sequence")
    pending, members = norm, list(layers)
    for layer in members:
        if isinstance(layer, Prologue):
            pending = layer.op()
        else:
            x = record_linear(to, layer, x, pending, residual if layer is members[-1] else None)
            pending = None
    return x


def record_linear(
    to: Listing,
    linear: nn.Module,
    x: Rows,
    before: RowOp | None = None,
    residual: Rows | None = None,
    out: Rows | None = None,
) -> Rows:
    """:func:`project` as an instruction, into ``out`` if given."""
    weight, bias = weights_of(linear)
    return to.project(x, weight, bias, as_row(before, to), residual, out)


def as_row(op: RowOp | None, to: Listing) -> Row:
    """An operation on rows as instructions have it."""
    return Row(**settings(op, to.dtype))


def weights_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What a layer multiplies with, [out, in], and its bias.

    Raises:
        CannotRecord: another library's layer, or one whose weight is in few bits.
    """
    if isinstance(linear, Adapted) and linear.fusable:
        return linear.effective_weight(), linear.bias
    if type(linear) is not nn.Linear:
        raise CannotRecord(f"a {type(linear).__name__}")
    return linear.weight, linear.bias
