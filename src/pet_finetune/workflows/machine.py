"""Device, precision, seed and the versions of what computes."""

from __future__ import annotations

import importlib.metadata
import random

import torch

from pet_finetune import __version__

PACKAGES = ("torch", "ase", "numpy", "vesin")


def choose_dtype(bits: int) -> torch.dtype:
    """The floating type of ``base_precision``."""
    return {32: torch.float32, 64: torch.float64}[bits]


def seed_everything(seed: int | None) -> int:
    """Seed torch's generator, which makes new weights and dropout, and return the seed.

    Where none is given one is drawn. Data splits, order and rotations get the seed by argument.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    return seed


def versions() -> dict[str, str]:
    """Versions of the packages that determine the numbers."""
    found = {"pet-finetune": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
