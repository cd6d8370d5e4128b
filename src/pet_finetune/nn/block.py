"""One transformer block of PET: attention and a feed-forward network, for centre and edges.

The tokens of one atom attend to each other, weighed by the cutoff.
"""

from typing import Final

import torch
from torch import Tensor, nn

from pet_finetune.backends import fused
from pet_finetune.backends.attention import attend, attend_once, pad_keys
from pet_finetune.backends.choice import Accelerated
from pet_finetune.backends.instructions import CannotRecord, Part, Recorder, Rows
from pet_finetune.backends.reference import RowOp, apply_rows, join
from pet_finetune.graph import Layout

from .primitives import LayerNorm, RMSNorm, SiLU, SwiGLU
from .projection import Memory, as_row, packed_layer, project, record_linear, two_layers

# Cutoff factors below this count as this: the logarithm of a vanished edge stays finite.
SMALLEST_FACTOR = 1e-15


def weigh_keys(factors: Tensor, layout: Layout, smallest: float = SMALLEST_FACTOR) -> Tensor:
    """Bias of the scores: the logarithm of each edge's cutoff factor; 0 for the centre.

    Args:
        factors: [n_edges], cutoff factors.
        layout: the tokens of each atom.
        smallest: factors below it count as it.

    Returns:
        [n_edges]; where the layout has rectangles, padded as
        :func:`~pet_finetune.backends.attention.pad_keys` pads it.
    """
    # As `clamp_min`, whose derivative takes more operations.
    logarithms = torch.log(nn.functional.threshold(factors, smallest, smallest))
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
        if self.prompt is not None:
            of_prompt = self.input_linear(self.prompt.adaption_prompt)
            mixed = mixed + self.prompt(qkv[:, : mixed.size(1)], of_prompt, self.scale)
        out: Tensor = self.output_linear(mixed)
        return out

    def _fused(
        self, tokens: Tensor, starts: Tensor, bias: Tensor, norm: RowOp | None, memory: int
    ) -> Tensor:
        """By fused operators; predictions by one, which keeps nothing but the tokens."""
        backend, heads, scale, prompt = self.backend, self.num_heads, self.scale, self.prompt
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
        if self.prompt is not None:
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

    def forward(self, queries: Tensor, projected: Tensor, scale: float) -> Tensor:
        """Attention of the tokens to the prompt, times the gates.

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


NORMALIZATIONS: dict[str, type[RMSNorm] | type[LayerNorm]] = {
    "LayerNorm": LayerNorm,
    "RMSNorm": RMSNorm,
}


class FeedForward(Accelerated, nn.Module):
    """Two linear layers with SiLU or SwiGLU between them."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        gated = activation == "SwiGLU"
        self.activation = SwiGLU() if gated else SiLU()
        self.w_in = nn.Linear(width, 2 * hidden if gated else hidden)
        self.w_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: RowOp | None = None, memory: int = 0) -> Tensor:
        """The network of ``norm(x)``, added to ``x``; all [n, width].

        Args:
            x: rows.
            norm: of them, before all else.
            memory: one of :class:`~.projection.Memory`.
        """
        if not torch.jit.is_scripting():
            op, layers = self.activation.op(), (self.w_in, self.w_out)
            return two_layers(self.backend, *layers, x, norm, op, x, memory)
        hidden = self.w_in(x if norm is None else apply_rows(x, norm))
        out: Tensor = x + self.w_out(self.activation(hidden))
        return out

    def record(self, to: Recorder, x: Rows, norm: RowOp | None = None) -> Rows:
        """:meth:`forward` as instructions."""
        hidden = record_linear(to, self.w_in, x, norm)
        return record_linear(to, self.w_out, hidden, self.activation.op(), residual=x)


