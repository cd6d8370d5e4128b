"""Operations that keep their inputs alone compute what those they stand for do, to the last bit."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.backends.choice import FUSED, use_backend
from pet_finetune.backends.fused import PackedLayer
from pet_finetune.graph import make_layout
from pet_finetune.nn.block import Attention, FeedForward, weigh_keys
from pet_finetune.nn.primitives import LayerNorm, RMSNorm, SiLU
from pet_finetune.nn.projection import Chain, Memory, two_layers

WIDTH = 32
NORMS = {"rms": RMSNorm, "layer": LayerNorm, "none": None}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


pytestmark = pytest.mark.usefixtures("with_kernels")


@pytest.fixture(autouse=True)
def few_numbers_are_many(monkeypatch):
    monkeypatch.setattr("pet_finetune.nn.projection.MANY_NUMBERS", 512 * WIDTH)


def randoms(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def layers(module, norm, dtype):
    torch.manual_seed(0)
    made = None if norm is None else norm(WIDTH).to(dtype)
    for parameter in () if made is None else made.parameters():
        torch.nn.init.normal_(parameter)
    own = module().to(dtype).eval()
    use_backend(own, FUSED)
    return own, made


def both_ways(function, *inputs):
    """Result and gradients of the inputs, with the promise and without it; and bytes kept."""
    found = []
    for memory in (Memory.INPUTS_ONLY, Memory.KEEP):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(memory)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad((out * weights).sum(), inputs)
        found.append(([out, *gradients], sum(kept.values())))
    (compact, few), (usual, many) = found
    for own, reference in zip(compact, usual, strict=True):
        assert torch.equal(own, reference)
    return few, many


@DTYPES
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("activation", ["SwiGLU", "SiLU"])
@pytest.mark.parametrize("residual", ["itself", "another", "none"])
def test_a_feed_forward_network(dtype, norm, activation, residual):
    mlp, norm = layers(lambda: FeedForward(WIDTH, 48, activation), norm, dtype)
    mlp.requires_grad_(False)
    x = randoms(700, WIDTH, dtype=dtype)
    other = randoms(700, WIDTH, dtype=dtype, seed=1)
    rest = {"itself": x, "another": other, "none": None}[residual]
    inputs = (x, other) if residual == "another" else (x,)
    before = None if norm is None else norm.op()
    few, many = both_ways(
        lambda memory: two_layers(
            FUSED, mlp.w_in, mlp.w_out, x, before, mlp.activation.op(), rest, memory
        ),
        *inputs,
    )
    assert few < many


def test_layers_behind_a_norm_in_a_chain():
    mlp, norm = layers(
        lambda: Chain(torch.nn.Linear(WIDTH, 48), SiLU(), torch.nn.Linear(48, WIDTH)),
        LayerNorm,
        torch.float32,
    )
    x = randoms(700, WIDTH, dtype=torch.float32)
    both_ways(lambda memory: mlp(x, norm.op(), x, memory), x)


# Groups of atoms end at 64 tokens: in the middle of, at and after what is here.
COUNTS = {
    "mixed": [2, 0, 5, 80, 0] * 12,
    "lonely atoms": [0] * 600,
    "one large": [900],
    "whole groups": [31] * 40,
}


@DTYPES
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_attention(dtype, norm, counts):
    attention, norm = layers(lambda: Attention(WIDTH, 4, 1.0), norm, dtype)
    attention.requires_grad_(False)
    centers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    layout = make_layout(centers, len(counts), rectangles=False)
    before = None if norm is None else norm.op()
    tokens = randoms(len(counts) + sum(counts), WIDTH, dtype=dtype)
    factors = randoms(sum(counts), dtype=dtype, seed=1).detach().sigmoid().requires_grad_()
    few, many = both_ways(
        lambda memory: attention(tokens, layout, weigh_keys(factors, layout), before, memory),
        tokens,
        factors,
    )
    assert few < many


def test_threads_change_nothing():
    mlp, norm = layers(lambda: FeedForward(WIDTH, 48, "SwiGLU"), RMSNorm, torch.float32)
    x = randoms(3000, WIDTH, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = mlp(x, norm.op(), Memory.INPUTS_ONLY)
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_second_derivative_is_refused():
    mlp, norm = layers(lambda: FeedForward(WIDTH, 48, "SwiGLU"), RMSNorm, torch.float32)
    x = randoms(700, WIDTH, dtype=torch.float32)
    out = mlp(x, norm.op(), Memory.INPUTS_ONLY)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_wrong_shapes_are_refused():
    packed = PackedLayer(torch.zeros(2, 1024), None)
    x = torch.zeros(700, WIDTH)
    with pytest.raises(RuntimeError, match="multiples"):
        PackedLayer(torch.zeros(2, 1000), None).then(x, packed, None)
    with pytest.raises(RuntimeError, match="residual"):
        packed.then(x, packed, torch.zeros(3, WIDTH))
    with pytest.raises(RuntimeError, match="do not go with"):
        packed.attend(x, torch.zeros(699), torch.tensor([0, 699]), 4, 1.0, packed)
