"""One message-passing layer: edge tokens from geometry and messages, then transformer blocks."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune.backends.instructions import CannotRecord, Part, Recorder, Rows
from pet_finetune.backends.reference import join
from pet_finetune.graph import Layout, Neighborhood

from .block import Block
from .primitives import SiLU, table_of
from .projection import Chain, Memory, record_chain, weights_of
from .recompute import recomputed


class BlockStack(nn.Module):
    """Blocks in a row; a module of its own because checkpoints name it ``trans.layers``."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(
        self, nodes: Tensor, edges: Tensor, layout: Layout, bias: Tensor, memory: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run every block; shapes as in :class:`Block`, ``memory`` as in :class:`GNNLayer`."""
        if not torch.jit.is_scripting():
            if memory == Memory.RECOMPUTE:
                return self._again(nodes, edges, layout, bias)
        for block in self.layers:
            nodes, edges = block(nodes, edges, layout, bias, memory)
        return nodes, edges

    def _again(
        self, nodes: Tensor, edges: Tensor, layout: Layout, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        for block in self.layers:

            def run(
                nodes: Tensor, edges: Tensor, bias: Tensor, block: nn.Module = block
            ) -> tuple[Tensor, ...]:
                out: tuple[Tensor, Tensor] = block(nodes, edges, layout, bias)
                return out

            nodes, edges = recomputed(run, (nodes, edges, bias), [block])
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
        self.compress = Chain(
            nn.Linear((2 if first else 3) * d_pet, d_pet), SiLU(), nn.Linear(d_pet, d_pet)
        )
        self.neighbor_embedder = None if first else nn.Embedding(num_species, d_pet)

    def forward(
        self,
        nodes: Tensor,
        messages: Tensor,
        neighbor_species: Tensor,
        neighborhood: Neighborhood,
        bias: Tensor,
        memory: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Update centre tokens [n_atoms, d_node] and edge tokens [n_edges, d_pet].

        Args:
            nodes: [n_atoms, d_node].
            messages: [n_edges, d_pet], what arrives along each edge.
            neighbor_species: [n_edges] species indices.
            neighborhood: the batch's neighbourhoods.
            bias: from :func:`~.block.weigh_keys`.
            memory: one of :class:`~.projection.Memory`.
        """
        edges = self.make_edges(neighborhood, messages, neighbor_species, memory)
        out: tuple[Tensor, Tensor] = self.trans(nodes, edges, neighborhood.layout, bias, memory)
        return out

    def make_edges(
        self, neighborhood: Neighborhood, messages: Tensor, neighbor_species: Tensor, memory: int
    ) -> Tensor:
        """The edge tokens before the blocks, [n_edges, d_pet]."""
        if not torch.jit.is_scripting():
            if memory == Memory.RECOMPUTE:
                return self._edges_again(neighborhood, messages, neighbor_species)
        geometry = join([neighborhood.vectors, neighborhood.distances.unsqueeze(-1)], 1)
        parts = [self.edge_embedder(geometry)]
        if self.neighbor_embedder is not None:
            parts.append(self.neighbor_embedder(neighbor_species))
        parts.append(messages)
        out: Tensor = self.compress(join(parts, 1))
        return out

    def _edges_again(
        self, neighborhood: Neighborhood, messages: Tensor, neighbor_species: Tensor
    ) -> Tensor:
        def run(vectors: Tensor, distances: Tensor, messages: Tensor) -> tuple[Tensor, ...]:
            own = neighborhood._replace(vectors=vectors, distances=distances)
            return (self.make_edges(own, messages, neighbor_species, Memory.KEEP),)

        modules = (self.edge_embedder, self.neighbor_embedder, self.compress)
        (edges,) = recomputed(
            run, (neighborhood.vectors, neighborhood.distances, messages), modules
        )
        return edges

    def record(self, to: Recorder, nodes: Rows, messages: Rows) -> tuple[Rows, Rows]:
        """:meth:`forward` as instructions."""
        width = messages.width
        weight, bias = weights_of(self.edge_embedder)
        if bias is None:
            raise CannotRecord("a layer without a bias")
        parts = 2 if self.neighbor_embedder is None else 3
        joined = to.buffer(Part.EDGES, parts * width)
        to.embed(joined, 0, weight, bias)
        if self.neighbor_embedder is not None:
            to.look_up(joined, width, table_of(self.neighbor_embedder))
        to.take(messages, joined, (parts - 1) * width)
        edges = record_chain(to, self.compress, joined)
        for block in self.trans.layers:
            nodes, edges = cast("Block", block).record(to, nodes, edges)
        return nodes, edges


def make_head(width: int, d_head: int) -> Chain:
    """Linear-SiLU-Linear-SiLU from ``width`` to ``d_head``."""
    return Chain(nn.Linear(width, d_head), SiLU(), nn.Linear(d_head, d_head), SiLU())


def sum_over_edges(values: Tensor, neighborhood: Neighborhood, num_atoms: int) -> Tensor:
    """Cutoff-weighted sum of [n_edges, k] over the edges of each atom, [n_atoms, k]."""
    weighted = values * neighborhood.factors.unsqueeze(-1)
    return weighted.new_zeros([num_atoms, values.size(-1)]).index_add(
        0, neighborhood.centers, weighted
    )
