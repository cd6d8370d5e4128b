"""Attention of the tokens of one atom among themselves, weighed by the cutoff."""

import torch
from torch import Tensor, nn

from pet_finetune import kernels
from pet_finetune.graph import Layout, Rectangle
from pet_finetune.kernels.listing import CannotRecord, Listing, Rows

from .gather import pad_rows, unpad_rows
from .projection import packed_layer, project, record_linear
from .prompt import Prompt
from .rowwise import RowOp, apply_rows

# Cutoff factors below this count as this: the logarithm of a vanished edge stays finite.
SMALLEST_FACTOR = 1e-15


def weigh_keys(factors: Tensor, layout: Layout, smallest: float = SMALLEST_FACTOR) -> Tensor:
    """What is added to the scores: the logarithm of each edge's cutoff factor; 0 for the centre.

    Args:
        factors: [n_edges], cutoff factors.
        layout: the tokens of each atom.
        smallest: factors below it count as it.

    Returns:
        [n_edges]; where the layout has a rectangle, [n_atoms, 1, 1, its width], with minus infinity
        in empty slots, so that nothing of a structure depends on what else is in its batch.
    """
    logarithms = torch.log(factors.clamp_min(smallest))
    rectangle = layout.rectangle
    if rectangle is None:
        return logarithms
    padded = pad_rows(torch.cat([logarithms.new_zeros(layout.num_atoms), logarithms]), rectangle)
    flat = padded.flatten().index_fill(0, rectangle.empty, -torch.inf)
    return flat.view(layout.num_atoms, 1, 1, rectangle.width)


def attend(qkv: Tensor, rectangle: Rectangle, bias: Tensor, heads: int, scale: float) -> Tensor:
    """Softmax attention within each neighbourhood, by torch operations: the reference.

    Plain matrix products and a softmax, because training on forces differentiates twice and
    torch's fused attention does not.

    Args:
        qkv: [n_atoms + n_edges, 3 * width], centre tokens first.
        rectangle: of the layout.
        bias: from :func:`weigh_keys`.
        heads: number of heads.
        scale: of the scores.

    Returns:
        [n_atoms + n_edges, width].
    """
    padded = pad_rows(qkv, rectangle)
    split = padded.view(padded.size(0), padded.size(1), 3, heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys, values = split.unbind(0)
    scores = torch.matmul(queries * scale, keys.transpose(-2, -1)) + bias
    mixed = torch.matmul(scores.softmax(dim=-1), values)
    return unpad_rows(mixed.transpose(1, 2).flatten(2), rectangle)


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

    def forward(
        self, tokens: Tensor, layout: Layout, bias: Tensor, norm: RowOp | None = None
    ) -> Tensor:
        """Attend within each atom's neighbourhood.

        Args:
            tokens: [n_atoms + n_edges, width], centre tokens first.
            layout: the tokens of each atom.
            bias: from :func:`weigh_keys`.
            norm: of the tokens, before all else.

        Returns:
            [n_atoms + n_edges, width].
        """
        rectangle = layout.rectangle
        if not torch.jit.is_scripting():
            if rectangle is None:
                return self._fused(tokens, layout.starts, bias, norm)
        assert rectangle is not None
        qkv = self.input_linear(tokens if norm is None else apply_rows(tokens, norm))
        mixed = attend(qkv, rectangle, bias, self.num_heads, self.scale)
        if self.prompt is not None:  # two conditions, for TorchScript compiles both parts of `and`
            if self.prompt.enabled:
                of_prompt = self.input_linear(self.prompt.adaption_prompt)
                mixed = mixed + self.prompt(qkv[:, : mixed.size(1)], of_prompt, self.scale)
        out: Tensor = self.output_linear(mixed)
        return out

    def _fused(self, tokens: Tensor, starts: Tensor, bias: Tensor, norm: RowOp | None) -> Tensor:
        """By the kernels; predictions in one operation, which keeps nothing but the tokens."""
        prompt = None if self.prompt is None or not self.prompt.enabled else self.prompt
        first = packed_layer(self.input_linear, tokens, norm) if prompt is None else None
        last = packed_layer(self.output_linear, tokens) if first is not None else None
        if first is not None and last is not None:
            return first.attend(tokens, bias, starts, self.num_heads, self.scale, last)
        qkv = project(self.input_linear, tokens, norm)
        mixed = kernels.attention(qkv, bias, starts, self.num_heads, self.scale)
        if prompt is not None:
            of_prompt = project(self.input_linear, prompt.adaption_prompt)
            mixed = mixed + prompt(qkv[:, : mixed.size(1)], of_prompt, self.scale)
        return project(self.output_linear, mixed)

    def record(self, to: Listing, tokens: Rows, norm: RowOp | None) -> Rows:
        """:meth:`forward` as instructions, up to the output layer, whose input is returned."""
        if self.prompt is not None and self.prompt.enabled:
            raise CannotRecord("a prompt")
        qkv = record_linear(to, self.input_linear, tokens, norm)
        return to.attend(qkv, self.num_heads, self.scale)
