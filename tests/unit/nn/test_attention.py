"""Attention: what it computes, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from pet_finetune.backends.choice import default_backend, use_backend
from pet_finetune.graph import make_layout
from pet_finetune.nn.block import Attention, weigh_keys

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
