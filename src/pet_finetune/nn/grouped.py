"""Linear layers whose weight is another one for each member of a committee.

The members' rows go through the layer together: [leading rows of every member, the other rows of
every member], where only layers that see centre and edge tokens in one array have leading rows.
All members have equally many of either kind, because they are given the same structures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune import kernels

from .rowwise import Prologue


@dataclass
class Rows:
    """What the grouped layers of a network know of the batch under way.

    Attributes:
        atoms: of one member.
    """

    atoms: int = 0


class GroupedLinear(nn.Module):
    """Several linear layers of one shape side by side; frozen.

    Args:
        weights: [members, out, in].
        biases: [members, out], or None.
        rows: the batch under way, where centre and edge tokens arrive in one array; None where
            rows of one kind do.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weights: Tensor, biases: Tensor | None, rows: Rows | None) -> None:
        super().__init__()
        self.rows = rows
        self.out_features, self.in_features = weights.shape[1:]
        self.register_buffer("weight", weights.detach())
        self.register_buffer("bias", None if biases is None else biases.detach())
        self._packed: Tensor | None = None

    @property
    def members(self) -> int:
        """How many layers there are."""
        return len(self.weight)

    @property
    def leading(self) -> int:
        """Rows of one member that come before the others."""
        return 0 if self.rows is None else self.rows.atoms

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [n, out], each row by the layer of its member."""
        head = self.members * self.leading
        parts = [part for part in x.split([head, len(x) - head]) if len(part)]
        out = [self._multiply(part) for part in parts]
        if len(out) == 1:
            return out[0]
        return torch.cat(out) if out else x.new_zeros(0, self.out_features)

    def _multiply(self, x: Tensor) -> Tensor:
        """Equally many rows of every member in turn."""
        rows = x.reshape(self.members, -1, self.in_features)
        turned = self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(rows, turned).flatten(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), rows, turned).flatten(0, 1)

    def project(self, x: Tensor, prologue: Prologue | None, residual: Tensor | None) -> Tensor:
        """The same as :func:`~.projection.project` of each member's rows."""
        lanes = kernels.lanes(x.dtype)
        if kernels.usable(x) and not (self.in_features % lanes or self.out_features % lanes):
            settings = {} if prologue is None else prologue.settings(x.dtype)
            return kernels.grouped_projection(
                x, self._panels(), self.bias, self.leading, residual=residual, **settings
            )
        out = self(x if prologue is None else prologue(x))
        return cast("Tensor", out if residual is None else out + residual)

    def _panels(self) -> Tensor:
        """The weights in the kernels' form; they do not change, so they are packed once."""
        if self._packed is None or self._packed.dtype != self.weight.dtype:
            self._packed = torch.stack([kernels.pack(weight) for weight in self.weight])
        return self._packed