class Block(nn.Module):
    """A transformer block over the centre tokens [n_atoms, d_node] and edges [n_edges, d_pet].

    Where ``d_node`` differs from ``d_pet`` the centre token is contracted for the attention,
    expanded after it, and has a feed-forward network of its own.
    """

    wide_center: Final[bool]  # TorchScript compiles what belongs to it only where it is true

    def __init__(
        self,
        d_pet: int,
        d_node: int,
        d_feedforward: int,
        num_heads: int,
        temperature: float,
        normalization: str,
        activation: str,
        transformer_type: str,
        num_prompts: int = 0,
    ) -> None:
        super().__init__()
        norm = NORMALIZATIONS[normalization]
        self.post_norm = transformer_type == "PostLN"
        self.attention = Attention(d_pet, num_heads, temperature, num_prompts)
        self.norm_attention = norm(d_pet)
        self.norm_mlp = norm(d_pet)
        self.mlp = FeedForward(d_pet, d_feedforward, activation)
        self.wide_center = d_node != d_pet
        if self.wide_center:
            self.center_contraction = nn.Linear(d_node, d_pet)
            self.center_expansion = nn.Linear(d_pet, d_node)
            self.norm_center_features = norm(d_node)
            self.center_mlp = FeedForward(d_node, 2 * d_node, activation)

    def forward(
        self, nodes: Tensor, edges: Tensor, layout: Layout, bias: Tensor, memory: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Compute one block.

        Args:
            nodes: [n_atoms, d_node].
            edges: [n_edges, d_pet].
            layout: as for :class:`~.block.Attention`.
            bias: as for :class:`~.block.Attention`.
            memory: one of :class:`~.projection.Memory`.
        """
        sizes = [nodes.size(0), edges.size(0)]
        centers = self.center_contraction(nodes) if self.wide_center else nodes
        tokens = join([centers, edges], 0)
        if self.post_norm:
            tokens = self.norm_attention(
                tokens + self.attention(tokens, layout, bias, None, memory)
            )
            tokens = self.norm_mlp(self.mlp(tokens, None, memory))
            new_centers, new_edges = tokens.split(sizes)
        else:
            mixed = self.attention(tokens, layout, bias, self.norm_attention.op(), memory)
            new_centers, new_edges = mixed.split(sizes)
            new_edges = self.mlp(edges + new_edges, self.norm_mlp.op(), memory)
        if self.wide_center:
            new_centers = nodes + self.center_expansion(new_centers)
            norm = self.norm_center_features.op()
            new_centers = self.center_mlp(new_centers, norm, memory)
        # With equal widths PreLN hands the attention's output on without a residual: the
        # trained models were made so.
        return new_centers, new_edges

    def record(self, to: Recorder, nodes: Rows, edges: Rows) -> tuple[Rows, Rows]:
        """:meth:`forward` as instructions."""
        tokens = to.buffer(Part.ALL, edges.width)
        if self.wide_center:
            record_linear(to, self.center_contraction, nodes, out=tokens.of(Part.ATOMS))
        else:
            to.take(nodes, tokens.of(Part.ATOMS))
        to.take(edges, tokens.of(Part.EDGES))
        output = self.attention.output_linear
        if self.post_norm:
            mixed = self.attention.record(to, tokens, None)
            tokens = record_linear(to, output, mixed, residual=tokens)
            tokens = self.mlp.record(to, to.norm(tokens, as_row(self.norm_attention.op(), to)))
            tokens = to.norm(tokens, as_row(self.norm_mlp.op(), to))
            new_centers, new_edges = tokens.of(Part.ATOMS), tokens.of(Part.EDGES)
        else:
            mixed = self.attention.record(to, tokens, self.norm_attention.op())
            new_centers = record_linear(to, output, mixed.of(Part.ATOMS))
            new_edges = record_linear(to, output, mixed.of(Part.EDGES), residual=edges)
            new_edges = self.mlp.record(to, new_edges, self.norm_mlp.op())
        if self.wide_center:
            new_centers = record_linear(to, self.center_expansion, new_centers, residual=nodes)
            new_centers = self.center_mlp.record(to, new_centers, self.norm_center_features.op())
        return new_centers, new_edges
