"""The weights of an adapter's base: a name for them, and holding them in few bits (QLoRA).

QLoRA: arXiv:2305.14314.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential
from pet_finetune.nn.quantized import QuantizedLinear, held_bytes, quantize

from .adapter_config import AdapterConfig, replace_module
from .layers import LoraLinear


def weights_fingerprint(model: Potential) -> str:
    """SHA-256 of the network's weights and species, 64 hexadecimal digits.

    Weights count as float32, so that a model opened in float64 keeps its name. Baselines and
    scales do not count: refitting them leaves the network what it was.
    """
    digest = hashlib.sha256(repr(model.species).encode())
    _add(digest, model.network.state_dict().items())
    return digest.hexdigest()


def target_fingerprints(model: Potential, targets: Iterable[str]) -> dict[str, str]:
    """For each target, SHA-256 of what its predictions depend on, as above.

    The heads of other targets do not count.
    """
    body: list[tuple[str, torch.Tensor]] = []
    heads: list[tuple[str, torch.Tensor]] = []
    for name, value in model.network.state_dict().items():
        (heads if name.startswith(HEAD_GROUPS) else body).append((name, value))
    digest = hashlib.sha256(repr(model.species).encode())
    _add(digest, body)
    found = {}
    for target in targets:
        own = digest.copy()
        _add(own, [(name, value) for name, value in heads if name.split(".")[1] == target])
        found[target] = own.hexdigest()
    return found


def _add(digest: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, value in sorted(weights, key=lambda named: named[0]):
        if value.is_floating_point():
            digest.update(name.encode())
            data = value.detach().to("cpu", torch.float32).contiguous()
            digest.update(data.numpy().tobytes())


def content_digest(tensors: Mapping[str, torch.Tensor], values: Any) -> str:
    """SHA-256 of tensors with their names, types and shapes, and of JSON values.

    For formats that have no checksum of their own: one changed bit gives another digest.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Layers narrower than this on a side hold next to nothing, and the one that reads the geometry
# (4 numbers an edge) is among them.
_NARROWEST = 8


@dataclass(frozen=True)
class QuantizationReport:
    """Effect of the quantisation of a base.

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

    Their floating weights are not kept. The adapter of ``config`` (``quant_bits`` 4 or 8) is in the
    model, not merged.

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
