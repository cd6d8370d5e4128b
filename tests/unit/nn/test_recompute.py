"""Parts of the network that are computed again: the same gradients from less memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from models import crystal, ethanol, random_potential, trained_adapter
from pet_finetune.backends.choice import EAGER, use_backend
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.nn.recompute import recomputed
from pet_finetune.training.step import mixed

KINDS = {
    "full": {},
    "residual": {"featurizer_type": "residual"},
    "PostLN": {"transformer_type": "PostLN", "num_neighbors_adaptive": 4},
    "wide enough for kernels": {"d_pet": 16, "d_node": 32, "d_head": 16, "d_feedforward": 16},
    "lora": {"d_pet": 16, "d_node": 32, "d_head": 16, "d_feedforward": 16},
    "lora, dropout": {},
}


def model_of(kind, dtype=torch.float64):
    model = random_potential(dtype=dtype, **KINDS[kind])
    if kind.startswith("lora"):
        trained_adapter(model, dropout=0.4 if "dropout" in kind else 0.0)
    return model.train()


def gradients(model, recompute, create_graph=True):
    """Energy, forces and the gradient of a loss of both."""
    model.network.recompute = recompute
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff, dtype=model.dtype)
    parameters = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    torch.manual_seed(7)
    found = model.predict(batch, stress=True, create_graph=True)
    loss = found.energy.sum() + (found.forces**2).sum() + found.stress.square().sum()
    after = torch.rand(1)
    loss.backward(inputs=list(parameters.values()))
    out = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"energy": found.energy, "forces": found.forces, "random": after, **out}


@pytest.mark.few(8)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_the_plain_network(kind, fused):
    model = model_of(kind)
    if not fused:
        use_backend(model, EAGER)
    plain, again = gradients(model, False), gradients(model, True)
    assert plain.keys() == again.keys()
    assert len(plain) > 20
    for name, value in plain.items():
        scale = float(value.detach().abs().max()) + 1e-30
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=1e-12 * scale, msg=name)


def test_fewer_digits_lose_no_more_than_without():
    """Sums in bfloat16 in another order: not the same bits, but as good ones."""
    model = model_of("full", torch.float32)
    exact = gradients(model, True)
    with mixed("bf16-mixed", model):
        plain, again = gradients(model, False), gradients(model, True)

    def error(found):
        parts = [(found[n] - e).flatten() for n, e in exact.items() if n != "energy"]
        return float(torch.cat(parts).detach().norm())

    assert 0.3 * error(plain) < error(again) < 3.0 * error(plain)


def test_what_is_frozen_needs_no_gradient():
    model = model_of("full")
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name.startswith(("node_heads", "gnn_layers.1")))
    plain, again = gradients(model, False), gradients(model, True)
    assert plain.keys() == again.keys()
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-10)


def test_nothing_that_lies_within_is_kept():
    """Neither after the forward pass nor after a derivative with a graph of its own."""
    kept = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

        def forward(self, x):
            middle = torch.tanh(x @ self.weight)
            kept.append(weakref.ref(middle))
            return (middle @ self.weight,)

    layer = Watched()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (out,) = recomputed(layer.forward, [x], [layer])
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert [reference() for reference in kept] == [None, None]
    (slope.square().sum() + out.sum()).backward(inputs=[layer.weight])
    assert len(kept) == 4


def test_second_derivatives_by_finite_differences():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    weights = [p.requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def loss():
        (out,) = recomputed(lambda x: (layer(x),), [x], [layer])
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return slope.square().sum() + out.sum()

    found = torch.autograd.grad(loss(), weights)
    step = 1e-6
    for weight, gradient in zip(weights, found, strict=True):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[0] += sign * step
            values.append(loss().item())
            with torch.no_grad():
                weight.view(-1)[0] -= sign * step
        assert gradient.flatten()[0].item() == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-6, abs=1e-8
        )
