"""Attention of the tokens of one atom among themselves, weighed by the cutoff."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pet_finetune import kernels

from .neighborhood import Layout
from .projection import packed_layer, project
from .prompt import Prompt
from .rowwise import Prologue

# Cutoff factors below this count as this: the logarithm of a vanished edge stays finite.
SMALLEST_FACTOR = 1e-15


@dataclass(frozen=True)
class Keys:
    """How much each key counts, and whose keys they are.

    Attributes:
        logarithms: [n_edges], logarithm of each edge's cutoff factor; the centre's is 0.
        layout: the tokens of each atom.
    """

    logarithms: Tensor
    layout: Layout

    @cached_property
    def padded(self) -> Tensor:
        """What is added to the scores, [n_atoms, 1, 1, width of the rectangle].

        Empty slots get minus infinity, so that nothing of a structure depends on what else is
        in its batch.
        """
        slots = self.layout.slots
        bias = slots.pad(
            torch.cat([self.logarithms.new_zeros(self.layout.num_atoms), self.logarithms])
        )
        if slots.empty is not None:
            bias = bias.flatten().index_fill(0, slots.empty, -torch.inf).view_as(bias)
        return bias[:, None, None, :]


def weigh_keys(factors: Tensor, layout: Layout) -> Keys:
    """The keys of edges with cutoff factors [n_edges]."""
    return Keys(torch.log(factors.clamp_min(SMALLEST_FACTOR)), layout)


def attend(qkv: Tensor, keys: Keys, heads: int, scale: float) -> Tensor:
    """Softmax attention within each neighbourhood, by torch operations: the reference.

    Plain matrix products and a softmax, because training on forces differentiates twice and
    torch's fused attention does not.

    Args:
        qkv: [n_atoms + n_edges, 3 * width], centre tokens first.
        keys: the keys' weights.
        heads: number of heads.
        scale: of the scores.

    Returns:
        [n_atoms + n_edges, width].
    """
    slots = keys.layout.slots
    padded = slots.pad(qkv)
    atoms, width, _ = padded.shape
    split = padded.view(atoms, width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys_, values = split.unbind(0)
    scores = torch.matmul(queries * scale, keys_.transpose(-2, -1)) + keys.padded
    mixed = torch.matmul(scores.softmax(dim=-1), values)
    return slots.unpad(mixed.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Multi-head self-attention (names as in metatrain: ``input_linear``, ``output_linear``).

    Args:
        width: of a token.
        num_heads: dividing it.
        temperature: divides the scores.
        num_prompts: learned tokens that every token attends to beside its neighbourhood.
    """

    def __init__(
        self, width: int, num_heads: int, temperature: float, num_prompts: int = 0
    ) -> None:
        super().__init__()
        self.input_linear = nn.Linear(width, 3 * width)
        self.output_linear = nn.Linear(width, width)
        self.num_heads = num_heads
        self.scale = 1.0 / ((width // num_heads) ** 0.5 * temperature)
        self.prompt = Prompt(num_prompts, width, num_heads) if num_prompts else None

    def forward(self, tokens: Tensor, keys: Keys, norm: Prologue | None = None) -> Tensor:
        """Attend within each atom's neighbourhood.

        Args:
            tokens: [n_atoms + n_edges, width], centre tokens first.
            keys: from :func:`weigh_keys`.
            norm: of the tokens, before all else.

        Returns:
            [n_atoms + n_edges, width].
        """
        compact = self._compact(tokens, keys, norm)
        if compact is not None:
            return compact
        qkv = project(self.input_linear, tokens, norm)
        if kernels.usable(qkv):
            starts = keys.layout.starts
            mixed = kernels.attention(qkv, keys.logarithms, starts, self.num_heads, self.scale)
        else:
            mixed = attend(qkv, keys, self.num_heads, self.scale)
        if self.prompt is not None and self.prompt.enabled:
            queries = qkv[:, : self.output_linear.in_features]
            mixed = mixed + self._read_prompt(self.prompt, queries)
        return project(self.output_linear, mixed)

    def _compact(self, tokens: Tensor, keys: Keys, norm: Prologue | None) -> Tensor | None:
        """All in one operation, which keeps the tokens alone; None where it cannot be."""
        if self.prompt is not None and self.prompt.enabled:
            return None
        first = packed_layer(self.input_linear, tokens, norm)
        last = None if first is None else packed_layer(self.output_linear, tokens)
        if first is None or last is None:
            return None
        starts = keys.layout.starts
        return first.attend(tokens, keys.logarithms, starts, self.num_heads, self.scale, last)

    def _read_prompt(self, prompt: Prompt, queries: Tensor) -> Tensor:
        """The prompt's keys and values come from the projection that makes those of the tokens."""
        _, keys, values = project(self.input_linear, prompt.adaption_prompt).chunk(3, dim=-1)
        return prompt(queries, keys, values, self.scale)
