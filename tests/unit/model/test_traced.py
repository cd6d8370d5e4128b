"""The network and its derivatives as one graph, which takes structures of other sizes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from models import PROPERTIES, crystal, ethanol, random_potential, trained_adapter
from pet_finetune.backends.choice import (
    EAGER,
    FUSED,
    use_backend,
)
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.graph import Batch
from pet_finetune.model.inference import direct_targets, predict_direct
from pet_finetune.model.potential import Potential

#: Of a kernel each: widths that the fused operators take.
WIDE = {"d_pet": 16, "d_node": 32, "d_head": 16, "d_feedforward": 16, "num_heads": 2}
TRACED, OTHERS = [ethanol(), crystal()], [[crystal()], [ethanol(), crystal(), ethanol()]]


def model_of(kind: str, backend) -> Potential:
    if kind == "direct":
        model = random_potential(**WIDE)
        for spec in PROPERTIES[-2:]:
            model.add_target(spec)
    elif kind == "adaptive":
        model = random_potential(num_neighbors_adaptive=4.0, num_gnn_layers=1, **WIDE)
    else:
        model = random_potential(**WIDE)
    model = trained_adapter(model) if kind == "lora" else model
    use_backend(model, backend)
    return model


def inputs_of(model: Potential, frames) -> tuple[list[Tensor], object]:
    """A batch that holds what its vectors decide, as tensors, and how they go together."""
    batch = batch_from_atoms(frames, model.cutoff, model.dtype)
    return tree_flatten(model.network.neighborhood.with_edges(batch))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "adaptive"])
def test_a_step_of_training_as_a_graph(kind, with_kernels):
    """Energy, forces, stress, and the gradients of a loss on them by all that trains.

    With the kernels: of plain operations the contract of compiled steps makes such graphs.
    """
    model = model_of(kind, FUSED).train()
    trains = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    inputs, structure = inputs_of(model, TRACED)

    def step(values, tensors):
        values = [v.detach().requires_grad_() for v in values]
        batch = tree_unflatten(tensors, structure)

        class Step(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self):
                return self.model.predict(batch, stress=True, create_graph=True)

        names = [f"model.{name}" for name in trains]
        found = functional_call(Step(), dict(zip(names, values, strict=True)), ())
        parts = found.energy, found.forces, found.stress
        loss = sum(part.square().sum() for part in parts)
        gradients = torch.autograd.grad(loss, values, allow_unused=True)
        return [*(part.detach() for part in parts), *(g for g in gradients if g is not None)]

    values = list(trains.values())
    traced = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(values, inputs)
    assert any(str(node.target).startswith("pet_finetune.") for node in traced.graph.nodes)
    for frames in OTHERS:
        tensors, _ = inputs_of(model, frames)
        expected = step(values, tensors)
        assert len(expected) > 10
        for own, other in zip(traced(values, tensors), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [EAGER, FUSED], ids=lambda b: b.name)
def test_direct_forces_as_a_graph(backend, request):
    if backend is FUSED:
        request.getfixturevalue("with_kernels")
    model = model_of("direct", backend).eval().requires_grad_(False)
    direct = direct_targets(model.targets, "energy", True)
    assert direct is not None
    inputs, structure = inputs_of(model, TRACED)

    def predict(*tensors):
        batch = tree_unflatten(list(tensors), structure)
        found = predict_direct(model, batch, "energy", direct, True)
        return found.energy, found.forces, found.stress

    traced = make_fx(predict, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    for frames in OTHERS:
        tensors, _ = inputs_of(model, frames)
        for own, other in zip(traced(*tensors), predict(*tensors), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_torch_exports_the_network_for_structures_of_any_size():
    """With the sizes of everything free, and differentiable."""
    network = model_of("full", EAGER).network.requires_grad_(False)

    class Energies(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, batch: Batch) -> Tensor:
            return self.network(batch, ["energy"])["energy"]

    def batch_of(frames) -> Batch:
        return network.neighborhood.with_edges(batch_from_atoms(frames, 3.5))

    def free(tensor: Tensor) -> dict[int, object]:
        return dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO)

    batch, energies = batch_of(TRACED), Energies()
    sizes = tree_map_only(Tensor, free, batch)
    exported = torch.export.export(energies, (batch,), dynamic_shapes=(sizes,)).module()
    for frames in OTHERS:
        found = []
        for function in (exported, energies):
            batch = batch_of(frames)
            batch.edge_vectors.requires_grad_()
            values = function(batch)
            found.append((values, *torch.autograd.grad(values.square().sum(), batch.edge_vectors)))
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
