"""Prompts in attention: what they compute, neutral at first, the same with and without kernels."""

from __future__ import annotations

import math

import pytest
import torch

from pet_finetune.backends.choice import default_backend, use_backend
from pet_finetune.graph import make_layout
from pet_finetune.nn.block import Attention, weigh_keys

WIDTH, HEADS, LENGTH = 16, 2, 3
COUNTS = [2, 0, 5]


def attention(gates=None, seed=0):
    torch.manual_seed(seed)
    made = Attention(WIDTH, HEADS, temperature=1.3, num_prompts=LENGTH).double()
    use_backend(made, default_backend())
    if gates is not None:
        with torch.no_grad():
            made.prompt.adaption_gate.copy_(torch.tensor(gates, dtype=torch.float64))
    return made


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    rows = len(COUNTS) + sum(COUNTS)
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


def run(layer, tokens):
    centers = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    factors = torch.linspace(0.1, 1.0, sum(COUNTS), dtype=torch.float64)
    layout = make_layout(centers, len(COUNTS), rectangles=not layer.backend.fused)
    return layer(tokens, layout, weigh_keys(factors, layout))


def test_equals_the_formula(tokens):
    """The paper's: beside the softmax over the tokens one over the prompt, times its gate."""
    layer = attention(gates=[0.7, -0.4])
    found = run(layer, tokens)
    layer.prompt.enabled = False
    without = run(layer, tokens)
    queries = layer.input_linear(tokens).chunk(3, -1)[0]
    _, keys, values = layer.input_linear(layer.prompt.adaption_prompt).chunk(3, -1)
    size = WIDTH // HEADS
    parts = []
    for head, gate in enumerate((0.7, -0.4)):
        part = slice(head * size, (head + 1) * size)
        scores = queries[:, part] @ keys[:, part].T / (math.sqrt(size) * 1.3)
        parts.append(gate * scores.softmax(-1) @ values[:, part])
    read = torch.cat(parts, -1) @ layer.output_linear.weight.T
    torch.testing.assert_close(found - without, read, rtol=0, atol=1e-12)
    assert read.abs().max() > 0.01


def test_a_fresh_prompt_changes_no_bit(tokens):
    layer = attention()
    fresh = run(layer, tokens)
    layer.prompt.enabled = False
    assert torch.equal(fresh, run(layer, tokens))


def test_a_fresh_prompt_learns(tokens):
    """The gates get a gradient at once, and the tokens as soon as a gate is open."""
    layer = attention()
    run(layer, tokens).pow(2).sum().backward()
    assert layer.prompt.adaption_gate.grad.abs().min() > 0
    assert layer.prompt.adaption_prompt.grad.abs().max() == 0
    opened = attention(gates=[0.1, 0.1])
    run(opened, tokens).pow(2).sum().backward()
    assert opened.prompt.adaption_prompt.grad.abs().min() > 0


def test_can_be_differentiated_twice(tokens):
    layer = attention(gates=[0.7, -0.4])
    assert torch.autograd.gradgradcheck(lambda x: run(layer, x), tokens[:10].requires_grad_())
