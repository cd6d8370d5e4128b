"""A short name for a set of weights, so that an adapter knows the base it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .pet import HEAD_GROUPS
from .potential import Potential


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
    """SHA-256 of tensors with their names, types and shapes, and of JSON values beside them.

    For formats that have no checksum of their own: one changed bit gives another digest.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
