"""Linear layers whose weight is another one for each member of a committee.

The members' rows go through the layer together: [leading rows of every member, the other rows of
every member], where only layers that see centre and edge tokens in one array have leading rows.
All members have equally many of either kind, because they are given the same structures.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pet_finetune.backends import fused
from pet_finetune.backends.reference import RowOp


@dataclass
class MemberRows:
    """What the grouped layers of a network know of the batch under way.

    Attributes:
        atoms: of one member.
        members: whose rows these are; the others are left out.
    """

    atoms: int = 0
    members: slice = field(default_factory=lambda: slice(None))


class GroupedLinear(nn.Module):
    """Several linear layers of one shape side by side; frozen.

    Args:
        weights: [members, out, in].
        biases: [members, out], or None.
        rows: the batch under way.
        all_tokens: whether centre and edge tokens arrive in one array, or rows of one kind.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weights: Tensor, biases: Tensor | None, rows: MemberRows, all_tokens: bool
    ) -> None:
        super().__init__()
        self.rows, self.all_tokens = rows, all_tokens
        self.out_features, self.in_features = weights.shape[1:]
        self.register_buffer("weight", weights.detach())
        self.register_buffer("bias", None if biases is None else biases.detach())
        self._packed: Tensor | None = None

    @property
    def leading(self) -> int:
        """Rows of one member that come before the others."""
        return self.rows.atoms if self.all_tokens else 0

    def _own(self, tensor: Tensor | None) -> Tensor | None:
        """The part of the members whose rows are under way."""
        return None if tensor is None else tensor[self.rows.members]

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [n, out], each row by the layer of its member."""
        turned, biases = self.weight[self.rows.members].transpose(1, 2), self._own(self.bias)
        head = len(turned) * self.leading
        out = []
        for part in x.split([head, len(x) - head]):
            rows = part.view(len(turned), -1, self.in_features)
            if biases is None:
                out.append(torch.bmm(rows, turned).flatten(0, 1))
            else:
                out.append(torch.baddbmm(biases.unsqueeze(1), rows, turned).flatten(0, 1))
        return torch.cat(out) if self.leading else out[1]

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels can multiply these rows with the weights."""
        lanes = fused.lanes(x.dtype)
        return self.in_features % lanes == 0 and self.out_features % lanes == 0

    def project(self, x: Tensor, prologue: RowOp | None, residual: Tensor | None) -> Tensor:
        """By the kernels what :func:`~.projection.project` is of each member's rows."""
        panels, biases = self._panels()[self.rows.members], self._own(self.bias)
        before = fused.settings(prologue, x.dtype)
        return fused.grouped_projection(
            x, panels, biases, self.leading, residual=residual, **before
        )

    def _panels(self) -> Tensor:
        """The weights in the kernels' form; they do not change, so they are packed once."""
        if self._packed is None or self._packed.dtype != self.weight.dtype:
            self._packed = torch.stack([fused.pack(weight) for weight in self.weight])
        return self._packed
