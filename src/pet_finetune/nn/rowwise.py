"""Norms and activations: torch's modules, computed by the fused kernels where these can be used.

Parameters, names and results are those of the torch modules they derive from. Each can also be
made part of the linear layer that follows it, see :mod:`.projection`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune import kernels


class Prologue(nn.Module):
    """What the kernels can do to the input of a linear layer, row by row."""

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """How :func:`pet_finetune.kernels.projection` is told of it."""
        raise NotImplementedError


class RMSNorm(nn.RMSNorm, Prologue):
    """``torch.nn.RMSNorm`` over the last axis."""

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """See :class:`Prologue`."""
        # Torch's own default for eps is that of the inputs' type.
        eps = torch.finfo(dtype).eps if self.eps is None else self.eps
        return {"prologue": "rms_norm", "norm_weight": self.weight, "eps": eps}

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        if kernels.usable(x):
            return kernels.rms_norm(x, self.weight, self.settings(x.dtype)["eps"])
        # Torch's autocast knows LayerNorm as a thing to compute in float32, but not this one.
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm, Prologue):
    """``torch.nn.LayerNorm`` over the last axis."""

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """See :class:`Prologue`."""
        return {
            "prologue": "layer_norm",
            "norm_weight": self.weight,
            "norm_bias": self.bias,
            "eps": self.eps,
        }

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        if kernels.usable(x):
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class SiLU(nn.SiLU, Prologue):
    """``torch.nn.SiLU``."""

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """See :class:`Prologue`."""
        return {"prologue": "silu"}

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return kernels.silu(x) if kernels.usable(x) else super().forward(x)


class SwiGLU(Prologue):
    """The first half times the *sigmoid* of the second, [..., 2 d] to [..., d].

    PET's convention (metatrain); arXiv:2002.05202 multiplies with the gate's SiLU.
    """

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """See :class:`Prologue`."""
        return {"prologue": "swiglu"}

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 d] to [..., d]."""
        if kernels.usable(x):
            return kernels.swiglu(x)
        value, gate = x.chunk(2, dim=-1)
        return value * torch.sigmoid(gate)
