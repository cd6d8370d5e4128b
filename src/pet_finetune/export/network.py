"""The network in the part of Python that TorchScript compiles.

The formulas are those of :mod:`pet_finetune.nn`, whose cutoffs, prompts, conditioning and
repulsion are compiled as they stand. What holds them together is written again: there it goes
through the fused CPU kernels, through autograd functions of its own and through closures, none of
which a file for other programs can hold. Parameters are shared with the network, not copied.

Nothing here imports ``annotations`` from ``__future__``: TorchScript needs them as they are.
"""

from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune.model.pet import PET
from pet_finetune.nn.attention import Attention
from pet_finetune.nn.block import Block, FeedForward
from pet_finetune.nn.gnn_layer import GNNLayer
from pet_finetune.nn.rowwise import LayerNorm, RMSNorm, SiLU, SwiGLU

from .neighborhood import Hood, PlainNeighborhood, key_bias, placed


class PlainSwiGLU(nn.Module):
    """:class:`~pet_finetune.nn.rowwise.SwiGLU`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 d] to [..., d]."""
        value, gate = x.chunk(2, dim=-1)
        return value * torch.sigmoid(gate)


def plain(module: nn.Module) -> nn.Module:
    """A module with torch's own norms and activations in the place of ours, all the way down."""
    if isinstance(module, SiLU):
        return nn.SiLU()
    if isinstance(module, SwiGLU):
        return PlainSwiGLU()
    if isinstance(module, (LayerNorm, RMSNorm)):
        kind = nn.LayerNorm if isinstance(module, LayerNorm) else nn.RMSNorm
        shape = cast("list[int]", list(module.normalized_shape))
        twin = kind(shape, eps=cast("float", module.eps), device="meta")
        for name, parameter in module.named_parameters():
            twin.register_parameter(name, parameter)
        return twin
    for name, child in module.named_children():
        setattr(module, name, plain(child))
    return module


class PlainFeedForward(nn.Module):
    """:class:`~pet_finetune.nn.block.FeedForward`."""

    def __init__(self, source: FeedForward) -> None:
        super().__init__()
        self.w_in, self.w_out = source.w_in, source.w_out
        self.activation = plain(source.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] to [n, width]."""
        out: Tensor = self.w_out(self.activation(self.w_in(x)))
        return out


class PlainAttention(nn.Module):
    """:class:`~pet_finetune.nn.attention.Attention`."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.input_linear, self.output_linear = source.input_linear, source.output_linear
        self.num_heads, self.scale = source.num_heads, source.scale
        self.prompt = source.prompt if source.prompt is not None and source.prompt.enabled else None

    def forward(self, tokens: Tensor, bias: Tensor, hood: Hood) -> Tensor:
        """[n_atoms + n_edges, width], with ``bias`` as of :func:`key_bias`."""
        qkv = self.input_linear(tokens)
        room = qkv.new_zeros(hood.num_atoms * hood.width, qkv.size(1))
        padded = placed(qkv, hood.slots, room)
        split = padded.view(hood.num_atoms, hood.width, 3, self.num_heads, -1)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.matmul(queries * self.scale, keys.transpose(-2, -1)) + bias
        mixed = torch.matmul(scores.softmax(dim=-1), values).transpose(1, 2).flatten(2)
        mixed = mixed.flatten(0, 1).index_select(0, hood.slots)
        if self.prompt is not None:
            _, prompt_keys, prompt_values = self.input_linear(self.prompt.adaption_prompt).chunk(
                3, dim=-1
            )
            own_queries = qkv[:, : mixed.size(1)]
            mixed = mixed + self.prompt(own_queries, prompt_keys, prompt_values, self.scale)
        out: Tensor = self.output_linear(mixed)
        return out


class WideCenter(nn.Module):
    """What a block does where the centre token is wider than those of edges."""

    def __init__(self, source: Block) -> None:
        super().__init__()
        self.contraction = source.center_contraction
        self.expansion = source.center_expansion
        self.norm = plain(source.norm_center_features)
        self.mlp = PlainFeedForward(source.center_mlp)

    def contracted(self, nodes: Tensor) -> Tensor:
        """[n_atoms, d_node] to [n_atoms, d_pet]."""
        out: Tensor = self.contraction(nodes)
        return out

    def forward(self, nodes: Tensor, mixed: Tensor) -> Tensor:
        """The tokens [n_atoms, d_node] and what attention made of them, [n_atoms, d_pet]."""
        nodes = nodes + self.expansion(mixed)
        return nodes + self.mlp(self.norm(nodes))


