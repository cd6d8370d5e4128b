"""Anchors: penalties on how far the weights have moved from the foundation's.

L2-SP (arXiv:1802.01483, eq. 2, for the weights that the foundation has) and elastic weight
consolidation, EWC (arXiv:1612.00796, eq. 3). Weights that an adapter changes count by what the
adapter changes of them, the rest by their own values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pet_finetune.adapters.merge import lora_layers
from pet_finetune.adapters.new_rows import ROWS, grown_tables
from pet_finetune.model import Potential
from pet_finetune.training.extra import Seen


def anchored_parameters(model: Potential) -> dict[str, nn.Parameter]:
    """Trained parameters that count by their own values.

    Those of adapted layers count by what they do to the layer's weight, and embeddings of
    elements that the foundation lacks are free.
    """
    free = (*(f"{path}." for path, _ in lora_layers(model)), *_new_rows(model))
    return {
        name: parameter
        for name, parameter in model.network.named_parameters()
        if parameter.requires_grad and not name.startswith(free)
    }


def _new_rows(model: Potential) -> list[str]:
    return [f"{path}.{ROWS}" for path, _ in grown_tables(model)]


def reference_weights(model: Potential) -> dict[str, Tensor]:
    """Values to measure from: those that the model has now, by name, on the CPU."""
    parameters = anchored_parameters(model)
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


class AnchorLoss:
    """An extra loss: ``strength / 2`` times the weighted squared distance from the foundation.

    Args:
        model: is trained; its adapter, if any, is not merged.
        reference: from :func:`reference_weights` of the starting model. Trained parameters that
            are not in it (fresh heads) are free.
        importance: from :func:`~.fisher.fisher_information` for EWC; None counts all alike.
        strength: factor.
    """

    name = "anchor"

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
        """What each weight has moved by, with the name of the foundation's weight."""
        for path, layer in self._layers.items():
            yield f"{path}.weight", layer.updated_weight() - layer.base_weight()
        for name, parameter in self._parameters.items():
            yield name, parameter - self._reference[name]

    def __call__(self, seen: Seen) -> Tensor:
        """The weighted penalty, a scalar; the same for every batch."""
        terms = [
            (move**2).sum() if self._even else (self._importance[name] * move**2).sum()
            for name, move in self._moves()
        ]
        return 0.5 * self.strength * torch.stack(terms).sum()
