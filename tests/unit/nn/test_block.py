"""Transformer blocks: widths, activations, and which residuals there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pet_finetune.backends.choice import default_backend, use_backend
from pet_finetune.graph import Neighborhood, make_layout
from pet_finetune.nn.block import NORMALIZATIONS, Block, FeedForward, weigh_keys
from pet_finetune.nn.gnn_layer import make_head, sum_over_edges
from pet_finetune.nn.primitives import SystemConditioning

D_PET, D_FF = 6, 10


def block(d_node=8, normalization="RMSNorm", activation="SwiGLU", kind="PreLN"):
    torch.manual_seed(0)
    made = Block(D_PET, d_node, D_FF, 2, 1.0, normalization, activation, kind).double()
    use_backend(made, default_backend())
    return made


def inputs(d_node):
    generator = torch.Generator().manual_seed(1)
    centers = torch.tensor([0, 0, 2])
    nodes = torch.randn(3, d_node, generator=generator, dtype=torch.float64)
    edges = torch.randn(3, D_PET, generator=generator, dtype=torch.float64)
    layout = make_layout(centers, 3, rectangles=not default_backend().fused)
    return nodes, edges, layout, weigh_keys(torch.ones(3, dtype=torch.float64), layout)


@pytest.mark.parametrize(
    ("d_node", "normalization", "activation", "kind"),
    list(product([D_PET, 9], NORMALIZATIONS, ["SiLU", "SwiGLU"], ["PreLN", "PostLN"])),
)
def test_widths_are_kept_and_every_weight_is_used(d_node, normalization, activation, kind):
    made = block(d_node, normalization, activation, kind)
    nodes, edges = made(*inputs(d_node))
    assert nodes.shape == (3, d_node)
    assert edges.shape == (3, D_PET)
    (nodes.square().sum() + edges.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


def test_the_centre_has_parts_of_its_own_only_where_its_width_differs():
    names = {name.split(".")[0] for name, _ in block(9).named_parameters()}
    plain = {name.split(".")[0] for name, _ in block(D_PET).named_parameters()}
    own = {"center_contraction", "center_expansion", "norm_center_features", "center_mlp"}
    assert names - plain == own


def test_prenorm_with_equal_widths_hands_the_centre_on_without_residual():
    made = block(D_PET)
    with torch.no_grad():
        made.attention.output_linear.weight.zero_()
        made.attention.output_linear.bias.zero_()
        made.mlp.w_out.weight.zero_()
        made.mlp.w_out.bias.zero_()
    given = inputs(D_PET)
    nodes, edges = made(*given)
    assert torch.equal(nodes, torch.zeros_like(nodes))
    assert torch.equal(edges, given[1])


def test_feed_forward_gates_with_the_sigmoid():
    torch.manual_seed(0)
    layer = FeedForward(4, 5, "SwiGLU")
    x = torch.randn(3, 4)
    value, gate = layer.w_in(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), x + layer.w_out(value / (1 + torch.exp(-gate))))
    assert layer.w_in.out_features == 10
    plain = FeedForward(4, 5, "SiLU")
    hidden = plain.w_in(x)
    expected = x + plain.w_out(hidden * torch.sigmoid(hidden))
    torch.testing.assert_close(plain(x), expected)


def test_edges_are_summed_with_their_factors():
    centers = torch.tensor([0, 0, 2])
    factors = torch.tensor([1.0, 0.5, 0.25])
    empty = torch.zeros(3)
    neighborhood = Neighborhood(
        empty, factors, centers, centers, centers, make_layout(centers, 3, False)
    )
    values = torch.tensor([[1.0, 2.0], [4.0, 6.0], [8.0, 0.0]])
    assert sum_over_edges(values, neighborhood, 3).tolist() == [[3.0, 5.0], [0.0, 0.0], [2.0, 0.0]]


def test_heads_map_to_their_width():
    assert make_head(7, 3)(torch.zeros(2, 7)).shape == (2, 3)


def test_conditioning_starts_as_nothing_and_then_tells_systems_apart():
    torch.manual_seed(0)
    conditioning = SystemConditioning(4, max_charge=2, max_spin_multiplicity=3)
    charges, spins = torch.tensor([-2, 0, 2, 2]), torch.tensor([1, 1, 1, 3])
    owner = torch.tensor([0, 0, 1, 2, 3])
    assert (conditioning(charges, spins, owner) == 0).all()
    torch.nn.init.normal_(conditioning.project[-1].weight)
    features = conditioning(charges, spins, owner)
    assert features.shape == (5, 4)
    assert torch.equal(features[0], features[1])
    distinct = features[[0, 2, 3, 4]]
    assert (torch.cdist(distinct, distinct) + torch.eye(4) > 1e-4).all()
