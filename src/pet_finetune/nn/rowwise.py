"""Norms and activations: torch's modules, computed by the model's back end.

Parameters, names and results are those of the torch modules they derive from. Each can also be
made part of the linear layer that follows it, see :mod:`.projection`, for which it describes itself
as a :class:`~pet_finetune.backends.reference.RowOp`.
"""

import torch
from torch import Tensor, nn

from pet_finetune.backends import fused
from pet_finetune.backends.choice import Accelerated
from pet_finetune.backends.reference import RowOp, apply_rows


class Prologue(Accelerated, nn.Module):
    """What can be done to the input of a linear layer, row by row."""

    def op(self) -> RowOp:
        """Its description."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d], of :class:`SwiGLU` [..., 2 d] to [..., d]."""
        if not torch.jit.is_scripting():
            if self.backend.fused and x.dim() == 2:
                return fused.apply_rows(x, self.op())
        return apply_rows(x, self.op())


class RMSNorm(Prologue, nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last axis."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("rms_norm", self.weight, None, self.eps)


class LayerNorm(Prologue, nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last axis."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("layer_norm", self.weight, self.bias, self.eps)


class SiLU(Prologue, nn.SiLU):
    """``torch.nn.SiLU``."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("silu")


class SwiGLU(Prologue):
    """The first half times the *sigmoid* of the second, [..., 2 d] to [..., d]."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("swiglu")
