"""The Point Edge Transformer in one read (arXiv:2305.19302).

Parameter names are those of metatrain's ``backend`` module, so that its state dicts load by
taking that prefix off.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Optional, cast

import torch
from torch import Tensor, nn

from pet_finetune.backends.choice import Accelerated, default_backend, use_backend
from pet_finetune.backends.fused import permute
from pet_finetune.backends.instructions import CannotRecord, Part, Recorder, Rows
from pet_finetune.backends.reference import join, permute_rows
from pet_finetune.graph import Batch, Neighborhood
from pet_finetune.keys import TargetSpec
from pet_finetune.nn.block import Block, weigh_keys
from pet_finetune.nn.gnn_layer import GNNLayer, LongRangeFeaturizer, make_head, sum_over_edges
from pet_finetune.nn.neighborhood import NeighborhoodBuilder
from pet_finetune.nn.primitives import LayerNorm, Prologue, SiLU, SystemConditioning, table_of
from pet_finetune.nn.projection import Chain, Memory, as_row, record_chain, weights_of
from pet_finetune.nn.recompute import recomputed

from .prediction import features_key
from .shared_layers import SharedLayers, Tokens
from .terms import pick_rows, species_table

if TYPE_CHECKING:
    from pet_finetune.config.run_options import ModelOptions

#: The parts of the network that belong to single targets.
HEAD_GROUPS = ("node_heads", "edge_heads", "node_last_layers", "edge_last_layers")


class PET(Accelerated, nn.Module):
    """Maps a batch of structures to per-atom outputs of each target.

    Args:
        options: the architecture's hyperparameters.
        species: atomic numbers the model knows, ascending.
        targets: what the model predicts; heads are made for each.
    """

    species_to_species_index: Tensor
    feedforward: Final[bool]

    def __init__(
        self, options: "ModelOptions", species: Sequence[int], targets: Iterable[TargetSpec]
    ) -> None:
        super().__init__()
        self.options = options
        self.neighborhood = NeighborhoodBuilder(
            cutoff=options.cutoff,
            cutoff_function=options.cutoff_function,
            cutoff_width=options.cutoff_width,
            num_neighbors_adaptive=options.num_neighbors_adaptive,
            adaptive_method=options.adaptive_cutoff_method,
            adaptive_width=options.cutoff_width_adaptive,
        )
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
        self.shared_layers: SharedLayers | None = None
        self.feedforward = options.featurizer_type == "feedforward"
        mixers = options.num_gnn_layers if self.feedforward else 0
        double = 2 * options.d_pet
        self.combination_norms = nn.ModuleList(LayerNorm(double) for _ in range(mixers))
        self.combination_mlps = nn.ModuleList(
            Chain(nn.Linear(double, double), SiLU(), nn.Linear(double, options.d_pet))
            for _ in range(mixers)
        )
        self.num_readouts = 1 if self.feedforward else options.num_gnn_layers
        #: How many numbers of each atom the last layer of a target sees.
        self.last_layer_width = 2 * options.d_head * self.num_readouts
        self.node_embedders = nn.ModuleList(
            nn.Embedding(len(species), options.d_node) for _ in range(self.num_readouts)
        )
        self.edge_embedder = nn.Embedding(len(species), options.d_pet)
        self.system_conditioning = (
            SystemConditioning(options.d_node, options.max_charge, options.max_spin_multiplicity)
            if options.system_conditioning
            else None
        )
        far = options.long_range.model_dump()
        self.long_range_featurizer = (
            LongRangeFeaturizer(options.d_node, options.cutoff, far) if far["enable"] else None
        )
        self.node_heads = nn.ModuleDict()
        self.edge_heads = nn.ModuleDict()
        self.node_last_layers = nn.ModuleDict()
        self.edge_last_layers = nn.ModuleDict()
        use_backend(self, default_backend())
        for target in targets:
            self.add_target(target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PET":
        """On another device, or in another precision, another back end may have to compute."""
        super()._apply(fn, recurse)
        use_backend(self, self.chosen)
        return self

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
        use_backend(self, self.chosen)

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
        """Give every embedding table one row for each of other species, ascending, in place.

        ``sources`` are the rows they take over today; None is a random one.
        """
        for path, table in self.species_embeddings().items():
            assert isinstance(table, nn.Embedding), f"{path} has rows that train apart"
            weight = pick_rows(table.weight.detach(), sources)
            grown = nn.Embedding.from_pretrained(weight, freeze=not table.weight.requires_grad)
            self.set_submodule(path, grown.train(table.training))
        index = species_table(species).to(self.species_to_species_index.device)
        self.species_to_species_index = index

    def features(
        self, batch: Batch, neighborhood: Neighborhood, memory: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """Centre and edge features, [n_atoms, d_node] and [n_edges, d_pet], per read-out."""
        shared: Tokens | None = None
        start = 0
        if not torch.jit.is_scripting():
            if self.shared_layers is not None and self.shared_layers.active:
                shared, start = self.shared_layers.tokens(batch, memory), self.shared_layers.count
        tokens = self.advance(batch, neighborhood, shared, start, memory=memory)
        readouts = [(tokens.nodes, tokens.messages)] if self.feedforward else tokens.readouts
        if self.long_range_featurizer is not None:
            readouts = self.long_range_featurizer(readouts, batch)
        return readouts

    def advance(
        self,
        batch: Batch,
        neighborhood: Neighborhood,
        tokens: Tokens | None = None,
        start: int = 0,
        stop: int = 1000,
        memory: int = 0,
    ) -> Tokens:
        """Through the GNN layers from ``start`` to before ``stop``, all without them.

        Args:
            batch: the structures.
            neighborhood: their neighbourhoods.
            tokens: what arrives at the first of these layers; None at the very first.
            start: number of the first layer.
            stop: number of the layer to stop before.
            memory: one of :class:`~pet_finetune.nn.projection.Memory`.
        """
        species = self.species_to_species_index[batch.numbers]
        neighbor_species = species[neighborhood.neighbors]
        bias = weigh_keys(neighborhood.factors, neighborhood.layout)
        if tokens is None:
            nodes, messages = self.node_embedders[0](species), self.edge_embedder(neighbor_species)
            readouts: list[tuple[Tensor, Tensor]] = []
        else:
            nodes, messages, readouts = tokens.nodes, tokens.messages, list(tokens.readouts)
        if self.feedforward:
            mixers = zip(self.gnn_layers, self.combination_norms, self.combination_mlps)  # noqa: B905
            for index, (layer, norm, mlp) in enumerate(mixers):
                if start <= index < stop:
                    nodes, edges = layer(
                        nodes, messages, neighbor_species, neighborhood, bias, memory
                    )
                    nodes = self.conditioned(nodes, batch)
                    back = self.of_reverse(edges, neighborhood)
                    if torch.jit.is_scripting():
                        both = join([edges, back], 1)
                        messages = mlp(both, norm.op(), messages + edges)  # type: ignore[operator]
                    else:
                        messages = _combined(norm, mlp, edges, back, messages, memory)
        else:
            layers = zip(self.gnn_layers, self.node_embedders)  # noqa: B905
            for index, (layer, embedder) in enumerate(layers):
                if start <= index < stop:
                    nodes = embedder(species)
                    nodes, edges = layer(
                        nodes, messages, neighbor_species, neighborhood, bias, memory
                    )
                    nodes = self.conditioned(nodes, batch)
                    messages = 0.5 * (messages + self.of_reverse(edges, neighborhood))
                    readouts.append((nodes, edges))
        return Tokens(nodes, messages, readouts)

    def of_reverse(self, edges: Tensor, neighborhood: Neighborhood) -> Tensor:
        """The tokens of the reverse of each edge, [n_edges, d_pet]."""
        if not torch.jit.is_scripting():
            if self.backend.fused:
                return permute(edges, neighborhood.reverse, neighborhood.reverse)
        return permute_rows(edges, neighborhood.reverse, neighborhood.reverse)

    def conditioned(self, nodes: Tensor, batch: Batch) -> Tensor:
        """The centre tokens with what charge and spin add to them, [n_atoms, d_node]."""
        if self.system_conditioning is not None:
            told = self.system_conditioning(batch.charges, batch.spins, batch.structure_index)
            nodes = nodes + told
        return nodes

    def forward(
        self,
        batch: Batch,
        targets: list[str],
        predicts: bool = False,
        features_of: Optional[list[str]] = None,  # noqa: UP045
    ) -> dict[str, Tensor]:
        """Raw per-atom outputs, [n_atoms, num_outputs] a target: unscaled, without baseline.

        Args:
            batch: the structures.
            targets: which outputs.
            predicts: a promise that what comes back is differentiated once at most, and by the
                geometry alone. It then takes less memory.
            features_of: targets, of those, for which what the last layer sees comes back too, under
                :func:`features_key`, [n_atoms, last_layer_width]: for each read-out the node's and
                the sum over its edges, in metatrain's order.
        """
        neighborhood = self.neighborhood(batch)
        memory = self.memory(predicts)
        readouts = self.features(batch, neighborhood, memory)
        num_atoms = batch.numbers.size(0)
        outputs: dict[str, Tensor] = {}
        for name, node_heads, edge_heads, node_last, edge_last in zip(  # noqa: B905
            self.node_heads.keys(),
            self.node_heads.values(),
            self.edge_heads.values(),
            self.node_last_layers.values(),
            self.edge_last_layers.values(),
        ):
            if name in targets:
                parts: list[Tensor] = []
                seen: list[Tensor] = []
                wanted = features_of is not None and name in features_of
                for index, (node_head, edge_head, node_layers, edge_layers) in enumerate(
                    zip(node_heads, edge_heads, node_last, edge_last)  # noqa: B905
                ):
                    on_nodes, on_edges = readouts[index]
                    if torch.jit.is_scripting() or wanted:
                        on_nodes, on_edges = node_head(on_nodes), edge_head(on_edges)
                        if wanted:
                            seen.append(on_nodes)
                            zeros = on_edges.new_zeros([num_atoms, on_edges.size(-1)])
                            seen.append(sum_over_edges(on_edges, neighborhood, zeros))
                        for layer in node_layers.values():
                            on_nodes = layer(on_nodes)
                        for layer in edge_layers.values():
                            on_edges = layer(on_edges)
                    else:
                        on_nodes = _head(node_head, node_layers, on_nodes, memory)
                        on_edges = _head(edge_head, edge_layers, on_edges, memory)
                    parts.append(sum_over_edges(on_edges, neighborhood, on_nodes))
                outputs[name] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
                if wanted:
                    outputs[features_key(name)] = torch.cat(seen, dim=1)
        return outputs

    def memory(self, predicts: bool) -> int:
        """Memory mode of the graph, one of :class:`~pet_finetune.nn.projection.Memory`."""
        if not torch.jit.is_scripting():
            if predicts or not torch.is_grad_enabled():
                return int(Memory.INPUTS_ONLY)
            if self.recompute and self.training:
                return int(Memory.RECOMPUTE)
        return 0

    def record(self, to: Recorder, target: str) -> None:
        """:meth:`forward` as instructions for one output of each atom, given the neighbourhoods."""
        if self.long_range_featurizer is not None:
            raise CannotRecord("long-range features")
        options = self.options
        nodes = self._looked_up(to, Part.ATOMS, self.node_embedders[0])
        messages = self._looked_up(to, Part.EDGES, self.edge_embedder)
        for index, layer in enumerate(self.gnn_layers):
            if index and not self.feedforward:
                nodes = self._looked_up(to, Part.ATOMS, self.node_embedders[index])
            nodes, edges = cast("GNNLayer", layer).record(to, nodes, messages)
            if self.system_conditioning is not None:
                nodes = to.condition(nodes)
            if self.feedforward:
                both = to.take(edges, to.buffer(Part.EDGES, 2 * options.d_pet))
                to.take(edges, both, options.d_pet, reversed_edges=True)
                total = to.take(messages, to.buffer(Part.EDGES, options.d_pet))
                to.take(edges, total, add=True)
                norm = cast("LayerNorm", self.combination_norms[index]).op()
                messages = record_chain(to, self.combination_mlps[index], both, norm, total)
            else:
                mixed = to.take(messages, to.buffer(Part.EDGES, options.d_pet), factor=0.5)
                messages = to.take(edges, mixed, reversed_edges=True, add=True, factor=0.5)
                self._record_read_out(to, target, index, nodes, edges)
        if self.feedforward:
            self._record_read_out(to, target, 0, nodes, messages)

    def _looked_up(self, to: Recorder, part: Part, embedding: nn.Module) -> Rows:
        table = table_of(embedding)
        rows = to.buffer(part, table.shape[1])
        to.look_up(rows, 0, table)
        return rows

    def _record_read_out(
        self, to: Recorder, target: str, index: int, nodes: Rows, edges: Rows
    ) -> None:
        node_heads, edge_heads, node_last, edge_last = self.head_modules(target).values()
        for x, heads, last in ((nodes, node_heads, node_last), (edges, edge_heads, edge_last)):
            (output,) = last[index].children()
            weight, bias = weights_of(output)
            *layers, activation = heads[index].children()
            if len(weight) != 1 or bias is None or not isinstance(activation, Prologue):
                raise CannotRecord("several outputs, no bias, or a head of another kind")
            hidden = record_chain(to, nn.Sequential(*layers), x)
            to.read(hidden, weight, bias, as_row(activation.op(), to))


def _combined(
    norm: nn.Module, mlp: nn.Module, edges: Tensor, back: Tensor, messages: Tensor, memory: int
) -> Tensor:
    """The messages after a GNN layer of the ``feedforward`` featurizer."""

    def run(edges: Tensor, back: Tensor, messages: Tensor) -> tuple[Tensor, ...]:
        both = join([edges, back], 1)
        return (mlp(both, cast("LayerNorm", norm).op(), messages + edges, memory),)

    inputs = (edges, back, messages)
    again = memory == Memory.RECOMPUTE
    (out,) = recomputed(run, inputs, (norm, mlp)) if again else run(*inputs)
    return out


def _head(head: nn.Module, last_layers: nn.Module, features: Tensor, memory: int) -> Tensor:
    """The outputs of a head and its last layer, [n, num_outputs]."""

    def run(features: Tensor) -> tuple[Tensor, ...]:
        (last,) = last_layers.children()  # under the name of the target's block
        return (last(head(features)),)

    again = memory == Memory.RECOMPUTE
    (out,) = recomputed(run, (features,), (head, last_layers)) if again else run(features)
    return out
