"""PET written down as instructions, see :mod:`pet_finetune.kernels.listing`.

Each function here repeats the forward pass of the module that it is named after, and has to be
changed with it; ``tests/contract/test_frozen.py`` compares the two.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune.kernels.listing import Instructions, Listing, Part, Row, Rows
from pet_finetune.nn.attention import Attention
from pet_finetune.nn.block import Block, FeedForward
from pet_finetune.nn.embedding import GrownEmbedding
from pet_finetune.nn.gnn_layer import GNNLayer
from pet_finetune.nn.projection import Adapted
from pet_finetune.nn.rowwise import Prologue, settings

from .pet import PET


class CannotList(Exception):
    """The network has a part that there are no instructions for."""


@torch.no_grad()
def list_network(network: PET, target: str) -> Instructions | None:
    """The instructions for one output of each atom, or None where there are none for a part."""
    listing = Listing(network.edge_embedder.weight.dtype)
    try:
        _network(listing, network, target)
    except (CannotList, ValueError):  # a part of another kind, or of another width
        return None
    return listing.finish()


def _network(to: Listing, network: PET, target: str) -> None:
    options = network.options
    nodes = to.buffer(Part.ATOMS, options.d_node)
    to.look_up(nodes, 0, _table(network.node_embedders[0]))
    messages = to.buffer(Part.EDGES, options.d_pet)
    to.look_up(messages, 0, _table(network.edge_embedder))
    for index, layer in enumerate(network.gnn_layers):
        if index and not network.feedforward:
            nodes = to.buffer(Part.ATOMS, options.d_node)
            to.look_up(nodes, 0, _table(network.node_embedders[index]))
        nodes, edges = _gnn_layer(to, cast("GNNLayer", layer), nodes, messages)
        if network.system_conditioning is not None:
            nodes = to.condition(nodes)
        if network.feedforward:
            messages = _combine(to, network, index, edges, messages)
        else:
            mixed = to.take(messages, to.buffer(Part.EDGES, options.d_pet), factor=0.5)
            messages = to.take(edges, mixed, turned=True, add=True, factor=0.5)
            _read_out(to, network, target, index, nodes, edges)
    if network.feedforward:
        _read_out(to, network, target, 0, nodes, messages)


def _gnn_layer(to: Listing, layer: GNNLayer, nodes: Rows, messages: Rows) -> tuple[Rows, Rows]:
    width = messages.width
    embedder = layer.edge_embedder
    if type(embedder) is not nn.Linear:
        weight, bias = _weights(embedder)
    else:
        weight, bias = embedder.weight, embedder.bias
    parts = 2 if layer.neighbor_embedder is None else 3
    joined = to.buffer(Part.EDGES, parts * width)
    to.embed(joined, 0, weight, _given(bias))
    if layer.neighbor_embedder is not None:
        to.look_up(joined, width, _table(layer.neighbor_embedder))
    to.take(messages, joined, (parts - 1) * width)
    edges = _chain(to, layer.compress, joined)
    for block in layer.trans.layers:
        nodes, edges = _block(to, cast("Block", block), nodes, edges)
    return nodes, edges


def _block(to: Listing, block: Block, nodes: Rows, edges: Rows) -> tuple[Rows, Rows]:
    tokens = to.buffer(Part.ALL, edges.width)
    atoms = tokens.of(Part.ATOMS)
    if block.wide_center:
        _project(to, block.center_contraction, nodes, out=atoms)
    else:
        to.take(nodes, atoms)
    to.take(edges, tokens.of(Part.EDGES))
    if block.post_norm:
        mixed = _attention(to, block.attention, tokens, None)
        weight, bias = _weights(block.attention.output_linear)
        tokens = to.norm(
            to.project(mixed, weight, bias, residual=tokens), _row(block.norm_attention, to)
        )
        tokens = to.norm(
            _feed_forward(to, block.mlp, tokens, None, tokens), _row(block.norm_mlp, to)
        )
        new_centers, new_edges = tokens.of(Part.ATOMS), tokens.of(Part.EDGES)
    else:
        mixed = _attention(to, block.attention, tokens, _row(block.norm_attention, to))
        out = block.attention.output_linear
        new_centers = _project(to, out, mixed.of(Part.ATOMS))
        new_edges = _project(to, out, mixed.of(Part.EDGES), residual=edges)
        new_edges = _feed_forward(to, block.mlp, new_edges, _row(block.norm_mlp, to), new_edges)
    if block.wide_center:
        new_centers = _project(to, block.center_expansion, new_centers, residual=nodes)
        norm = _row(block.norm_center_features, to)
        new_centers = _feed_forward(to, block.center_mlp, new_centers, norm, new_centers)
    return new_centers, new_edges


def _attention(to: Listing, attention: Attention, tokens: Rows, norm: Row | None) -> Rows:
    """Up to the output layer."""
    if attention.prompt is not None and attention.prompt.enabled:
        raise CannotList("a prompt")
    qkv = _project(to, attention.input_linear, tokens, norm)
    return to.attend(qkv, attention.num_heads, attention.scale)


def _feed_forward(to: Listing, mlp: FeedForward, x: Rows, norm: Row | None, residual: Rows) -> Rows:
    hidden = _project(to, mlp.w_in, x, norm)
    return _project(to, mlp.w_out, hidden, _row(mlp.activation, to), residual)


def _combine(to: Listing, network: PET, index: int, edges: Rows, messages: Rows) -> Rows:
    width = edges.width
    both = to.buffer(Part.EDGES, 2 * width)
    to.take(edges, both)
    to.take(edges, both, width, turned=True)
    total = to.take(messages, to.buffer(Part.EDGES, width))
    to.take(edges, total, add=True)
    norm = _row(network.combination_norms[index], to)
    return _chain(to, network.combination_mlps[index], both, norm, total)


def _read_out(to: Listing, network: PET, target: str, index: int, nodes: Rows, edges: Rows) -> None:
    node_heads, edge_heads, node_last, edge_last = network.head_modules(target).values()
    for x, heads, last in ((nodes, node_heads, node_last), (edges, edge_heads, edge_last)):
        layers = list(_sequence(heads[index]))
        (output,) = last[index].children()
        weight, bias = _weights(output)
        if len(weight) != 1:
            raise CannotList("several outputs")
        hidden = _chain(to, nn.Sequential(*layers[:-1]), x)
        to.read(hidden, weight, _given(bias), _row(layers[-1], to))


def _chain(
    to: Listing,
    layers: nn.Module,
    x: Rows,
    norm: Row | None = None,
    residual: Rows | None = None,
) -> Rows:
    pending = norm
    *_, last = _sequence(layers)
    for layer in _sequence(layers):
        if isinstance(layer, Prologue):
            pending = _row(layer, to)
        else:
            x = _project(to, layer, x, pending, residual if layer is last else None)
            pending = None
    return x


def _project(
    to: Listing,
    linear: nn.Module,
    x: Rows,
    before: Row | None = None,
    residual: Rows | None = None,
    out: Rows | None = None,
) -> Rows:
    weight, bias = _weights(linear)
    return to.project(x, weight, bias, before, residual, out)


def _sequence(layers: nn.Module) -> list[nn.Module]:
    if not isinstance(layers, nn.Sequential):  # wrapped by another library's adapters, say
        raise CannotList("layers that are no sequence")
    return list(layers)


def _weights(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What the layer multiplies with, and its bias."""
    if isinstance(linear, Adapted) and linear.fusable:
        return linear.effective_weight(), linear.bias
    if type(linear) is not nn.Linear:
        raise CannotList(f"a {type(linear).__name__}")
    return linear.weight, linear.bias


def _given(bias: Tensor | None) -> Tensor:
    if bias is None:
        raise CannotList("a layer without a bias")
    return bias


def _row(prologue: nn.Module, to: Listing) -> Row:
    if not isinstance(prologue, Prologue):
        raise CannotList(f"a {type(prologue).__name__}")
    return Row(**settings(prologue.op(), to.dtype))


def _table(table: nn.Module) -> Tensor:
    if isinstance(table, GrownEmbedding):
        return table.table()
    if not isinstance(table, nn.Embedding):
        raise CannotList(f"a {type(table).__name__}")
    return table.weight
