"""One transformer block of PET: attention and a feed-forward network, for centre and edges."""

from typing import Final

import torch
from torch import Tensor, nn

from pet_finetune.backends.choice import Accelerated
from pet_finetune.backends.instructions import Part, Recorder, Rows
from pet_finetune.backends.reference import RowOp, apply_rows, join
from pet_finetune.graph import Layout

from .attention import Attention
from .projection import as_row, record_linear, two_layers
from .rowwise import LayerNorm, RMSNorm, SiLU, SwiGLU

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
            if self.backend.fused:
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
        """One block.

        Args:
            nodes: [n_atoms, d_node].
            edges: [n_edges, d_pet].
            layout: as for :class:`~.attention.Attention`.
            bias: as for :class:`~.attention.Attention`.
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
