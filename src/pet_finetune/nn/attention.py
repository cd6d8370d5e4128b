"""Attention of the tokens of one atom among themselves, weighed by the cutoff."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .neighborhood import Slots

# Cutoff factors below this count as this: the logarithm of a vanished edge stays finite.
_SMALLEST_FACTOR = 1e-15


def key_bias(factors: Tensor, num_atoms: int, slots: Slots) -> Tensor:
    """What is added to the scores of each key: the logarithm of its cutoff factor.

    The centre token has factor 1. Empty slots get minus infinity, so that nothing of a
    structure depends on what else is in its batch.

    Args:
        factors: [n_edges], cutoff factors.
        num_atoms: number of atoms.
        slots: the padded layout.

    Returns:
        [n_atoms, 1, 1, width].
    """
    logarithms = torch.log(factors.clamp_min(_SMALLEST_FACTOR))
    flat = torch.cat([logarithms.new_zeros(num_atoms), logarithms])
    bias = slots.pad(flat)
    if slots.empty is not None:
        bias = bias.flatten().index_fill(0, slots.empty, -torch.inf).view_as(bias)
    return bias[:, None, None, :]


class Attention(nn.Module):
    """Multi-head self-attention (names as in metatrain: ``input_linear``, ``output_linear``)."""

    def __init__(self, width: int, num_heads: int, temperature: float) -> None:
        super().__init__()
        self.input_linear = nn.Linear(width, 3 * width)
        self.output_linear = nn.Linear(width, width)
        self.num_heads = num_heads
        self.scale = 1.0 / ((width // num_heads) ** 0.5 * temperature)

    def forward(self, tokens: Tensor, bias: Tensor, slots: Slots) -> Tensor:
        """Attend within each atom's neighbourhood.

        Plain matrix products and a softmax, because training on forces differentiates twice
        and torch's fused attention does not.

        Args:
            tokens: [n_atoms + n_edges, width], centre tokens first.
            bias: [n_atoms, 1, 1, slots.width] from :func:`key_bias`.
            slots: the padded layout.

        Returns:
            [n_atoms + n_edges, width].
        """
        qkv = slots.pad(self.input_linear(tokens))
        atoms, width, _ = qkv.shape
        heads = qkv.view(atoms, width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        scores = torch.matmul(queries * self.scale, keys.transpose(-2, -1)) + bias
        mixed = torch.matmul(scores.softmax(dim=-1), values)
        return self.output_linear(slots.unpad(mixed.transpose(1, 2).flatten(2)))
