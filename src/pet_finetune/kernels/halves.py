"""Products in bfloat16 with sums in float32, on processors that have instructions for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .compiled import active


class _State:
    """Whether projections are rounded now."""

    rounds = False


def multiplies_halves() -> bool:
    """Whether the kernels are in use and the processor multiplies bfloat16 (AVX512_BF16)."""
    return active() and bool(torch.ops.pet_finetune.multiplies_halves())


def halves() -> bool:
    """Whether float32 projections are computed from factors rounded to bfloat16 now."""
    return _State.rounds


@contextmanager
def in_bfloat16(rounds: bool = True) -> Iterator[None]:
    """Round the factors of float32 projections, their sums stay in float32.

    A derivative is computed as what it is the derivative of was: both factors of each product are
    rounded, wherever it is computed. All but projections is as it was.

    Args:
        rounds: False leaves a context around this one.
    """
    before, _State.rounds = _State.rounds, rounds
    try:
        yield
    finally:
        _State.rounds = before
