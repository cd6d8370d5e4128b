"""Merging an adapter into the weights it adapts, and taking it out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pet_finetune.model.potential import Potential
from pet_finetune.nn.attention import PromptTokens
from pet_finetune.nn.quantized import QuantizedLinear

from .adapter_config import replace_module
from .inject import adapter_state, target_of
from .layers import LoraLinear, merge_new_rows, prompts


def lora_layers(model: Potential) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers of a model with their paths in the network."""
    for name, module in model.network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merge(model: Potential) -> None:
    """Merge the adapter into the weights, in place; the outputs stay the same bit for bit.

    Over a quantised base to rounding; the merged weights are floats until :func:`unmerge`. Prompts
    have nothing to merge into and stay as they are.
    """
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge(model: Potential) -> None:
    """Undo :func:`merge`: the base weights come back bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


@contextmanager
def adapters_disabled(model: Potential) -> Iterator[None]:
    """Within this context the model is its base again, bit for bit; quantised where it is.

    The low-rank updates or prompts are switched off, the heads trained beside them give way to
    those they started from, and so do the baselines and scales.
    """
    state = adapter_state(model)
    layers: list[LoraLinear | PromptTokens] = [layer for _, layer in lora_layers(model)]
    if state.config.num_prompts:
        layers += prompts(model).values()
    before = [layer.enabled for layer in layers]
    heads = {name: model.network.get_parameter(name) for name in state.saved}
    trained = {name: parameter.detach().clone() for name, parameter in heads.items()}
    targets = [target_of(model, name) for name in state.config.targets]
    try:
        for layer in layers:
            layer.enabled = False
        _copy_into(heads, state.saved)
        for target in state.targets:
            target.put_on(model)
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        _copy_into(heads, trained)
        for target in targets:
            target.put_on(model)


@torch.no_grad()
def _copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def merged_copy(model: Potential) -> Potential:
    """An independent plain model, without adapters, that predicts the same bit for bit.

    Over a quantised base, whose products are taken apart, the same to rounding. Prompts become part
    of the network.
    """
    plain = copy.deepcopy(model)
    plain.adapter = None
    for path, layer in list(lora_layers(plain)):
        replace_module(plain.network, path, layer.to_linear())
    for path, module in list(plain.network.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(plain.network, path, module.to_linear(plain.dtype))
    return merge_new_rows(plain)
