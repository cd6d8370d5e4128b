"""One adapted layer: its formula, its dropout, its merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pet_finetune.adapters.layers import LoraLinear
from pet_finetune.backends.choice import EAGER
from pet_finetune.nn.projection import together


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Linear(5, 4).double()


@pytest.fixture
def layer(base):
    made = LoraLinear(base, rank=2, alpha=6.0)
    with torch.no_grad():
        nn.init.normal_(made.lora_B)
    return made


def x_of(rows=3):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_formula(base, layer):
    update = 3.0 * layer.lora_B @ layer.lora_A
    expected = x_of() @ (base.weight + update).T + base.bias
    torch.testing.assert_close(layer(x_of()), expected)


def test_a_fresh_layer_is_its_base_bit_for_bit(base):
    fresh = LoraLinear(base, 2, 6.0, dropout=0.5)
    assert torch.equal(fresh.eval()(x_of()), base(x_of()))
    assert torch.equal(fresh.train()(x_of()), base(x_of()))
    assert fresh.lora_A.dtype == torch.float64
    assert fresh.lora_A.abs().max() > 0


def test_only_the_factors_train(layer):
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B"]
    layer(x_of()).sum().backward()
    assert layer.lora_A.grad.abs().max() > 0
    assert layer.weight.grad is None


def test_dropout_acts_in_training_only_and_on_the_update_only(base):
    layer = LoraLinear(base, 2, 6.0, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    layer.eval()
    assert torch.equal(layer(x_of()), layer(x_of()))
    layer.train()
    torch.manual_seed(3)
    first, second = layer(x_of(200)), layer(x_of(200))
    assert not torch.equal(first, second)
    layer.enabled = False
    assert torch.equal(layer(x_of()), base(x_of()))


def test_dropout_keeps_the_mean(base):
    layer = LoraLinear(base, 2, 6.0, dropout=0.3)
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(0)
    x = x_of(1).expand(20000, 5)
    mean = layer.train()(x).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x[0]), atol=0.1, rtol=0)


def test_merging_twice_is_merging_once(base, layer):
    weight = base.weight.detach().clone()
    expected = layer(x_of())
    layer.merge()
    layer.merge()
    assert layer.merged
    assert torch.equal(layer(x_of()), expected)
    layer.enabled = False
    assert torch.equal(layer.effective_weight(), weight)
    layer.enabled = True
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_to_linear_is_plain_and_equal(layer):
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x_of()), layer(x_of()))
    assert {name for name, _ in plain.named_parameters()} == {"weight", "bias"}


def test_layers_without_bias():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(5, 4, bias=False).double(), 2, 2.0)
    assert layer(x_of()).shape == (3, 4)
    assert layer.to_linear().bias is None


def test_weights_made_together_train_as_those_made_apart(base):
    network = nn.ModuleList(LoraLinear(base, 2, alpha) for alpha in (6.0, 6.0, 3.0)).train()
    network.backend, network.recompute = EAGER, False
    for factor in network.parameters():
        nn.init.normal_(factor)
    trained = [p for p in network.parameters() if p.requires_grad]

    def gradients():
        return torch.autograd.grad(sum(layer(x_of()).square().sum() for layer in network), trained)

    with together(network):
        assert all(layer.made.requires_grad for layer in network)
        found = gradients()
    assert all(layer.made is None for layer in network)
    torch.testing.assert_close(found, gradients())
