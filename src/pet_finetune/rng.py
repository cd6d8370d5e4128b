"""Random numbers: the seed of a run."""

from __future__ import annotations

import random

import torch

__all__ = ["seed_everything"]


def seed_everything(seed: int | None) -> int:
    """Seed torch's generator, which makes new weights and dropout, and return the seed.

    Where none is given one is drawn. Data splits, order and rotations get the seed by argument.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    return seed
