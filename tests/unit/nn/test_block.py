"""Attention, with and without prompts, and transformer blocks: widths, activations, residuals."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from pet_finetune.backends.choice import default_backend, use_backend
from pet_finetune.graph import Neighborhood, make_layout
from pet_finetune.nn.block import NORMALIZATIONS, Attention, Block, FeedForward, weigh_keys
from pet_finetune.nn.gnn_layer import make_head, sum_over_edges
from pet_finetune.nn.primitives import SystemConditioning

WIDTH, HEADS = 6, 2


@pytest.fixture
def attention():
    torch.manual_seed(0)
    made = Attention(WIDTH, HEADS, temperature=1.3).double()
    use_backend(made, default_backend())
    return made


def tokens_of(counts, seed=1):
    """Centre tokens, edge tokens and factors of atoms with these numbers of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    edges = sum(counts)
    tokens = torch.randn(len(counts) + edges, WIDTH, generator=generator, dtype=torch.float64)
    factors = torch.rand(edges, generator=generator, dtype=torch.float64)
    centers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return tokens, factors, centers


def attend(attention, tokens, factors, centers, num_atoms):
    layout = make_layout(centers, num_atoms, rectangles=not attention.backend.fused)
    return attention(tokens, layout, weigh_keys(factors, layout))


def by_hand(attention, tokens, factors):
    """One atom: tokens [1 + n, width], the first is the centre's."""
    weight, bias = attention.input_linear.weight, attention.input_linear.bias
    queries, keys, values = (tokens @ weight.T + bias).chunk(3, dim=-1)
    size = WIDTH // HEADS
    logs = torch.cat([torch.zeros(1, dtype=torch.float64), factors.clamp_min(1e-15).log()])
    parts = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = queries[:, part] @ keys[:, part].T / (math.sqrt(size) * 1.3) + logs
        parts.append(scores.softmax(-1) @ values[:, part])
    out = torch.cat(parts, dim=-1)
    return out @ attention.output_linear.weight.T + attention.output_linear.bias


def test_equals_the_formula(attention):
    tokens, factors, centers = tokens_of([3])
    out = attend(attention, tokens, factors, centers, 1)
    torch.testing.assert_close(out, by_hand(attention, tokens, factors))


def test_each_atom_is_on_its_own_whatever_pads_it(attention):
    counts = [2, 0, 5]
    tokens, factors, centers = tokens_of(counts)
    together = attend(attention, tokens, factors, centers, 3)
    edges = len(counts) + torch.arange(sum(counts))
    for atom, count in enumerate(counts):
        mine = torch.cat([torch.tensor([atom]), edges[centers == atom]])
        alone = attend(
            attention,
            tokens[mine],
            factors[centers == atom],
            torch.zeros(count, dtype=torch.int64),
            1,
        )
        torch.testing.assert_close(together[mine], alone)


def test_an_edge_at_the_cutoff_does_not_matter(attention):
    tokens, factors, centers = tokens_of([3])
    factors[2] = 0.0
    with_edge = attend(attention, tokens, factors, centers, 1)[:3]
    without = attend(attention, tokens[:3], factors[:2], centers[:2], 1)
    torch.testing.assert_close(with_edge, without, atol=1e-12, rtol=0)


def test_twice_differentiable_next_to_empty_slots(attention):
    tokens, factors, centers = tokens_of([2, 0])
    tokens.requires_grad_(True)
    factors.requires_grad_(True)
    assert torch.autograd.gradgradcheck(
        lambda t, f: attend(attention, t, f, centers, 2), (tokens, factors)
    )


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
    onto = torch.ones(3, 2)
    assert sum_over_edges(values, neighborhood, onto).tolist() == [
        [4.0, 6.0],
        [1.0, 1.0],
        [3.0, 1.0],
    ]


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


PROMPTED_WIDTH, PROMPTED_HEADS, LENGTH = 16, 2, 3
COUNTS = [2, 0, 5]


def prompted_attention(gates=None, seed=0):
    torch.manual_seed(seed)
    made = Attention(PROMPTED_WIDTH, PROMPTED_HEADS, temperature=1.3, num_prompts=LENGTH).double()
    use_backend(made, default_backend())
    if gates is not None:
        with torch.no_grad():
            made.prompt.adaption_gate.copy_(torch.tensor(gates, dtype=torch.float64))
    return made


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    rows = len(COUNTS) + sum(COUNTS)
    return torch.randn(rows, PROMPTED_WIDTH, generator=generator, dtype=torch.float64)


def run(layer, tokens):
    centers = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    factors = torch.linspace(0.1, 1.0, sum(COUNTS), dtype=torch.float64)
    layout = make_layout(centers, len(COUNTS), rectangles=not layer.backend.fused)
    return layer(tokens, layout, weigh_keys(factors, layout))


def test_prompts_equal_the_formula(tokens):
    """The paper's: beside the softmax over the tokens one over the prompt, times its gate."""
    layer = prompted_attention(gates=[0.7, -0.4])
    found = run(layer, tokens)
    prompt, layer.prompt = layer.prompt, None
    without = run(layer, tokens)
    queries = layer.input_linear(tokens).chunk(3, -1)[0]
    _, keys, values = layer.input_linear(prompt.adaption_prompt).chunk(3, -1)
    size = PROMPTED_WIDTH // PROMPTED_HEADS
    parts = []
    for head, gate in enumerate((0.7, -0.4)):
        part = slice(head * size, (head + 1) * size)
        scores = queries[:, part] @ keys[:, part].T / (math.sqrt(size) * 1.3)
        parts.append(gate * scores.softmax(-1) @ values[:, part])
    read = torch.cat(parts, -1) @ layer.output_linear.weight.T
    torch.testing.assert_close(found - without, read, rtol=0, atol=1e-12)
    assert read.abs().max() > 0.01


def test_a_fresh_prompt_changes_no_bit(tokens):
    layer = prompted_attention()
    fresh = run(layer, tokens)
    layer.prompt = None
    assert torch.equal(fresh, run(layer, tokens))


def test_a_fresh_prompt_learns(tokens):
    """The gates get a gradient at once, and the tokens as soon as a gate is open."""
    layer = prompted_attention()
    run(layer, tokens).pow(2).sum().backward()
    assert layer.prompt.adaption_gate.grad.abs().min() > 0
    assert layer.prompt.adaption_prompt.grad.abs().max() == 0
    opened = prompted_attention(gates=[0.1, 0.1])
    run(opened, tokens).pow(2).sum().backward()
    assert opened.prompt.adaption_prompt.grad.abs().min() > 0


def test_can_be_differentiated_twice(tokens):
    layer = prompted_attention(gates=[0.7, -0.4])
    assert torch.autograd.gradgradcheck(lambda x: run(layer, x), tokens[:10].requires_grad_())
