"""The fused operations against torch's own, to rounding, and against finite differences, twice."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.backends import fused as kernels
from pet_finetune.backends.attention import attend
from pet_finetune.backends.choice import (
    EAGER,
    FUSED,
    use_backend,
)
from pet_finetune.graph import make_layout
from pet_finetune.nn.block import weigh_keys
from pet_finetune.nn.primitives import SwiGLU

# Below, at and above the vectors of the kernels (8 doubles, 16 floats), and none of them.
WIDTHS = [5, 16, 33]
COUNTS = {"mixed": [2, 0, 5], "one": [17], "long": [40, 1, 30]}
TOLERANCE = {torch.float32: {"atol": 5e-6, "rtol": 2e-5}, torch.float64: {"atol": 1e-12, "rtol": 0}}

pytestmark = pytest.mark.usefixtures("with_kernels")


def randoms(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def layout_of(counts, rectangles=False):
    centers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return make_layout(centers, len(counts), rectangles)


def attention_pair(counts, heads):
    """The fused attention and its reference, as functions of (qkv, factors)."""
    layout, padded = layout_of(counts), layout_of(counts, rectangles=True)

    def fused(qkv, factors):
        return kernels.attention(qkv, weigh_keys(factors, layout), layout.starts, heads, 0.3)

    def plain(qkv, factors):
        return attend(qkv, padded.rectangles, weigh_keys(factors, padded), heads, 0.3)

    return fused, plain


def attention_inputs(counts, heads, head_width, dtype=torch.float64):
    tokens = len(counts) + sum(counts)
    (qkv, factors) = randoms((tokens, 3 * heads * head_width), (sum(counts),), dtype=dtype)
    return qkv, (factors.detach().sigmoid()).requires_grad_()


def second_order(function, inputs):
    """Gradients of something that depends on values and on first gradients, as training's do."""
    out = function(*inputs)
    first = torch.autograd.grad((out**3).sum(), inputs, create_graph=True)
    loss = (out**2).sum() + sum((g**2).sum() for g in first)
    return [out, *first, *torch.autograd.grad(loss, inputs)]


def assert_same(function, reference, inputs):
    ours, theirs = second_order(function, inputs), second_order(reference, inputs)
    for a, b in zip(ours, theirs, strict=True):
        size = float(b.detach().abs().max())
        torch.testing.assert_close(a / size, b / size, **TOLERANCE[b.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("heads", "head_width"), [(2, 3), (1, 16), (2, 20)])
def test_attention_equals_the_plain_one(counts, heads, head_width, dtype):
    fused, plain = attention_pair(counts, heads)
    assert_same(fused, plain, attention_inputs(counts, heads, head_width, dtype))


@pytest.mark.parametrize("counts", [[2, 0, 3], [9]], ids=str)
def test_attention_by_finite_differences(counts):
    fused, _ = attention_pair(counts, 2)
    inputs = attention_inputs(counts, 2, 3)
    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs)


