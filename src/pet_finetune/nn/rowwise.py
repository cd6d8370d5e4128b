"""Norms and activations: torch's modules, computed by the fused kernels where these can be used.

Parameters, names and results are those of the torch modules they derive from. Each can also be
made part of the linear layer that follows it, see :mod:`.projection`, for which it describes itself
as a :class:`RowOp`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pet_finetune import kernels


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


def settings(op: RowOp | None, dtype: torch.dtype) -> dict[str, Any]:
    """How :func:`pet_finetune.kernels.projection` is told of an operation; empty for none."""
    if op is None:
        return {}
    eps = torch.finfo(dtype).eps if op.eps is None else op.eps
    return {
        "prologue": op.kind,
        "norm_weight": op.weight,
        "norm_bias": op.bias,
        "eps": eps if op.weight is not None else 0.0,
    }


class Prologue(nn.Module):
    """What the kernels can do to the input of a linear layer, row by row."""

    def op(self) -> RowOp:
        """Its description."""
        raise NotImplementedError


class RMSNorm(nn.RMSNorm, Prologue):
    """``torch.nn.RMSNorm`` over the last axis."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("rms_norm", self.weight, None, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        if not torch.jit.is_scripting():
            if kernels.usable(x):
                return kernels.rms_norm(x, self.weight, settings(self.op(), x.dtype)["eps"])
        return apply_rows(x, self.op())


class LayerNorm(nn.LayerNorm, Prologue):
    """``torch.nn.LayerNorm`` over the last axis."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("layer_norm", self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        if not torch.jit.is_scripting():
            if kernels.usable(x):
                return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return apply_rows(x, self.op())


class SiLU(nn.SiLU, Prologue):
    """``torch.nn.SiLU``."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("silu")

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        if not torch.jit.is_scripting():
            if kernels.usable(x):
                return kernels.silu(x)
        return apply_rows(x, self.op())


class SwiGLU(Prologue):
    """The first half times the *sigmoid* of the second, [..., 2 d] to [..., d]."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("swiglu")

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 d] to [..., d]."""
        if not torch.jit.is_scripting():
            if kernels.usable(x):
                return kernels.swiglu(x)
        return apply_rows(x, self.op())
