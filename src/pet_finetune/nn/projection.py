"""Linear layers together with the norm or activation before them and the residual after them.

One operator of a fused back end where it knows the layer: what lies between the norm and the
product never leaves the processor's caches. By the layer's own ``forward`` everywhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import chain
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pet_finetune.backends import fused
from pet_finetune.backends.choice import Accelerated, Backend
from pet_finetune.backends.fused import MANY_NUMBERS, PackedLayer, settings
from pet_finetune.backends.instructions import CannotRecord, Recorder, Row, Rows
from pet_finetune.backends.reference import RowOp, apply_rows, multiply

from .primitives import GroupedLinear, Prologue


class Memory(IntEnum):
    """Memory mode of a part of the network; an argument of its ``forward``.

    An integer there, for TorchScript knows no others.
    """

    #: Whatever the derivatives need.
    KEEP = 0
    #: The inputs, from which the part is computed again; differentiates as often as it does itself.
    RECOMPUTE = 1
    #: The inputs of fused operators, which are then differentiated once at most and by the geometry
    #: alone. That is all a prediction needs.
    INPUTS_ONLY = 2


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

    #: :meth:`effective_weight` in this pass through the network, where :func:`together` made it.
    made: Tensor | None = None

    def effective_weight(self) -> Tensor:
        """[out, in], differentiable."""
        return self.weight

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float] | None:
        """A weight W, a [r, in], b [out, r] and s, if :meth:`effective_weight` is W + s b a."""
        return None

    def low_rank_update(self) -> LowRankUpdate | None:
        """The trained part of the weight, if it is of low rank and nothing else trains."""
        return None

    def apart(self, x: Tensor) -> Tensor | None:
        """[n, in] to [n, out]: what is to be added to the product with the weight, if anything."""
        return None


class _Update(torch.autograd.Function):
    """W + s b a of several layers of one shape, from all W, all a and all b in a row."""

    @staticmethod
    def forward(ctx: Any, scaling: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 3
        a, b = torch.stack(tensors[count : 2 * count]), torch.stack(tensors[2 * count :])
        ctx.save_for_backward(a, b)
        ctx.scaling = scaling
        updates = torch.bmm(b, a).unbind()
        return tuple(torch._foreach_add(tensors[:count], updates, alpha=scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), grad = ctx.saved_tensors, torch.stack(grads)
        to_a = torch.baddbmm(a, b.mT, grad, beta=0.0, alpha=ctx.scaling)
        to_b = torch.baddbmm(b, grad, a.mT, beta=0.0, alpha=ctx.scaling)
        return None, *[None] * len(grads), *to_a.unbind(), *to_b.unbind()


#: So many numbers of adapted weights are made together: their gradients are there at once, too.
_TOGETHER = 2**25


@contextmanager
def together(network: Any) -> Iterator[None]:
    """Context in which plain torch, in training, makes adapted weights of one shape by one product.

    With small batches it is how many operations there are that takes a GPU's time. What predicts
    is to give the very numbers of the merged model, which are those of other sums.

    Args:
        network: a :class:`~pet_finetune.model.pet.PET`.
    """
    alike: dict[Any, list[tuple[Adapted, tuple[Tensor, ...]]]] = defaultdict(list)
    apart = network.backend.fused or network.recompute or not network.training
    for layer in () if apart else network.modules():
        found = layer.factors() if isinstance(layer, Adapted) else None
        if found is not None and type(found[1]) in (Tensor, nn.Parameter):  # and not of a trace
            *tensors, scaling = found
            alike[tensors[0].shape, len(tensors[1]), scaling].append((layer, tuple(tensors)))
    if sum(len(group) * shape.numel() for (shape, *_), group in alike.items()) > _TOGETHER:
        alike.clear()
    try:
        for (*_, scaling), group in alike.items():
            tensors = [t for kind in zip(*(own for _, own in group), strict=True) for t in kind]
            for (layer, _), weight in zip(group, _Update.apply(scaling, *tensors), strict=True):
                layer.made = weight
        yield
    finally:
        for layer, _ in chain.from_iterable(alike.values()):
            layer.made = None


# The weights that do not train, in the kernels' form. Holding on to the tensor itself keeps its
# memory from being given to another one that would look like it.
_PACKED: WeakKeyDictionary[nn.Module, tuple[Tensor, int, Tensor]] = WeakKeyDictionary()


def _packed(linear: nn.Linear, weight: Tensor, rounds: bool) -> Tensor | None:
    """The weight in the kernels' form, which is kept; None for one that will soon be another."""
    fixed = weight is linear.weight and not weight.requires_grad
    if not fixed or type(weight) not in (Tensor, nn.Parameter):  # or of a trace, without numbers
        return None
    known = _PACKED.get(linear)
    if known is not None:
        tensor, version, packed = known
        same = tensor.data_ptr() == weight.data_ptr() and version == weight._version
        if same and (packed.dtype == torch.bfloat16) == rounds:
            return packed
    packed = fused.pack(weight, rounds=rounds)
    if type(packed) is not Tensor:  # of a trace
        return packed
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
    """Whether the kernels support this layer and its widths."""
    adapted = isinstance(linear, Adapted) and linear.fusable
    if not (adapted or type(linear) is nn.Linear):
        return False
    linear = cast("nn.Linear", linear)
    lanes = fused.lanes(x.dtype)
    return linear.in_features % lanes == 0 and linear.out_features % lanes == 0