ROWWISE = {
    "rms_norm": (
        lambda x, w, b: kernels.rms_norm(x, w, 1e-5),
        lambda x, w, b: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5),
    ),
    "layer_norm": (
        lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b, 1e-5),
    ),
    "silu": (lambda x, w, b: kernels.silu(x), lambda x, w, b: torch.nn.functional.silu(x)),
    "swiglu": (
        lambda x, w, b: kernels.swiglu(torch.cat([x, 2 * x + 1], dim=-1)),
        lambda x, w, b: x * torch.sigmoid(2 * x + 1),
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise_operations_equal_torchs(name, width, dtype):
    fused, plain = ROWWISE[name]
    x, w, b = randoms((300, width), (width,), (width,), dtype=dtype)
    if "norm" not in name:
        assert_same(lambda x: fused(x, w, b), lambda x: plain(x, w, b), (x,))
    elif name == "rms_norm":
        assert_same(lambda x, w: fused(x, w, b), lambda x, w: plain(x, w, b), (x, w))
    else:
        assert_same(fused, plain, (x, w, b))


@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise_operations_by_finite_differences(name):
    fused, _ = ROWWISE[name]
    x, w, b = randoms((3, 11), (11,), (11,))
    inputs = {"rms_norm": (x, w), "layer_norm": (x, w, b)}.get(name, (x,))

    def function(*given):
        return fused(*given, *(x, w, b)[len(given) :])

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


PROLOGUES = {
    "none": lambda x, w, b: x,
    "rms_norm": ROWWISE["rms_norm"][1],
    "layer_norm": ROWWISE["layer_norm"][1],
    "silu": ROWWISE["silu"][1],
    "swiglu": lambda x, w, b: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid(),
}


def projections(prologue, inputs, outputs, rank, dtype, rows=70, rounds=False):
    """The fused projection, its reference, and the tensors that both are functions of."""
    wide = 2 * inputs if prologue == "swiglu" else inputs
    tensors = randoms(
        (rows, wide),
        (outputs, inputs),
        (outputs,),
        (inputs,),
        (inputs,),
        (rows, outputs),
        dtype=dtype,
    )
    update = randoms((rank, inputs), (outputs, rank), dtype=dtype, seed=1) if rank else [None, None]
    norm = {"norm_weight": tensors[3], "norm_bias": tensors[4], "eps": 1e-5}
    keep = {"rms_norm": ["norm_weight", "eps"], "layer_norm": list(norm)}.get(prologue, [])

    def fused(x):
        weight = tensors[1] if not rank else tensors[1] + 0.1 * update[1] @ update[0]
        return kernels.projection(
            x, tensors[1], kernels.pack(weight, rounds=rounds), tensors[2], prologue=prologue,
            a=update[0], b=update[1], scaling=0.1, residual=tensors[5],
            **{k: norm[k] for k in keep},
        )  # fmt: skip

    def plain(x):
        weight = tensors[1] if not rank else tensors[1] + 0.1 * update[1] @ update[0]
        p = PROLOGUES[prologue](x, tensors[3], tensors[4])
        return torch.nn.functional.linear(p, weight, tensors[2]) + tensors[5]

    used = [*tensors[:3], *[norm[k] for k in keep if k != "eps"], tensors[5]]
    return fused, plain, [*used, *(u for u in update if u is not None)]


def training_gradients(function, x, parameters):
    """Of a loss on values and forces; the inner derivative is by ``x`` alone, as forces' is."""
    out = torch.tanh(function(x) / 8)
    (force,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    loss = (force**2).sum() + (out**2).sum()
    return [force, *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(16, 48, 0), (32, 64, 3), (16, 16, 17)])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_projections_equal_torchs(prologue, inputs, outputs, rank, dtype):
    fused, plain, tensors = projections(prologue, inputs, outputs, rank, dtype)
    torch.testing.assert_close(fused(tensors[0]), plain(tensors[0]), atol=2e-4, rtol=1e-4)
    ours = training_gradients(fused, tensors[0], tensors[1:])
    theirs = training_gradients(plain, tensors[0], tensors[1:])
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if index == 2 and rank:
            continue  # an adapted weight is fixed, its gradient is not formed densely for it
        size = float(b.detach().abs().max())
        torch.testing.assert_close(a / size, b / size, **TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 17, 600, 4100])
def test_projections_of_any_number_of_rows(rows):
    fused, plain, tensors = projections("rms_norm", 16, 32, 2, torch.float64, rows)
    torch.testing.assert_close(fused(tensors[0]), plain(tensors[0]))
    ours = training_gradients(fused, tensors[0], tensors[-2:])
    theirs = training_gradients(plain, tensors[0], tensors[-2:])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_projections_by_finite_differences(prologue):
    fused, _, tensors = projections(prologue, 8, 16, 0, torch.float64, rows=3)
    fixed = [t.requires_grad_(False) for t in tensors[1:]]
    assert fixed
    assert torch.autograd.gradcheck(fused, tensors[:1])
    assert torch.autograd.gradgradcheck(fused, tensors[:1])


