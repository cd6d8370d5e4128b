"""Smooth cutoff functions: 1 inside, 0 at the cutoff, with a taper of a given width.

Formulas: PET paper (arXiv:2305.19302) for the cosine; the bump is the C-infinity step
``(1 + tanh(cot(pi x))) / 2`` that metatrain uses for its current models.
"""

import torch
from torch import Tensor


def bump_step(x: Tensor) -> Tensor:
    """The bump over the taper, from 1 at ``x = 0`` to 0 at ``x = 1``; TorchScript compiles it."""
    # Evaluated a hair inside its open interval, where cot() is still finite.
    x = x.clamp(1e-6, 1.0 - 1e-6)
    return 0.5 * (1.0 + torch.tanh(1.0 / torch.tan(torch.pi * x)))


def cosine_step(x: Tensor) -> Tensor:
    """The same of the cosine."""
    return 0.5 * (1.0 + torch.cos(torch.pi * x.clamp(0.0, 1.0)))
