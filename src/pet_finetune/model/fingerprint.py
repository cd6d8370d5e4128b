"""A short name for a set of weights, so that an adapter knows the base it belongs to."""

from __future__ import annotations

import hashlib

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
