"""What holds for models that differ in the elements they know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase import Atoms

from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.model.potential import Potential


def assert_same_energies(
    one: Potential,
    other: Potential,
    frames: Sequence[Atoms],
    others: Sequence[Atoms] | None = None,
) -> None:
    """Both models predict the same for every target, bit for bit.

    With ``others``, the second model sees these structures instead.
    """
    for target in one.targets:
        first = one.predict(batch_from_atoms(frames, one.cutoff, one.dtype), target, stress=True)
        batch = batch_from_atoms(others or frames, other.cutoff, other.dtype)
        second = other.predict(batch, target, stress=True)
        for name in ("energy", "forces", "stress"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
