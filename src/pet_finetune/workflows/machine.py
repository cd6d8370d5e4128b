"""Device, precision, seed and the versions of what computes."""

from __future__ import annotations

import importlib.metadata
import random

import torch

from pet_finetune.errors import ConfigError

PACKAGES = ("pet-finetune", "torch", "ase", "numpy", "vesin")


def choose_device(name: str) -> torch.device:
    """The device that an option names.

    Args:
        name: ``auto`` and ``gpu`` take the first GPU; ``auto`` falls back to the CPU.

    Raises:
        ConfigError: the device is not there, or cannot do what is needed.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = "cuda" if name == "gpu" else name
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device: '{name}' needs a CUDA GPU, and torch finds none here. Use 'cpu' or 'auto'."
        )
    if wanted.startswith("mps"):
        raise ConfigError(
            "device: 'mps' has no 64-bit numbers, which total energies need. Use 'cpu'."
        )
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: '{name}' is not there; this machine has {torch.cuda.device_count()} GPU(s)."
        )
    return device


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
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
