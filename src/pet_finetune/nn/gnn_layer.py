"""One message-passing layer: edge tokens from geometry and messages, then transformer blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .attention import Keys
from .block import Block
from .neighborhood import Neighborhood
from .projection import chain
from .recompute import recomputed
from .rowwise import SiLU


class BlockStack(nn.Module):
    """Blocks in a row; a module of its own because checkpoints name it ``trans.layers``."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(
        self, nodes: Tensor, edges: Tensor, keys: Keys, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run every block; shapes as in :class:`Block`, ``again`` as in :class:`GNNLayer`."""
        for block in self.layers:

            def run(
                nodes: Tensor, edges: Tensor, logarithms: Tensor, block: nn.Module = block
            ) -> tuple[Tensor, ...]:
                same = logarithms is keys.logarithms  # then what it has worked out can be shared
                own = keys if same else replace(keys, logarithms=logarithms)
                out: tuple[Tensor, Tensor] = block(nodes, edges, own)
                return out

            nodes, edges = recomputed(again, run, (nodes, edges, keys.logarithms), [block])
        return nodes, edges


class GNNLayer(nn.Module):
    """Edge geometry, neighbour species (from the second layer on) and messages become tokens.

    Args:
        d_pet: width of the edge tokens.
        num_species: number of species the model knows.
        num_blocks: transformer blocks in this layer.
        make_block: builds one block.
        first: the first layer gets the neighbour species as its message, and no second time.
    """

    def __init__(
        self,
        d_pet: int,
        num_species: int,
        num_blocks: int,
        make_block: Callable[[], Block],
        first: bool,
    ) -> None:
        super().__init__()
        self.trans = BlockStack([make_block() for _ in range(num_blocks)])
        self.edge_embedder = nn.Linear(4, d_pet)
        self.compress = nn.Sequential(
            nn.Linear((2 if first else 3) * d_pet, d_pet), SiLU(), nn.Linear(d_pet, d_pet)
        )
        self.neighbor_embedder = None if first else nn.Embedding(num_species, d_pet)

    def forward(
        self,
        nodes: Tensor,
        messages: Tensor,
        neighbor_species: Tensor,
        keys: Keys,
        hood: Neighborhood,
        again: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Update centre tokens [n_atoms, d_node] and edge tokens [n_edges, d_pet].

        Args:
            nodes: [n_atoms, d_node].
            messages: [n_edges, d_pet], what arrives along each edge.
            neighbor_species: [n_edges] species indices.
            keys: from :func:`~.attention.weigh_keys`.
            hood: the batch's neighbourhoods.
            again: whether what this computes is computed again when it is needed, not kept.
        """

        def make_edges(vectors: Tensor, distances: Tensor, messages: Tensor) -> tuple[Tensor, ...]:
            geometry = torch.cat([vectors, distances.unsqueeze(-1)], dim=-1)
            parts = [self.edge_embedder(geometry)]
            if self.neighbor_embedder is not None:
                parts.append(self.neighbor_embedder(neighbor_species))
            return (chain(self.compress, torch.cat([*parts, messages], dim=-1)),)

        modules = (self.edge_embedder, self.neighbor_embedder, self.compress)
        inputs = (hood.vectors, hood.distances, messages)
        (edges,) = recomputed(again, make_edges, inputs, modules)
        out: tuple[Tensor, Tensor] = self.trans(nodes, edges, keys, again)
        return out
