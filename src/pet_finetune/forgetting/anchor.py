"""Anchors: penalties on how far the weights have moved from the foundation's.

L2-SP (arXiv:1802.01483, eq. 2, for the weights that the foundation has) and elastic weight
consolidation, EWC (arXiv:1612.00796, eq. 3). Weights that an adapter changes count by what the
adapter changes of them, the rest by their own values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune.adapters.inject import lora_layers
from pet_finetune.adapters.layers import grown_tables
from pet_finetune.data.labelled_batch import on_device
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import Structure
from pet_finetune.errors import ConfigError
from pet_finetune.graph import Batch
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, evaluating
from pet_finetune.nn.primitives import ROWS
from pet_finetune.rng import Stream
from pet_finetune.training.feature import Plan, Step, TrainingRun
from pet_finetune.training.objectives import Objective
from pet_finetune.training.sets import objective_of

from .replay import Keeping, read_unlabelled, sample

_logger = get_logger(__name__)


def anchored_parameters(model: Potential) -> dict[str, nn.Parameter]:
    """Trained parameters that count by their own values.

    Those of adapted layers count by what they do to the layer's weight, and embeddings of
    elements that the foundation lacks are free.
    """
    free = (
        *(f"{path}." for path, _ in lora_layers(model)),
        *(f"{path}.{ROWS}" for path, _ in grown_tables(model)),
    )
    return {
        name: parameter
        for name, parameter in model.network.named_parameters()
        if parameter.requires_grad and not name.startswith(free)
    }


def reference_weights(model: Potential) -> dict[str, Tensor]:
    """Values to measure from: those that the model has now, by name, on the CPU."""
    parameters = anchored_parameters(model)
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


class AnchorLoss:
    """The penalty ``strength / 2`` times the weighted squared distance from the foundation.

    Args:
        model: is trained; its adapter, if any, is not merged.
        reference: from :func:`reference_weights` of the starting model. Trained parameters that
            are not in it (fresh heads) are free.
        importance: from :func:`fisher_information` for EWC; None counts all alike.
        strength: factor.
    """

    def __init__(
        self,
        model: Potential,
        reference: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None,
        strength: float,
    ) -> None:
        self.strength = strength
        self._layers = dict(lora_layers(model))
        self._parameters = {n: p for n, p in anchored_parameters(model).items() if n in reference}
        self._reference = {n: self._placed(model, reference[n]) for n in self._parameters}
        self._importance = {
            name: self._placed(model, value) for name, value in (importance or {}).items()
        }
        self._even = importance is None

    @staticmethod
    def _placed(model: Potential, value: Tensor) -> Tensor:
        return value.to(model.device, model.dtype)

    def _moves(self) -> Iterator[tuple[str, Tensor]]:
        """Change of each weight, with the name of the foundation's weight."""
        for path, layer in self._layers.items():
            yield f"{path}.weight", layer.updated_weight() - layer.base_weight()
        for name, parameter in self._parameters.items():
            yield name, parameter - self._reference[name]

    def __call__(self, step: Step) -> Tensor:
        """The weighted penalty, a scalar; the same for every batch."""
        terms = [
            (move**2).sum() if self._even else (self._importance[name] * move**2).sum()
            for name, move in self._moves()
        ]
        return 0.5 * self.strength * torch.stack(terms).sum()


def fisher_information(
    model: Potential, structures: Sequence[Structure], objective: Objective, seed: int
) -> dict[str, Tensor]:
    """Diagonal Fisher information of the predictions for some structures.

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
    generator = torch.Generator().manual_seed(seed * 16 + Stream.ANCHOR)
    wanted = {objective.target: (objective.forces, False)}
    with evaluating(model), _adapted_weights_train(model) as weights:
        total = {name: torch.zeros_like(p) for name, p in weights.items()}
        for batch in on_device(loader, model.device, model.dtype):
            predictions = model.predict_many(batch.graph, wanted, create_graph=True)
            sample = _sampled(batch.graph, predictions[objective.target], objective, generator)
            gradients = torch.autograd.grad(sample, list(weights.values()), materialize_grads=True)
            for sums, gradient in zip(total.values(), gradients, strict=True):
                sums += gradient**2
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


class AnchorFeature(Keeping):
    """The feature ``finetune.anchor``: an :class:`AnchorLoss`, L2-SP or EWC."""

    name = "anchor"

    def __init__(self) -> None:
        super().__init__()
        self._weighed: list[Structure] = []
        self._loss: AnchorLoss | None = None

    def check(self, plan: Plan) -> None:
        """Read the structures that EWC weighs the weights by."""
        anchor = plan.options.finetune.anchor
        if plan.foundation is None or anchor is None:
            return
        self._plan = plan
        if anchor.type != "ewc":
            return
        if not plan.foundation.sources:
            raise ConfigError(
                "architecture.training.finetune.anchor: ewc weighs the weights by what they mean "
                "for an energy of the foundation, but no trained head begins as one. Use l2sp, or "
                "name the head to begin with in finetune.inherit_heads."
            )
        structures = read_unlabelled(anchor.structures, plan, "anchor")
        self._weighed = sample(structures, anchor.samples, plan.seed)

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Note where the weights are, or take that as it was kept."""
        super().start(trainer, kept)
        if self._kept is not None:
            self._loss = AnchorLoss(trainer.model, **self._kept)

    def _made(self, model: Potential) -> dict[str, Any] | None:
        """Reference weights, their importance, and the strength."""
        if self._plan is None or self._plan.foundation is None:
            return None
        anchor = self._plan.options.finetune.anchor
        assert anchor is not None, "a run without finetune.anchor measures nothing"
        fresh = self._plan.start.fresh
        random = tuple(f"{path}." for name in fresh for path in model.network.head_modules(name))
        reference = {
            name: value
            for name, value in reference_weights(model).items()
            if not (random and name.startswith(random))
        }
        importance = None
        if anchor.type == "ewc":
            target = next(iter(self._plan.foundation.sources))
            objective = objective_of(self.trainer.options, model, target)
            importance = fisher_information(model, self._weighed, objective, self._plan.seed)
        _logger.info(
            "anchor: %s, strength %g%s",
            anchor.type,
            anchor.factor,
            f", Fisher information of {len(self._weighed)} structures" if importance else "",
        )
        return {"reference": reference, "importance": importance, "strength": anchor.factor}

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The penalty."""
        return {} if self._loss is None else {self.name: self._loss(step)}
