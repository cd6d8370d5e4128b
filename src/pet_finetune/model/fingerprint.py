"""A short name for a set of weights, so that an adapter knows the base it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from .potential import Potential


def weights_fingerprint(model: Potential) -> str:
    """SHA-256 of the network's weights and species, 64 hexadecimal digits.

    Weights count as float32, so that a model opened in float64 keeps its name. Baselines and
    scales do not count: refitting them leaves the network what it was.
    """
    digest = hashlib.sha256()
    digest.update(repr(model.species).encode())
    for name, value in sorted(model.network.state_dict().items()):
        if value.is_floating_point():
            digest.update(name.encode())
            data = value.detach().to("cpu", torch.float32).contiguous()
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()


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
