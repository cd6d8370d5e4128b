"""One transformer block of PET: attention and a feed-forward network, for centre and edges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attention, Keys
from .projection import project, two_layers
from .rowwise import LayerNorm, Prologue, RMSNorm, SiLU, SwiGLU

NORMALIZATIONS: dict[str, type[RMSNorm] | type[LayerNorm]] = {
    "LayerNorm": LayerNorm,
    "RMSNorm": RMSNorm,
}


class FeedForward(nn.Module):
    """Two linear layers with SiLU or SwiGLU between them."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        gated = activation == "SwiGLU"
        self.activation = SwiGLU() if gated else SiLU()
        self.w_in = nn.Linear(width, 2 * hidden if gated else hidden)
        self.w_out = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, norm: Prologue | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The network of ``norm(x)``, plus the residual; all [n, width]."""
        return two_layers(self.w_in, self.w_out, x, norm, self.activation, residual)


class Block(nn.Module):
    """A transformer block over the centre tokens [n_atoms, d_node] and edges [n_edges, d_pet].

    Where ``d_node`` differs from ``d_pet`` the centre token is contracted for the attention,
    expanded after it, and has a feed-forward network of its own.
    """

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

    def forward(self, nodes: Tensor, edges: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """One block; ``keys`` as for :class:`~.attention.Attention`."""
        centers = project(self.center_contraction, nodes) if self.wide_center else nodes
        tokens = torch.cat([centers, edges])
        if self.post_norm:
            tokens = self.norm_attention(tokens + self.attention(tokens, keys))
            tokens = self.norm_mlp(self.mlp(tokens, residual=tokens))
            new_centers, new_edges = tokens.split([len(nodes), len(edges)])
        else:
            mixed = self.attention(tokens, keys, self.norm_attention)
            new_centers, new_edges = mixed.split([len(nodes), len(edges)])
            new_edges = edges + new_edges
            new_edges = self.mlp(new_edges, self.norm_mlp, residual=new_edges)
        if self.wide_center:
            new_centers = project(self.center_expansion, new_centers, residual=nodes)
            new_centers = self.center_mlp(
                new_centers, self.norm_center_features, residual=new_centers
            )
        # With equal widths PreLN hands the attention's output on without a residual: the
        # trained models were made so.
        return new_centers, new_edges
