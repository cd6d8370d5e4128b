"""Random numbers: the seed of a run and the streams drawn from it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from enum import IntEnum, unique
from typing import Any

import numpy as np
import torch

from . import processes


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
    """Random streams of one member of an ensemble, added to (seed, member)."""

    SEED = 0
    BOOTSTRAP = 1


def seed_everything(seed: int | None) -> int:
    """Seed torch's generator, which makes new weights and dropout, and return the seed.

    Where none is given one is drawn. Data splits, order and rotations get the seed by argument.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed % 2**63)  # which takes no larger ones
    return seed


def torch_generator(*place: int) -> torch.Generator:
    """A generator on the CPU that gives the same numbers everywhere.

    Args:
        place: what they depend on: the run's seed, epoch and batch, and the :class:`Stream`.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators, of which dropout draws, for :func:`set_generators`."""
    generators = processes.gathered(torch.get_rng_state())
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng": generators[0], "cuda_rng": on_gpu, "other_rngs": generators[1:]}


def seed_process(seed: Sequence[int]) -> None:
    """Give this process random numbers that no other one has."""
    sequence = np.random.SeedSequence([*seed, processes.rank(), Stream.PROCESS])
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def set_generators(
    states: Mapping[str, Any], device: torch.device, otherwise: Sequence[int]
) -> None:
    """Restore the state of torch's generators.

    Args:
        states: as :func:`generator_states` gave them, maybe of fewer processes.
        device: as there.
        otherwise: as for :func:`seed_process`, of a process that has no state.
    """
    generators = [states["rng"], *states.get("other_rngs", ())]
    if processes.rank() >= len(generators):
        seed_process(otherwise)
        return
    torch.set_rng_state(generators[processes.rank()].cpu())
    if processes.first() and device.type == "cuda" and states["cuda_rng"] is not None:
        torch.cuda.set_rng_state(states["cuda_rng"].cpu(), device)
