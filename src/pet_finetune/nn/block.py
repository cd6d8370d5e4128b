"""One transformer block of PET: attention and a feed-forward network, for centre and edges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attention
from .neighborhood import Slots

NORMALIZATIONS: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


class FeedForward(nn.Module):
    """Two linear layers with SiLU or SwiGLU between them.

    SwiGLU in PET multiplies the value with the *sigmoid* of the gate (metatrain's convention),
    not with its SiLU as in arXiv:2002.05202.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gated = activation == "SwiGLU"
        self.w_in = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.w_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        hidden = self.w_in(x)
        if self.gated:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * torch.sigmoid(gate)
        else:
            hidden = nn.functional.silu(hidden)
        out: Tensor = self.w_out(hidden)
        return out


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
    ) -> None:
        super().__init__()
        norm = NORMALIZATIONS[normalization]
        self.post_norm = transformer_type == "PostLN"
        self.attention = Attention(d_pet, num_heads, temperature)
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
        self, nodes: Tensor, edges: Tensor, bias: Tensor, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """One block; see :meth:`Attention.forward` for ``bias`` and ``slots``."""
        centers = self.center_contraction(nodes) if self.wide_center else nodes
        tokens = torch.cat([centers, edges])
        if self.post_norm:
            tokens = self.norm_attention(tokens + self.attention(tokens, bias, slots))
            tokens = self.norm_mlp(tokens + self.mlp(tokens))
            new_centers, new_edges = tokens.split([len(nodes), len(edges)])
        else:
            mixed = self.attention(self.norm_attention(tokens), bias, slots)
            new_centers, new_edges = mixed.split([len(nodes), len(edges)])
            new_edges = edges + new_edges
            new_edges = new_edges + self.mlp(self.norm_mlp(new_edges))
        if self.wide_center:
            new_centers = nodes + self.center_expansion(new_centers)
            new_centers = new_centers + self.center_mlp(self.norm_center_features(new_centers))
        # With equal widths PreLN hands the attention's output on without a residual: the
        # trained models were made so.
        return new_centers, new_edges
