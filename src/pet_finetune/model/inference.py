"""Derivatives where torch's inference mode is on, which records none of what they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pet_finetune.graph import Batch

__all__ = ["autograd_possible", "evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and back in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def autograd_possible(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Compute outside the inference mode of whoever calls; gradients stay enabled or disabled.

    Tensors made in that mode can never take part in a derivative. Weights that were (a model that
    was built or moved there) are replaced by equal ones for good.

    Args:
        model: what computes.
        batch: its input.

    Yields:
        The input, of tensors that autograd takes.
    """
    made_inside = batch.edge_vectors.is_inference() or next(model.parameters()).is_inference()
    if not (made_inside or torch.is_inference_mode_enabled()):
        yield batch
        return
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        _replace_weights(model)
        yield batch.map(_recordable)


def _recordable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _replace_weights(model: nn.Module) -> None:
    """Give a model ordinary tensors in place of those made in inference mode."""
    known: dict[int, nn.Parameter] = {}  # one parameter may stand in several modules
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_inference():
                new = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                module._parameters[name] = known.setdefault(id(weight), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _recordable(buffer)