def test_inputs_that_are_not_contiguous():
    x = torch.randn(16, 20, dtype=torch.float64, requires_grad=True)
    assert_same(lambda x: kernels.silu(x.T), lambda x: torch.nn.functional.silu(x.T), (x,))
    fused, plain, tensors = projections("silu", 16, 16, 0, torch.float64, rows=20)
    for a, b in zip(
        training_gradients(lambda x: fused(x.T), x, tensors[1:3]),
        training_gradients(lambda x: plain(x.T), x, tensors[1:3]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_results_do_not_depend_on_the_number_of_threads():
    fused, _ = attention_pair([9] * 40, 2)
    inputs = attention_inputs([9] * 40, 2, 16, torch.float32)
    (x, w) = randoms((1000, 48), (48,), dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            norms = second_order(lambda x, w: kernels.rms_norm(x, w, 1e-5), (x, w))
            results.append([*second_order(fused, inputs), *norms])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_third_derivative_is_refused_and_not_wrong():
    (x,) = randoms((3, 5))
    (first,) = torch.autograd.grad(kernels.silu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="PET_FINETUNE_KERNELS=off"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


def test_what_the_kernels_take():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert FUSED.computes_on(cpu, torch.float32)
    assert FUSED.computes_on(cpu, torch.float64)
    assert not FUSED.computes_on(cpu, torch.bfloat16)
    assert not FUSED.computes_on(gpu, torch.float32)
    assert EAGER.computes_on(gpu, torch.bfloat16)
    gate = SwiGLU()
    use_backend(gate, FUSED)
    torch.testing.assert_close(gate(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 2))


BEFORE_GROUPS = {
    "none": (1, {}),
    "rms_norm": (1, {"eps": 1e-6}),
    "layer_norm": (1, {"eps": 1e-5}),
    "silu": (1, {}),
    "swiglu": (2, {}),
}


@pytest.mark.parametrize(("leading", "others"), [(0, 5), (3, 0), (3, 50)])
@pytest.mark.parametrize("prologue", BEFORE_GROUPS)
def test_a_grouped_projection_is_one_projection_for_each_group(prologue, others, leading):
    groups, width, wide = 3, 16, 32
    times, settings = BEFORE_GROUPS[prologue]
    rows = groups * (leading + others)
    x, weights, biases, residual, norm, shift = randoms(
        (rows, times * width),
        (groups, wide, width),
        (groups, wide),
        (rows, wide),
        (width,),
        (width,),
    )
    if "norm" in prologue:
        settings = {**settings, "norm_weight": norm.detach()}
    if prologue == "layer_norm":
        settings["norm_bias"] = shift.detach()
    packed = torch.stack([kernels.pack(weight) for weight in weights])
    settings = {**settings, "prologue": prologue}
    found = kernels.grouped_projection(
        x, packed, biases.detach(), leading, residual=residual, **settings
    )
    owner = torch.arange(groups).repeat_interleave(leading)
    owner = torch.cat([owner, torch.arange(groups).repeat_interleave(others)])
    expected = torch.zeros_like(found)
    for group in range(groups):
        mine = owner == group
        if mine.any():
            weight, bias = weights[group].detach(), biases[group].detach()
            one = kernels.projection(x[mine], weight, packed[group], bias, **settings)
            expected = expected.masked_scatter(mine.unsqueeze(1), one)
    expected = expected + residual
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    inputs = (x, residual)
    ours = torch.autograd.grad((found**2).sum(), inputs)
    theirs = torch.autograd.grad((expected**2).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_a_grouped_projection_refuses_what_it_cannot_do():
    x, weights = randoms((6, 16), (2, 16, 16))
    packed = torch.stack([kernels.pack(weight) for weight in weights])
    with pytest.raises(RuntimeError, match="7 rows are not those of 2 members with 1"):
        kernels.grouped_projection(torch.cat([x, x[:1]]), packed, None, 1)
    with pytest.raises(RuntimeError, match="expected packed weights"):
        kernels.grouped_projection(x, packed[0], None, 0)
    out = kernels.grouped_projection(x, packed, None, 1)
    with pytest.raises(RuntimeError, match="differentiate a committee once"):
        torch.autograd.grad((out**2).sum(), x, create_graph=True)


@pytest.fixture
def _bfloat16(with_kernels):
    if not kernels.multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16")


def rounded(x):
    return x.bfloat16().to(x.dtype)


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 16, 16), (17, 48, 16), (301, 32, 80), (32, 64, 64), (1077, 272, 112)],
)
def test_products_in_bfloat16_round_their_factors_and_nothing_else(rows, inputs, outputs):
    x, weight, bias, g = randoms((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    single = [t.detach().float().requires_grad_() for t in (x, weight, bias, g)]
    packed = kernels.pack(single[1], rounds=True)
    out = kernels.projection(single[0], single[1], packed, single[2])
    expected = rounded(x) @ rounded(weight).T + bias
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(out, single[:3], single[3])
    wanted = [rounded(g) @ rounded(weight), rounded(g).T @ rounded(x), g.sum(0)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_training_gradients_in_bfloat16_are_those_of_rounded_factors(prologue):
    fused, plain, tensors = projections(prologue, 32, 64, 0, torch.float32, rounds=True)
    ours = training_gradients(fused, tensors[0], tensors[1:])
    theirs = training_gradients(plain, tensors[0], tensors[1:])
    for a, b in zip(ours, theirs, strict=True):
        error = float(((a - b).square().mean() / b.square().mean()).detach()) ** 0.5
        assert error < 2e-2, error  # bfloat16 keeps 8 bits: 2e-3 for each rounding
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("_bfloat16")
def test_other_types_than_float32_are_packed_as_they_are():
    for dtype in (torch.float32, torch.float64):
        (weight,) = randoms((16, 16), dtype=dtype)
        assert kernels.pack(weight).dtype == dtype
    assert kernels.pack(weight, rounds=True).dtype == torch.float64
