"""The Point Edge Transformer in one read (arXiv:2305.19302).

Parameter names are those of metatrain's ``backend`` module, so that its state dicts load by
taking that prefix off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune.config import ModelOptions
from pet_finetune.data.species import species_table
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec
from pet_finetune.nn.attention import weigh_keys
from pet_finetune.nn.block import Block
from pet_finetune.nn.conditioning import SystemConditioning
from pet_finetune.nn.gnn_layer import GNNLayer
from pet_finetune.nn.heads import make_head, sum_over_edges
from pet_finetune.nn.neighborhood import Neighborhood, build_neighborhood
from pet_finetune.nn.projection import chain
from pet_finetune.nn.recompute import recomputed
from pet_finetune.nn.rowwise import LayerNorm, SiLU

from .fork import Fork, Tokens
from .species_rows import pick_rows

#: The parts of the network that belong to single targets.
HEAD_GROUPS = ("node_heads", "edge_heads", "node_last_layers", "edge_last_layers")


class PET(nn.Module):
    """Maps a batch of structures to per-atom outputs of each target.

    Args:
        options: the architecture's hyperparameters.
        species: atomic numbers the model knows, ascending.
        targets: what the model predicts; heads are made for each.
    """

    species_to_species_index: Tensor

    def __init__(
        self, options: ModelOptions, species: Sequence[int], targets: Iterable[TargetSpec]
    ) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("species_to_species_index", species_table(species))
        self.gnn_layers = nn.ModuleList(
            GNNLayer(
                options.d_pet,
                len(species),
                options.num_attention_layers,
                self._make_block,
                first=index == 0,
            )
            for index in range(options.num_gnn_layers)
        )
        #: Whether training computes parts of the network again instead of keeping their results.
        self.recompute = False
        #: Of a committee, the layers that its members share.
        self.fork: Fork | None = None
        self.feedforward = options.featurizer_type == "feedforward"
        mixers = options.num_gnn_layers if self.feedforward else 0
        double = 2 * options.d_pet
        self.combination_norms = nn.ModuleList(LayerNorm(double) for _ in range(mixers))
        self.combination_mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(double, double), SiLU(), nn.Linear(double, options.d_pet))
            for _ in range(mixers)
        )
        self.num_readouts = 1 if self.feedforward else options.num_gnn_layers
        self.node_embedders = nn.ModuleList(
            nn.Embedding(len(species), options.d_node) for _ in range(self.num_readouts)
        )
        self.edge_embedder = nn.Embedding(len(species), options.d_pet)
        self.system_conditioning = (
            SystemConditioning(options.d_node, options.max_charge, options.max_spin_multiplicity)
            if options.system_conditioning
            else None
        )
        self.node_heads = nn.ModuleDict()
        self.edge_heads = nn.ModuleDict()
        self.node_last_layers = nn.ModuleDict()
        self.edge_last_layers = nn.ModuleDict()
        for target in targets:
            self.add_target(target)

    def _make_block(self) -> Block:
        options = self.options
        return Block(
            options.d_pet,
            options.d_node,
            options.d_feedforward,
            options.num_heads,
            options.attention_temperature,
            options.normalization,
            options.activation,
            options.transformer_type,
            options.num_prompts,
        )

    def add_target(self, target: TargetSpec) -> None:
        """Make fresh heads and last layers for a target."""
        options = self.options
        for heads, last_layers, width in (
            (self.node_heads, self.node_last_layers, options.d_node),
            (self.edge_heads, self.edge_last_layers, options.d_pet),
        ):
            heads[target.name] = nn.ModuleList(
                make_head(width, options.d_head) for _ in range(self.num_readouts)
            )
            last_layers[target.name] = nn.ModuleList(
                nn.ModuleDict({target.block_key: nn.Linear(options.d_head, target.num_outputs)})
                for _ in range(self.num_readouts)
            )

    def head_modules(self, target: str) -> dict[str, nn.ModuleList]:
        """The four modules that belong to one target, by their path in the network."""
        return {
            f"{group}.{target}": cast("nn.ModuleList", getattr(self, group)[target])
            for group in HEAD_GROUPS
        }

    def species_embeddings(self) -> dict[str, nn.Module]:
        """Every table with a row for each species, by its path in the network."""
        tables: dict[str, nn.Module] = {
            f"node_embedders.{index}": table for index, table in enumerate(self.node_embedders)
        }
        tables["edge_embedder"] = self.edge_embedder
        for index, layer in enumerate(self.gnn_layers):
            table = cast("GNNLayer", layer).neighbor_embedder
            if table is not None:
                tables[f"gnn_layers.{index}.neighbor_embedder"] = table
        return tables

    def rearrange_species(self, species: Sequence[int], sources: Sequence[int | None]) -> None:
        """Give every embedding table one row for each of other species, in place.

        Args:
            species: atomic numbers, ascending.
            sources: for each of them the row it takes over today; None for a random one.
        """
        for path, table in self.species_embeddings().items():
            assert isinstance(table, nn.Embedding), f"{path} has rows that train apart"
            weight = pick_rows(table.weight.detach(), sources)
            grown = nn.Embedding.from_pretrained(weight, freeze=not table.weight.requires_grad)
            self.set_submodule(path, grown.train(table.training))
        index = species_table(species).to(self.species_to_species_index.device)
        self.species_to_species_index = index

    def neighborhood(self, batch: Batch) -> Neighborhood:
        """The edges of a batch within the cutoff, with their weights."""
        options = self.options
        return build_neighborhood(
            batch.edge_vectors,
            batch.centers,
            batch.neighbors,
            batch.reverse,
            batch.num_atoms,
            cutoff=options.cutoff,
            cutoff_function=options.cutoff_function,
            cutoff_width=options.cutoff_width,
            num_neighbors_adaptive=options.num_neighbors_adaptive,
            adaptive_method=options.adaptive_cutoff_method,
            adaptive_width=options.cutoff_width_adaptive,
        )

    def features(self, batch: Batch, hood: Neighborhood) -> list[tuple[Tensor, Tensor]]:
        """Centre and edge features, [n_atoms, d_node] and [n_edges, d_pet], per read-out."""
        if self.fork is not None and self.fork.active:
            shared = self.fork.tokens(batch)
            tokens = self.advance(batch, hood, shared, self.fork.layers)
        else:
            tokens = self.advance(batch, hood)
        last = [(tokens.nodes, tokens.messages)] if self.feedforward else []
        return [*tokens.readouts, *last]

    def advance(
        self,
        batch: Batch,
        hood: Neighborhood,
        tokens: Tokens | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tokens:
        """Through the GNN layers from ``start`` to before ``stop``, all without them.

        Args:
            batch: the structures.
            hood: their neighbourhoods.
            tokens: what arrives at the first of these layers; None at the very first.
            start, stop: numbers of layers.
        """
        species = self.species_to_species_index[batch.numbers]
        neighbor_species = species[hood.neighbors]
        keys = weigh_keys(hood.factors, hood.layout)
        condition = None
        if self.system_conditioning is not None:
            condition = self.system_conditioning(batch.charges, batch.spins, batch.structure_index)
        if tokens is None:
            tokens = Tokens(self.node_embedders[0](species), self.edge_embedder(neighbor_species))
        nodes, messages, readouts = tokens.nodes, tokens.messages, list(tokens.readouts)
        again = self._again
        for index, layer in list(enumerate(self.gnn_layers))[start:stop]:
            if not self.feedforward:
                nodes = self.node_embedders[index](species)
            nodes, edges = layer(nodes, messages, neighbor_species, keys, hood, again)
            if condition is not None:
                nodes = nodes + condition
            if self.feedforward:
                messages = self._combine(index, edges, messages, hood)
            else:
                messages = 0.5 * (messages + hood.reversed(edges))
                readouts.append((nodes, edges))
        return Tokens(nodes, messages, tuple(readouts))

    @property
    def _again(self) -> bool:
        """Whether this forward pass leaves the rest to be computed again."""
        return self.recompute and self.training and torch.is_grad_enabled()

    def _combine(self, index: int, edges: Tensor, messages: Tensor, hood: Neighborhood) -> Tensor:
        """The messages after a GNN layer of the ``feedforward`` featurizer, [n_edges, d_pet]."""
        norm, mlp = self.combination_norms[index], self.combination_mlps[index]

        def run(edges: Tensor, messages: Tensor) -> tuple[Tensor, ...]:
            both = torch.cat([edges, hood.reversed(edges)], dim=-1)
            return (chain(mlp, both, norm, residual=messages + edges),)

        (combined,) = recomputed(self._again, run, (edges, messages), (norm, mlp))
        return combined

    def forward(self, batch: Batch, targets: Sequence[str]) -> dict[str, Tensor]:
        """Raw per-atom outputs, [n_atoms, num_outputs] a target: unscaled, without baseline."""
        hood = self.neighborhood(batch)
        readouts = self.features(batch, hood)
        return {name: self._read_out(name, readouts, hood, batch.num_atoms) for name in targets}

    def _read_out(
        self,
        target: str,
        readouts: list[tuple[Tensor, Tensor]],
        hood: Neighborhood,
        num_atoms: int,
    ) -> Tensor:
        node_heads, edge_heads, node_last, edge_last = self.head_modules(target).values()
        parts = []
        for index, (nodes, edges) in enumerate(readouts):
            on_nodes = self._head(node_heads[index], node_last[index], nodes)
            on_edges = self._head(edge_heads[index], edge_last[index], edges)
            parts += [on_nodes, sum_over_edges(on_edges, hood, num_atoms)]
        return torch.stack(parts).sum(0)

    def _head(self, head: nn.Module, last: nn.Module, features: Tensor) -> Tensor:
        """The outputs of a head and its last layer, [n, num_outputs]."""

        def run(features: Tensor) -> tuple[Tensor, ...]:
            return (_last(last)(chain(head, features)),)

        (out,) = recomputed(self._again, run, (features,), (head, last))
        return out


def _last(layers: nn.Module) -> nn.Module:
    """The one layer of a target's last layers; checkpoints keep it under the target's block."""
    (layer,) = layers.children()
    return layer