def project(
    backend: Backend,
    linear: nn.Module,
    x: Tensor,
    prologue: RowOp | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``linear(prologue(x)) + residual``.

    Args:
        backend: who computes it.
        linear: a linear layer, adapted or not, ours or anyone's.
        x: [n, in], or what the prologue makes into that.
        prologue: what is done to the rows first.
        residual: [n, out].

    Returns:
        [n, out].
    """
    if backend.fused:
        if isinstance(linear, GroupedLinear) and linear.fits(x):
            return linear.project(x, prologue, residual)
        if _fits(linear, x):
            return _fused(cast("nn.Linear", linear), x, prologue, residual, backend.rounds)
    rows = _rows(backend, x, prologue)
    if type(linear) is nn.Linear:
        out = multiply(rows, linear.weight, linear.bias)
    else:
        out = linear(rows)
    return out if residual is None else out + residual


def _rows(backend: Backend, x: Tensor, op: RowOp | None) -> Tensor:
    if op is None:
        return x
    return fused.apply_rows(x, op) if backend.fused else apply_rows(x, op)


def _fused(
    linear: nn.Linear, x: Tensor, prologue: RowOp | None, residual: Tensor | None, rounds: bool
) -> Tensor:
    weight, a, b, scaling = linear.weight, None, None, 0.0
    if isinstance(linear, Adapted):
        extra = linear.apart(x if prologue is None else fused.apply_rows(x, prologue))
        if extra is not None:
            residual = extra if residual is None else residual + extra
        update = linear.low_rank_update()
        if update is None:
            weight = linear.effective_weight()
        else:
            weight, a, b, scaling = update
    return fused.projection(
        x,
        weight,
        _packed(linear, weight, rounds),
        linear.bias,
        a=a,
        b=b,
        scaling=scaling,
        residual=residual,
        rounds=rounds,
        **settings(prologue, x.dtype),
    )


def packed_layer(
    backend: Backend, linear: nn.Module, x: Tensor, prologue: RowOp | None = None
) -> PackedLayer | None:
    """The layer for operators that keep their inputs alone; None where it cannot be part of one.

    Args:
        backend: who computes it.
        linear: a linear layer, adapted or not, ours or anyone's.
        x: the rows that go through it, or through what comes before it.
        prologue: what is done to the rows first.
    """
    if not backend.fused or backend.rounds or x.numel() < MANY_NUMBERS or not _fits(linear, x):
        return None
    linear = cast("nn.Linear", linear)
    weight = linear.weight
    if isinstance(linear, Adapted):
        if linear.training:  # dropout has a way of its own
            return None
        update = linear.low_rank_update()
        weight = linear.effective_weight() if update is None else update.weight
    packed = _packed(linear, weight, rounds=False)
    if packed is None:
        packed = fused.pack(weight)
    return PackedLayer(packed, linear.bias, settings(prologue, x.dtype))


def two_layers(
    backend: Backend,
    first: nn.Module,
    second: nn.Module,
    x: Tensor,
    norm: RowOp | None,
    activation: RowOp,
    residual: Tensor | None,
    memory: int = Memory.KEEP,
) -> Tensor:
    """``second(activation(first(norm(x)))) + residual``, [n, in] to [n, out]; rows as above."""
    one = packed_layer(backend, first, x, norm) if memory == Memory.INPUTS_ONLY else None
    two = None if one is None else packed_layer(backend, second, x, activation)
    if one is None or two is None:
        hidden = project(backend, first, x, norm)
        return project(backend, second, hidden, activation, residual)
    return one.then(x, two, residual)


class Chain(Accelerated, nn.Sequential):
    """Linear layers with activations between them, the first one linear."""

    def forward(
        self,
        x: Tensor,
        norm: RowOp | None = None,
        residual: Tensor | None = None,
        memory: int = 0,
    ) -> Tensor:
        """``layers(norm(x)) + residual``, [n, in] to [n, out].

        Args:
            x: [n, in].
            norm: before the first layer.
            residual: [n, out]; only where the last layer is linear.
            memory: one of :class:`Memory`.
        """
        if not torch.jit.is_scripting():
            return self._projected(x, norm, residual, memory)
        if norm is not None:
            x = apply_rows(x, norm)
        for layer in self:
            x = layer(x)
        return x if residual is None else x + residual

    def _projected(
        self, x: Tensor, norm: RowOp | None, residual: Tensor | None, memory: int
    ) -> Tensor:
        pending, members = norm, list(self.children())
        last = members[-1]
        if norm is not None and len(members) == 3 and isinstance(members[1], Prologue):
            # The input of the norm is kept anyhow. Without one only what is between would be.
            between = members[1].op()
            return two_layers(self.backend, members[0], last, x, norm, between, residual, memory)
        for layer in members:
            if isinstance(layer, Prologue):
                pending = layer.op()
            else:
                rest = residual if layer is last else None
                x, pending = project(self.backend, layer, x, pending, rest), None
        return _rows(self.backend, x, pending)


def record_chain(
    to: Recorder,
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
    to: Recorder,
    linear: nn.Module,
    x: Rows,
    before: RowOp | None = None,
    residual: Rows | None = None,
    out: Rows | None = None,
) -> Rows:
    """:func:`project` as an instruction, into ``out`` if given."""
    weight, bias = weights_of(linear)
    return to.project(x, weight, bias, as_row(before, to), residual, out)


def as_row(op: RowOp | None, to: Recorder) -> Row:
    """An operation on rows as instructions have it."""
    return Row(**settings(op, to.dtype))


def weights_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Effective weight of a layer, [out, in], and its bias.

    Raises:
        CannotRecord: another library's layer, or one whose weight is in few bits.
    """
    if isinstance(linear, Adapted) and linear.fusable:
        return linear.effective_weight(), linear.bias
    if type(linear) is not nn.Linear:
        raise CannotRecord(f"a {type(linear).__name__}")
    return linear.weight, linear.bias
