"""Batches of a second set beside those of the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pet_finetune.rng import Stream

from .batch import LabelledBatch
from .loader import Loader

__all__ = ["Beside", "number_beside"]


def number_beside(own: int, fraction: float) -> int:
    """How many structures make up ``fraction`` of all beside ``own`` others; at least one."""
    return max(1, round(own * fraction / (1.0 - fraction)))


class Beside:
    """Draws what goes beside each batch of another loader.

    The second set is gone through in a new random order again and again, so that its structures
    occur equally often. What is drawn is a function of the seed, the epoch and the batch.
    """

    def __init__(self, loader: Loader, main: Loader, fraction: float) -> None:
        """Prepare to draw.

        Args:
            loader: of the second set; its seed and whether it rotates structures count, its batch
                size and order do not.
            main: the loader whose batches are accompanied.
            fraction: part of all structures of a step that come from the second set, above 0 and
                below 1.
        """
        self.loader, self.main, self.fraction = loader, main, fraction
        self._epoch = -1
        self._plan: list[np.ndarray] = []

    def batch(self, epoch: int, batch: int) -> LabelledBatch:
        """What goes beside one batch of the main loader; both count from 0."""
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self.loader.collate(self._plan[batch], epoch, self.main.shares)

    def _plan_of(self, epoch: int) -> list[np.ndarray]:
        sizes = [number_beside(own, self.fraction) for own in self.main.batch_sizes(epoch)]
        return np.split(self._order(epoch, sum(sizes)), np.cumsum(sizes)[:-1])

    def _order(self, epoch: int, count: int) -> np.ndarray:
        """Members of the second set, one permutation after the other, ``[count]``."""
        rng = np.random.default_rng([self.loader.seed, epoch, Stream.REPLAY])
        size = len(self.loader.structures)
        rounds: Sequence[np.ndarray] = [rng.permutation(size) for _ in range(-(-count // size))]
        return np.concatenate(rounds)[:count]
