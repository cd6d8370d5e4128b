"""The registry: each operator's kernel is what its reference says, and torch can trace it."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pet_finetune.backends.fused import pack
from pet_finetune.backends.operators import OPERATORS, PROLOGUES, unpacked

pytestmark = pytest.mark.usefixtures("with_kernels")

STARTS = [0, 2, 2, 5]  # of the edges of three atoms
ROWS = len(STARTS) - 1 + STARTS[-1]
#: Those that are differentiated once, for predictions.
ONCE = ("grouped_projection", "two_layers", "attention_layer")


def randoms(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def arguments(name):
    """Of every operator, in its variants."""
    x, weight, bias, norm, shift, wide, logs = randoms(
        (ROWS, 16), (32, 16), (32,), (16,), (16,), (ROWS, 32), (STARTS[-1],)
    )
    a, b, back, qkv = randoms((3, 16), (32, 3), (16, 32), (48, 16))
    starts = torch.tensor(STARTS)
    rms, layer = PROLOGUES["rms_norm"], PROLOGUES["layer_norm"]
    silu, swiglu = PROLOGUES["silu"], PROLOGUES["swiglu"]
    fixed = norm.detach(), shift.detach(), 1e-5
    one, two, three = (pack(w.detach()) for w in (weight, back, qkv))
    group = torch.stack([one, pack(weight.detach() + 1)])
    turn = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    return {
        "norm": [(x, norm, shift, 1e-5, True), (x, norm, None, 1e-5, False)],
        "gate": [(x, True), (x, False)],
        "attention": [(torch.cat([x, wide], 1), logs, starts, 2, 0.3)],
        "projection": [
            (x, weight, None, bias, 0, None, None, 0.0, None, None, 0.0, None, False),
            (x, weight, one, bias, rms, norm, None, 1e-5, None, None, 0.0, wide, False),
            (x, weight, one, None, layer, norm, shift, 1e-5, None, None, 0.0, None, False),
            (x, weight.detach(), one, bias, silu, None, None, 0.0, a, b, 0.1, wide, False),
            (wide, weight, None, None, swiglu, None, None, 0.0, None, None, 0.0, None, False),
        ],
        "grouped_projection": [
            (x, group, torch.stack([bias, bias]).detach(), 1, rms, *fixed, wide),
            (wide, group, None, 4, swiglu, None, None, 0.0, None),
        ],
        "two_layers": [
            (x, one, bias.detach(), layer, *fixed, two, None, silu, None, True),
            (x, one, None, 0, None, None, 0.0, one, bias.detach(), swiglu, wide, False),
        ],
        "attention_layer": [
            (x, logs, starts, 2, 0.3, three, None, rms, *fixed, pack(weight[:16].detach()), None)
        ],
        "permute": [(x, turn, turn.argsort())],
    }[name]


CASES = [
    (name, index)
    for name in OPERATORS
    for index in range(
        {"norm": 2, "gate": 2, "projection": 5}.get(name, 2 if name in ONCE[:2] else 1)
    )
]


def trained(given):
    return [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]


def first(function, given):
    """The values, and their gradients by all that has one."""
    out = function(*given)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), trained(given))]


def second(function, given):
    """The gradients of a loss on values and forces, those by the first argument."""
    out = function(*given)
    (force,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    return torch.autograd.grad(force.square().sum() + out.sum(), trained(given))


def kernel(name):
    return getattr(torch.ops.pet_finetune, name).default


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_kernel_is_its_reference(name, index):
    given = arguments(name)[index]
    for order in (first, second)[: 1 if name in ONCE else 2]:
        ours, reference = order(kernel(name), given), order(OPERATORS[name].reference, given)
        for own, other in zip(ours, reference, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_torch_finds_it_in_order(name, index):
    """Schema, derivative and shapes, as ``torch.library.opcheck`` checks them."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel(name), arguments(name)[index], test_utils=checks)


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "index"), [case for case in CASES if case[0] not in ONCE])
def test_a_traced_step_contains_it_and_takes_other_shapes(name, index):
    """Values, first and second derivatives as one graph."""
    given = arguments(name)[index]

    def step(*tensors):
        left = iter(tensors)
        own = [next(left) if isinstance(t, torch.Tensor) else t for t in given]
        return second(kernel(name), own)

    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    graph = make_fx(step, tracing_mode="symbolic")(*tensors)
    names = {str(node.target) for node in graph.graph.nodes}
    assert any(one.startswith(f"pet_finetune.{name}") for one in names)
    for own, other in zip(graph(*tensors), step(*tensors), strict=True):
        torch.testing.assert_close(own, other)


def test_every_derivative_has_shapes():
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pet_finetune::")
    }
    known = set(OPERATORS) | {d for operator in OPERATORS.values() for d in operator.derivatives}
    helpers = {"pack", "pack_bfloat16", "multiplies_bfloat16", "weigh_edges", "static_network"}
    assert defined == known | helpers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (48, 32), (80, 16)], ids=str)
def test_packed_weights_can_be_read_again(shape, dtype):
    (weight,) = randoms(shape, dtype=dtype)
    assert torch.equal(unpacked(pack(weight), shape[1]), weight)


def test_in_autocast_they_keep_their_digits():
    x, norm = randoms((4, 16), (16,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.pet_finetune.norm(x.bfloat16(), norm, None, 1e-5, False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.ops.pet_finetune.norm(x.bfloat16().float(), norm, None, 1e-5, False)
    )
