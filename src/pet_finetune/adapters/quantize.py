"""Holding the frozen base of an adapter in few bits (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential
from pet_finetune.nn.quantized import QuantizedLinear, held_bytes, quantize

from .adapter_config import AdapterConfig, replace_module
from .layers import LoraLinear

# Layers narrower than this on a side hold next to nothing, and the one that reads the geometry
# (4 numbers an edge) is among them.
_NARROWEST = 8


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising a base changed.

    Attributes:
        bits: of each quantised number.
        layers: how many were quantised.
        before, after: bytes of the whole network.
    """

    bits: int
    layers: int
    before: int
    after: int

    def __str__(self) -> str:
        return (
            f"{self.layers} frozen layers are held in {self.bits} bits: the network takes "
            f"{self.after / 1024**2:.2f} MiB instead of {self.before / 1024**2:.2f} MiB"
        )


def quantize_base(model: Potential, config: AdapterConfig) -> QuantizationReport:
    """Hold the frozen linear layers outside heads and trained modules in few bits, in place.

    Their floating weights are not kept.

    Args:
        model: with the adapter of ``config`` in it, not merged.
        config: resolved; ``quant_bits`` is 4 or 8.

    Raises:
        ConfigError: the library that quantises is not installed.
    """
    assert config.quant_bits is not None
    before, layers = held_bytes(model.network), 0
    for path, layer in list(_frozen_layers(model.network, config)):
        if isinstance(layer, LoraLinear):
            layer.quantize(config.quant_bits)
        else:
            small = QuantizedLinear(layer, config.quant_bits).train(layer.training)
            replace_module(model.network, path, small)
        layers += 1
    return QuantizationReport(config.quant_bits, layers, before, held_bytes(model.network))


@torch.no_grad()
def round_base(model: Potential, config: AdapterConfig) -> dict[str, Tensor]:
    """Round the weights that :func:`quantize_base` would hold in few bits, in place, as floats.

    For models that predict and must have their base back: :func:`restore_base`.

    Returns:
        What the weights were, by the path of their layer.
    """
    assert config.quant_bits is not None
    before = {}
    for path, layer in _frozen_layers(model.network, config):
        before[path] = layer.weight.detach().clone()
        layer.weight.copy_(quantize(layer.weight, config.quant_bits).dense(layer.weight.dtype))
    return before


@torch.no_grad()
def restore_base(model: Potential, before: Mapping[str, Tensor]) -> None:
    """Undo :func:`round_base`, bit for bit."""
    for path, weight in before.items():
        model.network.get_parameter(f"{path}.weight").copy_(weight)


def _frozen_layers(network: nn.Module, config: AdapterConfig) -> Iterator[tuple[str, nn.Linear]]:
    whole = tuple(f"{name}." for name in (*HEAD_GROUPS, *(config.modules_to_save or ())))
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear) or f"{path}.".startswith(whole):
            continue
        if min(module.in_features, module.out_features) >= _NARROWEST:
            yield path, module
