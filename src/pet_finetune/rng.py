"""Random numbers: the seed of a run and the streams drawn from it."""

from __future__ import annotations

import random
from enum import IntEnum, unique

import torch

__all__ = ["MemberStream", "Stream", "seed_everything"]


@unique
class Stream(IntEnum):
    """The random streams of one run: each goes into the seed of a generator of its own.

    The numbers are part of what a seed reproduces; a new stream takes a new number.
    """

    ORDER = 0
    ROTATIONS = 1
    REPLAY = 2
    NOISE = 3
    CONSISTENCY = 4
    PERTURBED_COPIES = 7
    ANCHOR = 8
    SAMPLE = 9
    EXPLORATION = 10
    PROCESS = 11


@unique
class MemberStream(IntEnum):
    """The random streams of one member of an ensemble, beside (seed, member)."""

    SEED = 0
    BOOTSTRAP = 1


def seed_everything(seed: int | None) -> int:
    """Seed torch's generator, which makes new weights and dropout, and return the seed.

    Where none is given one is drawn. Data splits, order and rotations get the seed by argument.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    return seed
