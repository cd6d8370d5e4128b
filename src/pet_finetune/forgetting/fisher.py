"""The diagonal Fisher information of a potential's energies and forces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pet_finetune.adapters.merge import lora_layers
from pet_finetune.data.loader import Loader
from pet_finetune.data.prefetch import on_device
from pet_finetune.data.structure import Structure
from pet_finetune.graph import Batch
from pet_finetune.model import Potential, Prediction
from pet_finetune.training.loss import Objective

from .anchor import anchored_parameters

_STREAM = 8


def fisher_information(
    model: Potential, structures: Sequence[Structure], objective: Objective, seed: int
) -> dict[str, Tensor]:
    """How much the predictions for some structures depend on each weight.

    The mean over single structures of the squared gradient of the loss (its energy and forces
    terms with their weights, as if both were mean squares). At labels that are the predictions
    themselves that gradient is zero; so, as the Fisher information is defined, labels are drawn
    around them, with the variance for which the loss is a negative log-likelihood
    (arXiv:1905.12558, section 3). The result is the diagonal of the loss's Gauss-Newton matrix in
    expectation: an anchor of strength 1 rises with the weights as the loss on these structures
    would.

    Args:
        model: the starting model. An adapter in it changes nothing yet; the information is that
            of the weights that it adapts.
        structures: at least one; their labels are not used.
        objective: which energy, the weights of energy and forces, and the scale.
        seed: of the labels drawn.

    Returns:
        By name of the parameter in the network, on the CPU.
    """
    loader = Loader(structures, model.cutoff, batch_size=1, dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed * 16 + _STREAM)
    training = model.training
    model.eval()
    try:
        with _adapted_weights_train(model) as weights:
            total = {name: torch.zeros_like(p) for name, p in weights.items()}
            for batch in on_device(loader, model.device, model.dtype):
                wanted = {objective.target: (objective.forces, False)}
                predictions = model.predict_many(batch.graph, wanted, create_graph=True)
                sample = _sampled(batch.graph, predictions[objective.target], objective, generator)
                gradients = torch.autograd.grad(
                    sample, list(weights.values()), materialize_grads=True
                )
                for sums, gradient in zip(total.values(), gradients, strict=True):
                    sums += gradient**2
    finally:
        model.train(training)
    return {name: (sums / len(structures)).cpu() for name, sums in total.items()}


@contextmanager
def _adapted_weights_train(model: Potential) -> Iterator[dict[str, Tensor]]:
    """The weights that are anchored; those under adapters count themselves, as if they trained."""
    layers = dict(lora_layers(model))
    weights: dict[str, Tensor] = {f"{path}.weight": layer.weight for path, layer in layers.items()}
    for layer in layers.values():
        layer.enabled = False
        layer.weight.requires_grad_(True)
    try:
        yield {**weights, **anchored_parameters(model)}
    finally:
        for layer in layers.values():
            layer.enabled = True
            layer.weight.requires_grad_(False)


def _sampled(
    batch: Batch, prediction: Prediction, objective: Objective, generator: torch.Generator
) -> Tensor:
    """A scalar whose gradient is that of the loss at labels drawn around the prediction.

    A term ``w / n * sum_k r_k^2`` is a negative log-likelihood for residuals of variance
    ``n / (2 w)``; its gradient at such residuals is that of ``sqrt(2 w / n) * sum_k z_k r_k`` with
    standard normal z.
    """
    loss, scale = objective.loss, objective.scale
    energy = prediction.energy / scale
    if objective.per_atom:
        energy = energy / batch.atoms_per_structure
    total = _drawn(energy, loss.weight, generator)
    if objective.forces:
        assert prediction.forces is not None
        weight = loss.forces_term().weight
        total = total + _drawn(prediction.forces / scale, weight, generator)
    return total


def _drawn(values: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    factor = math.sqrt(2.0 * weight / values.numel())
    return factor * (noise.to(values) * values).sum(dtype=torch.float64)
