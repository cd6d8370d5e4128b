"""Anchors: what counts as distance, and what the Fisher information is."""

from __future__ import annotations

import pytest
import torch

from models import ethanol, random_potential
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import freeze, inject, lora_layers
from pet_finetune.config.target import TargetLoss
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.data.loader import Loader
from pet_finetune.forgetting.anchor import (
    AnchorLoss,
    anchored_parameters,
    fisher_information,
    reference_weights,
)
from pet_finetune.training.objectives import Objective, batch_loss
from pet_finetune.training.sets import label_with
from tiny_data import molecules, structures_of
from trainers import at

OBJECTIVE = Objective("energy", TargetLoss(weight=3.0), forces=True, stress=False, scale=2.0)
SMALL = {"d_pet": 4, "d_head": 3, "d_node": 4, "d_feedforward": 4, "num_gnn_layers": 1}


def adapted(use_dora=False, **config):
    model = random_potential(**SMALL)
    torch.manual_seed(3)
    inject(model, AdapterConfig(rank=2, use_dora=use_dora, **config))
    return model


def heads_only():
    model = random_potential(**SMALL)
    freeze(model, ["node_heads", "node_last_layers"])
    return model


METHODS = {
    "full": lambda: random_potential(**SMALL),
    "heads": heads_only,
    "lora": adapted,
    "dora": lambda: adapted(use_dora=True),
    "qlora": lambda: adapted(quant_bits=8),
}


def move(model, size=0.1):
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_there_is_neither_penalty_nor_pull(method):
    model = METHODS[method]()
    anchor = AnchorLoss(model, reference_weights(model), None, strength=2.0)
    loss = anchor(at(0))
    assert float(loss.detach()) == 0.0
    loss.backward()
    for parameter in model.network.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("method", METHODS)
def test_l2sp_is_the_distance_of_the_merged_weights(method):
    """Whatever moved them: the plain model before and after says how far."""
    from pet_finetune.adapters.inject import merged_copy

    model = METHODS[method]()
    before = merged_copy(model).network.state_dict()
    anchor = AnchorLoss(model, reference_weights(model), None, strength=3.0)
    move(model)
    after = merged_copy(model).network.state_dict()
    distance = sum(float(((after[n] - before[n]) ** 2).sum()) for n in before)
    assert distance > 0.01
    assert float(anchor(at(4, 2)).detach()) == pytest.approx(1.5 * distance, rel=1e-9)


def test_parameters_without_a_reference_are_free():
    model = random_potential(**SMALL)
    reference = reference_weights(model)
    free = {n for n in reference if n.startswith("node_heads.")}
    anchor = AnchorLoss(model, {n: v for n, v in reference.items() if n not in free}, None, 1.0)
    move(model)
    anchor(at(0)).backward()
    grown = {n for n, p in model.network.named_parameters() if p.grad is not None}
    assert grown == set(reference) - free


def gauss_newton(model, structure, weights):
    """The diagonal of the loss's Gauss-Newton matrix, from one output's gradient at a time."""
    batch = batch_from_atoms(structure, model.cutoff)
    prediction = model.predict(batch, "energy", create_graph=True)
    loss = OBJECTIVE.loss
    energy = prediction.energy / OBJECTIVE.scale / batch.num_atoms
    forces = prediction.forces.reshape(-1) / OBJECTIVE.scale
    force_weight = loss.forces_term().weight
    diagonal = [torch.zeros_like(w) for w in weights]
    for values, weight in ((energy, loss.weight), (forces, force_weight)):
        for value in values:
            gradients = torch.autograd.grad(
                value, weights, retain_graph=True, materialize_grads=True
            )
            for sums, gradient in zip(diagonal, gradients, strict=True):
                sums += 2 * weight / len(values) * gradient**2
    return diagonal


def test_fisher_information_is_the_curvature_of_the_loss():
    """Many draws for one structure: their mean is the Gauss-Newton diagonal."""
    model = random_potential(**SMALL)
    freeze(model, ["node_last_layers", "edge_last_layers"])
    (structure,) = structures_of([ethanol()])
    found = fisher_information(model, [structure] * 100, OBJECTIVE, seed=1)
    parameters = anchored_parameters(model)
    assert found.keys() == parameters.keys()
    expected = gauss_newton(model, ethanol(), list(parameters.values()))
    for value, wanted in zip(found.values(), expected, strict=True):
        assert float(value.sum()) == pytest.approx(float(wanted.sum()), rel=0.15)


def test_fisher_information_of_adapters_is_that_of_the_weights_they_adapt():
    plain, model = random_potential(**SMALL), adapted()
    structures = structures_of(molecules(2))
    whole = fisher_information(plain, structures, OBJECTIVE, seed=1)
    found = fisher_information(model, structures, OBJECTIVE, seed=1)
    assert {f"{path}.weight" for path, _ in lora_layers(model)} <= found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name])
    # The adapters work again, and the weights under them are frozen as before.
    assert all(layer.enabled and not layer.weight.requires_grad for _, layer in lora_layers(model))


def test_ewc_of_strength_one_rises_as_the_loss_would():
    """In one weight at a time, which is what a diagonal can say."""
    model = random_potential(**SMALL)
    freeze(model, ["node_last_layers"])
    structures = label_with(model, structures_of([ethanol()]), ["energy"])
    importance = fisher_information(model, structures * 100, OBJECTIVE, seed=2)
    anchor = AnchorLoss(model, reference_weights(model), importance, 1.0)
    name, parameter = max(
        anchored_parameters(model).items(), key=lambda item: float(importance[item[0]].max())
    )
    with torch.no_grad():
        parameter.view(-1)[importance[name].argmax()] += 1e-3
    (batch,) = Loader(structures, model.cutoff, batch_size=1, dtype=model.dtype)
    prediction = {"energy": model.predict(batch.graph, "energy")}
    risen = float(batch_loss(batch, prediction, {"energy": OBJECTIVE}))
    assert float(anchor(at(0)).detach()) == pytest.approx(risen, rel=0.2)


def test_importance_decides_what_is_held():
    model = heads_only()
    reference = reference_weights(model)
    importance = {name: torch.zeros_like(value) for name, value in reference.items()}
    first = next(iter(reference))
    importance[first] += 2.0
    anchor = AnchorLoss(model, reference, importance, 0.5)
    move(model)
    moved = model.network.get_parameter(first).detach() - reference[first]
    assert float(anchor(at(0)).detach()) == pytest.approx(float((0.5 * moved**2).sum()))
