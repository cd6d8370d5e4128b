"""What makes the members of an ensemble differ: their seeds, and the structures they see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pet_finetune.config import Options
from pet_finetune.data.on_disk import taken
from pet_finetune.data.splits import Splits
from pet_finetune.rng import MemberStream


def of_member(options: Options, splits: Splits, seed: int) -> tuple[int, Splits]:
    """The seed of ``finetune.member`` and the sets it is trained with.

    Both are functions of the ensemble's seed and the member's number alone. Validation and test
    sets are those of all members; with ``finetune.bootstrap`` the training set is a bootstrap
    sample: as many structures, drawn with replacement (Breiman, Mach. Learn. 24, 123 (1996)), in
    the order of the set.

    Args:
        options: with ``finetune.ensemble`` and ``finetune.member``.
        splits: the sets of the whole ensemble.
        seed: of the whole ensemble.
    """
    member = options.finetune.member
    assert member is not None, "a single run has no member"
    own = int(np.random.SeedSequence([seed, member, MemberStream.SEED]).generate_state(1)[0] >> 1)
    if not options.finetune.bootstrap:
        return own, splits
    rng = np.random.default_rng([seed, member, MemberStream.BOOTSTRAP])
    drawn = np.sort(rng.integers(len(splits.train), size=len(splits.train)))
    return own, replace(splits, train=taken(splits.train, drawn))


def options_of_member(options: Options, member: int, seed: int) -> Options:
    """The options of an ensemble, to train one member of it."""
    return options.with_finetune(member=member).model_copy(update={"seed": seed})
