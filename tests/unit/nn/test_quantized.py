"""Weights in few bits: the numbers they stand for, and products differentiated twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pet_finetune import installation
from pet_finetune.errors import ConfigError
from pet_finetune.nn.quantized import QUANTIZED, QuantizedLinear, held_bytes, product, quantize

pytest.importorskip("bitsandbytes")

# The 16 numbers of NF4, from appendix E of arXiv:2305.14314.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


@pytest.fixture(params=[4, 8])
def bits(request):
    return request.param


def linear(out_features=24, in_features=32, seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)


def test_nf4_is_the_nearest_of_the_papers_numbers_times_a_scale_a_block():
    torch.manual_seed(1)
    weight = torch.randn(32, 128)
    dense = quantize(weight, 4).dense(torch.float32).view(-1, 64)
    scales = dense.abs().amax(1, keepdim=True)  # the largest of a block has the code 1 or -1
    # Double quantisation: 8-bit scales are near the blocks' largest magnitudes.
    torch.testing.assert_close(
        scales, weight.view(-1, 64).abs().amax(1, keepdim=True), rtol=0.05, atol=0
    )
    in_table = (dense / scales)[..., None] - NF4
    assert in_table.abs().amin(-1).max() < 1e-6
    true_scales = weight.view(-1, 64).abs().amax(1, keepdim=True)
    nearest = NF4[((weight.view(-1, 64) / true_scales)[..., None] - NF4).abs().argmin(-1)]
    torch.testing.assert_close(dense / scales, nearest, rtol=0, atol=1e-6)


def test_int8_is_within_half_a_step_of_each_row():
    torch.manual_seed(1)
    weight = torch.randn(32, 128)
    dense = quantize(weight, 8).dense(torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((dense - weight).abs() <= 0.5001 * step).all()


@pytest.mark.few(6)
@pytest.mark.parametrize("shape", [(5, 7), (1, 64), (3, 65), (24, 8)])
def test_any_shape(bits, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    kept = weight.clone()
    dense = quantize(weight, bits).dense(torch.float64)
    assert dense.shape == weight.shape
    assert dense.dtype == torch.float64
    assert (dense - weight).norm() < {4: 0.15, 8: 0.01}[bits] * weight.norm()
    assert torch.equal(weight, kept)


def test_a_row_of_zeros_stays_zero(bits):
    weight = torch.zeros(4, 64)
    weight[1] = 1.0
    dense = quantize(weight, bits).dense(torch.float32)
    assert torch.isfinite(dense).all()
    assert dense[1].min() > 0.95


def test_the_same_base_gives_the_same_numbers_in_any_precision(bits):
    layer = linear().float()
    one = quantize(layer.weight, bits)
    other = quantize(copy.deepcopy(layer).double().weight, bits).double()
    assert torch.equal(one.dense(torch.float64), other.dense(torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_memory_shrinks(bits):
    layer = nn.Linear(512, 256, bias=False)
    small = QuantizedLinear(layer, bits)
    ratio = held_bytes(small) / held_bytes(layer)
    assert ratio < {4: 0.131, 8: 0.252}[bits]
    assert not list(small.parameters())


def test_a_layer_is_the_one_with_the_dequantised_weight(bits):
    layer = linear()
    quantised = QuantizedLinear(layer, bits)
    x = torch.randn(7, 32, dtype=torch.float64)
    plain = nn.functional.linear(x, quantised.quantized.dense(torch.float64), layer.bias)
    torch.testing.assert_close(quantised(x), plain, rtol=0, atol=1e-12)
    assert (quantised(x) - layer(x)).abs().max() > 1e-4


def test_products_can_be_differentiated_three_times(bits):
    weight = quantize(linear(6, 5).weight, bits)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def curved(x):
        return torch.tanh(product(torch.sin(x), weight))

    assert torch.autograd.gradcheck(curved, x)
    assert torch.autograd.gradgradcheck(curved, x)

    def slope(x):
        return torch.autograd.grad(curved(x).pow(3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, x)


def test_nothing_dense_is_kept_for_the_backward(bits):
    weight = quantize(linear(64, 64).weight, bits)
    kept = []
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        slope = torch.autograd.grad(product(x, weight).pow(2).sum(), x, create_graph=True)[0]
        slope.pow(2).sum().backward()
    assert kept
    assert max(tensor.numel() for tensor in kept) <= 3 * 64


def test_copying_saving_and_rebuilding_keep_the_numbers(bits):
    layer = QuantizedLinear(linear(), bits)
    expected = layer.quantized.dense(torch.float64)
    other = QuantizedLinear(linear(seed=5), bits)
    other.load_state_dict(layer.state_dict())
    rebuilt = QUANTIZED[bits](**dict(layer.quantized.named_buffers()))
    for twin in (copy.deepcopy(layer).quantized, other.quantized, rebuilt):
        assert torch.equal(twin.dense(torch.float64), expected)


def test_without_the_library_the_message_says_what_to_install(monkeypatch, bits):
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pet-finetune\[quant\]'"):
        quantize(torch.randn(4, 64), bits)