class PlainBlock(nn.Module):
    """:class:`~pet_finetune.nn.block.Block`."""

    def __init__(self, source: Block) -> None:
        super().__init__()
        self.post_norm = source.post_norm
        self.attention = PlainAttention(source.attention)
        self.norm_attention = plain(source.norm_attention)
        self.norm_mlp = plain(source.norm_mlp)
        self.mlp = PlainFeedForward(source.mlp)
        self.wide_center = WideCenter(source) if source.wide_center else None

    def forward(
        self, nodes: Tensor, edges: Tensor, bias: Tensor, hood: Hood
    ) -> tuple[Tensor, Tensor]:
        """Centre tokens [n_atoms, d_node] and edges [n_edges, d_pet]."""
        sizes = [nodes.size(0), edges.size(0)]
        centers = nodes
        if self.wide_center is not None:
            centers = self.wide_center.contracted(nodes)
        tokens = torch.cat([centers, edges])
        if self.post_norm:
            tokens = self.norm_attention(tokens + self.attention(tokens, bias, hood))
            tokens = self.norm_mlp(tokens + self.mlp(tokens))
            new_centers, new_edges = tokens.split(sizes)
        else:
            mixed = self.attention(self.norm_attention(tokens), bias, hood)
            new_centers, new_edges = mixed.split(sizes)
            new_edges = edges + new_edges
            new_edges = new_edges + self.mlp(self.norm_mlp(new_edges))
        if self.wide_center is not None:
            new_centers = self.wide_center(nodes, new_centers)
        return new_centers, new_edges


class PlainGNNLayer(nn.Module):
    """:class:`~pet_finetune.nn.gnn_layer.GNNLayer`, and what a network does around it.

    Args:
        source: a network.
        index: of the layer.
    """

    def __init__(self, network: PET, index: int) -> None:
        super().__init__()
        source = cast("GNNLayer", network.gnn_layers[index])
        self.edge_embedder = source.edge_embedder
        self.neighbor_embedder = source.neighbor_embedder
        self.compress = plain(source.compress)
        self.blocks = nn.ModuleList(
            PlainBlock(cast("Block", block)) for block in source.trans.layers
        )
        # The featurizers: `feedforward` mixes messages, `residual` embeds the centres anew.
        mixing = network.feedforward
        self.norm = plain(network.combination_norms[index]) if mixing else None
        self.mlp = plain(network.combination_mlps[index]) if mixing else None
        self.node_embedder = None if mixing else network.node_embedders[index]

    def forward(
        self, nodes: Tensor, messages: Tensor, species: Tensor, bias: Tensor, hood: Hood
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Centre tokens, edge tokens, and the messages to the next layer."""
        if self.node_embedder is not None:
            nodes = self.node_embedder(species)
        geometry = torch.cat([hood.vectors, hood.distances.unsqueeze(-1)], dim=-1)
        parts = [self.edge_embedder(geometry)]
        if self.neighbor_embedder is not None:
            parts.append(self.neighbor_embedder(species[hood.neighbors]))
        parts.append(messages)
        edges = self.compress(torch.cat(parts, dim=-1))
        for block in self.blocks:
            nodes, edges = block(nodes, edges, bias, hood)
        # Reversing is its own inverse, so that placing the rows gathers them.
        back = placed(edges, hood.reverse, torch.empty_like(edges))
        if self.norm is not None and self.mlp is not None:
            both = self.norm(torch.cat([edges, back], dim=-1))
            return nodes, edges, messages + edges + self.mlp(both)
        return nodes, edges, 0.5 * (messages + back)


class PlainPET(nn.Module):
    """:class:`~pet_finetune.model.pet.PET` up to its heads.

    Args:
        source: a network without adapters; it is given up.
    """

    species_index: Tensor

    def __init__(self, source: PET) -> None:
        super().__init__()
        self.neighborhood = PlainNeighborhood(source.options)
        self.register_buffer("species_index", source.species_to_species_index)
        self.feedforward = source.feedforward
        self.node_embedder = source.node_embedders[0]
        self.edge_embedder = source.edge_embedder
        layers = range(len(source.gnn_layers))
        self.gnn_layers = nn.ModuleList(PlainGNNLayer(source, index) for index in layers)
        conditioning = source.system_conditioning
        self.system_conditioning = None if conditioning is None else plain(conditioning)

    def forward(
        self,
        numbers: Tensor,
        hood: Hood,
        charges: Tensor,
        spins: Tensor,
        structure_index: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Centre features [n_atoms, d_node] and edge features [n_edges, d_pet] of each read-out.

        Args:
            numbers: [n_atoms], atomic numbers that the model knows.
            hood: from ``self.neighborhood``.
            charges, spins: [n_structures] int64, used by models that are told them.
            structure_index: [n_atoms].
        """
        species = self.species_index[numbers]
        bias = key_bias(hood)
        nodes = self.node_embedder(species)
        edges = messages = self.edge_embedder(species[hood.neighbors])
        node_readouts: list[Tensor] = []
        edge_readouts: list[Tensor] = []
        for layer in self.gnn_layers:
            nodes, edges, messages = layer(nodes, messages, species, bias, hood)
            if self.system_conditioning is not None:
                nodes = nodes + self.system_conditioning(charges, spins, structure_index)
            if not self.feedforward:
                node_readouts.append(nodes)
                edge_readouts.append(edges)
        if self.feedforward:
            node_readouts.append(nodes)
            edge_readouts.append(messages)
        return node_readouts, edge_readouts
