"""Attention of the tokens of one atom among themselves, weighed by the cutoff."""

import torch
from torch import Tensor, nn

from pet_finetune.backends import fused
from pet_finetune.backends.attention import attend, attend_once, pad_keys
from pet_finetune.backends.choice import Accelerated
from pet_finetune.backends.instructions import CannotRecord, Recorder, Rows
from pet_finetune.backends.reference import RowOp, apply_rows
from pet_finetune.graph import Layout

from .projection import Memory, packed_layer, project, record_linear

# Cutoff factors below this count as this: the logarithm of a vanished edge stays finite.
SMALLEST_FACTOR = 1e-15


def weigh_keys(factors: Tensor, layout: Layout, smallest: float = SMALLEST_FACTOR) -> Tensor:
    """What is added to the scores: the logarithm of each edge's cutoff factor; 0 for the centre.

    Args:
        factors: [n_edges], cutoff factors.
        layout: the tokens of each atom.
        smallest: factors below it count as it.

    Returns:
        [n_edges]; where the layout has rectangles, padded as
        :func:`~pet_finetune.backends.attention.pad_keys` pads it.
    """
    logarithms = torch.log(factors.clamp_min(smallest))
    return logarithms if layout.rectangles is None else pad_keys(logarithms, layout)


class Attention(Accelerated, nn.Module):
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
        self.prompt = PromptTokens(num_prompts, width, num_heads) if num_prompts else None

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        bias: Tensor,
        norm: RowOp | None = None,
        memory: int = 0,
    ) -> Tensor:
        """Attend within each atom's neighbourhood.

        Args:
            tokens: [n_atoms + n_edges, width], centre tokens first.
            layout: the tokens of each atom.
            bias: from :func:`weigh_keys`.
            norm: of the tokens, before all else.
            memory: one of :class:`~.projection.Memory`.

        Returns:
            [n_atoms + n_edges, width].
        """
        if not torch.jit.is_scripting():
            if self.backend.fused:
                return self._fused(tokens, layout.starts, bias, norm, memory)
        where = layout.rectangles
        assert where is not None
        qkv = self.input_linear(tokens if norm is None else apply_rows(tokens, norm))
        # What is exported predicts. On a CPU the plain form is the faster one.
        once = qkv.is_cuda and qkv.dtype == bias.dtype
        if not torch.jit.is_scripting():
            once = once and memory == Memory.INPUTS_ONLY
        if once:
            mixed = attend_once(qkv, where, bias, self.num_heads, self.scale)
        else:
            mixed = attend(qkv, where, bias, self.num_heads, self.scale)
        if self.prompt is not None:  # two conditions, for TorchScript compiles both parts of `and`
            if self.prompt.enabled:
                of_prompt = self.input_linear(self.prompt.adaption_prompt)
                mixed = mixed + self.prompt(qkv[:, : mixed.size(1)], of_prompt, self.scale)
        out: Tensor = self.output_linear(mixed)
        return out

    def _fused(
        self, tokens: Tensor, starts: Tensor, bias: Tensor, norm: RowOp | None, memory: int
    ) -> Tensor:
        """By fused operators; predictions by one, which keeps nothing but the tokens."""
        backend, heads, scale = self.backend, self.num_heads, self.scale
        prompt = None if self.prompt is None or not self.prompt.enabled else self.prompt
        if memory == Memory.INPUTS_ONLY and prompt is None:
            first = packed_layer(backend, self.input_linear, tokens, norm)
            last = packed_layer(backend, self.output_linear, tokens)
            if first is not None and last is not None:
                return first.attend(tokens, bias, starts, heads, scale, last)
        qkv = project(backend, self.input_linear, tokens, norm)
        mixed = fused.attention(qkv, bias, starts, heads, scale)
        if prompt is not None:
            of_prompt = project(backend, self.input_linear, prompt.adaption_prompt)
            mixed = mixed + prompt(qkv[:, : mixed.size(1)], of_prompt, scale)
        return project(backend, self.output_linear, mixed)

    def record(self, to: Recorder, tokens: Rows, norm: RowOp | None) -> Rows:
        """:meth:`forward` as instructions, up to the output layer, whose input is returned."""
        if self.prompt is not None and self.prompt.enabled:
            raise CannotRecord("a prompt")
        qkv = record_linear(to, self.input_linear, tokens, norm)
        return to.attend(qkv, self.num_heads, self.scale)


class PromptTokens(nn.Module):
    """The prompt of one attention layer, with a gate a head that starts at zero.

    The prompt has a softmax of its own, and the gate multiplies what it yields: with the gates at
    zero the layer is what it was. Each token answers to the prompt by itself, so nothing of an atom
    depends on another one that it did not depend on before.

    Names as in Hugging Face PEFT (``adaption_prompt``, ``adaption_gate``), which has one gate a
    layer where the paper has one a head.

    Args:
        length: number of learned tokens.
        width: of the attention's tokens.
        num_heads: of the attention.
    """

    def __init__(self, length: int, width: int, num_heads: int) -> None:
        super().__init__()
        # Rows of about unit size, as the norm before the attention gives the real tokens.
        self.adaption_prompt = nn.Parameter(torch.randn(length, width))
        self.adaption_gate = nn.Parameter(torch.zeros(num_heads))
        self.enabled = True

    def forward(self, queries: Tensor, projected: Tensor, scale: float) -> Tensor:
        """What the tokens read from the prompt, times the gates.

        Args:
            queries: [n, width] of the real tokens.
            projected: [length, 3 * width], what the projection that makes the tokens' queries, keys
                and values makes of the prompt.
            scale: of the scores.

        Returns:
            [n, width].
        """
        heads = self.adaption_gate.size(0)
        _, keys, values = projected.chunk(3, dim=-1)
        split = queries.unflatten(-1, (heads, -1)).transpose(0, 1)
        keys = keys.unflatten(-1, (heads, -1)).permute(1, 2, 0)
        values = values.unflatten(-1, (heads, -1)).transpose(0, 1)
        weights = torch.matmul(split * scale, keys).softmax(dim=-1)
        read = torch.matmul(weights, values) * self.adaption_gate[:, None, None]
        return read.transpose(0, 1).flatten(1)
