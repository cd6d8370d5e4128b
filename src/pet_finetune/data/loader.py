"""Batches for training: shuffled, packed and rotated anew each epoch, the same for a given seed."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pet_finetune.errors import DataError
from pet_finetune.log import Watch, get_logger
from pet_finetune.rng import Stream

from .augment import random_rotations, rotate_batch
from .batch import LabelledBatch, collate_labelled, prepare
from .neighbors import structure_neighbors
from .structure import Structure

__all__ = ["Loader", "count_packs", "pack"]

_logger = get_logger(__name__)

# Independent random streams of one (seed, epoch).


class Loader:
    """Cuts structures into batches; neighbour lists are computed once, here.

    What an epoch yields is a function of ``(seed, epoch)`` alone, so a run resumed at any batch
    sees what it would have seen. Every structure occurs exactly once an epoch (unless
    ``min_atoms_per_batch`` drops batches).
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        cutoff: float,
        *,
        batch_size: int | None = None,
        max_atoms_per_batch: int | None = None,
        min_atoms_per_batch: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare the structures.

        Args:
            structures: at least one.
            cutoff: neighbour list cutoff in Å.
            batch_size: structures in a batch; ignored when ``max_atoms_per_batch`` is given.
            max_atoms_per_batch: fill batches up to this many atoms; a larger structure makes a
                batch of its own.
            min_atoms_per_batch: with ``max_atoms_per_batch``, leave out batches with fewer atoms
                (for that epoch).
            shuffle: draw a new order each epoch.
            augment: turn (and maybe invert) each structure at random each epoch.
            seed: seed of order and rotations, at least 0.
            dtype: float dtype of the batches.

        Raises:
            DataError: no structures, or sizes below 1.
        """
        if not structures:
            raise DataError("There are no structures to load: the set is empty.")
        _check_sizes(batch_size, max_atoms_per_batch, seed)
        #: The structures, in the order given.
        self.structures = tuple(structures)
        self._num_atoms = np.array([s.num_atoms for s in structures], dtype=np.int64)
        self._prepared = []
        with Watch("neighbours of the structures", "structures", len(structures)) as watch:
            for structure in structures:
                neighbors = structure_neighbors(structure, cutoff)
                self._prepared.append(prepare(structure, neighbors, dtype))
                watch.step()
        self.cutoff = float(cutoff)
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_atoms_per_batch = max_atoms_per_batch
        self.min_atoms_per_batch = min_atoms_per_batch
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        largest = int(self._num_atoms.max())
        if max_atoms_per_batch is not None and largest > max_atoms_per_batch:
            _logger.warning(
                "max_atoms_per_batch is %d, but the largest structure has %d atoms; structures "
                "above the limit make batches of their own.",
                max_atoms_per_batch,
                largest,
            )

    def view(
        self,
        *,
        batch_size: int | None = None,
        max_atoms_per_batch: int | None = None,
        shuffle: bool = False,
        augment: bool = False,
    ) -> Loader:
        """Another loader over the same prepared structures, by default in order and unturned.

        Without sizes it cuts batches as this one does, except that none is left out.
        """
        other = copy.copy(self)
        if batch_size is not None or max_atoms_per_batch is not None:
            _check_sizes(batch_size, max_atoms_per_batch, self.seed)
            other.batch_size, other.max_atoms_per_batch = batch_size, max_atoms_per_batch
        other.min_atoms_per_batch = 0
        other.shuffle = shuffle
        other.augment = augment
        return other

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels that at least one structure has, sorted."""
        return tuple(sorted({name for s in self.structures for name in s.labels}))

    def num_batches(self, epoch: int = 0) -> int:
        """Number of batches of an epoch; differs between epochs only when packing by atoms."""
        if self.max_atoms_per_batch is None:
            assert self.batch_size is not None
            return -(-len(self.structures) // self.batch_size)
        return count_packs(
            self._order(epoch), self._num_atoms, self.max_atoms_per_batch, self.min_atoms_per_batch
        )

    @property
    def same_every_epoch(self) -> bool:
        """Whether each epoch has as many batches as the others."""
        alike = int(self._num_atoms.min()) == int(self._num_atoms.max())
        return self.max_atoms_per_batch is None or not self.shuffle or alike

    def __len__(self) -> int:
        """Number of batches of epoch 0."""
        return self.num_batches(0)

    def __iter__(self) -> Iterator[LabelledBatch]:
        """The batches of epoch 0: what a loader without shuffling yields in every epoch."""
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LabelledBatch]:
        """The batches of an epoch, made one by one as they are asked for.

        Args:
            epoch: number of the epoch, at least 0.
            start_batch: number of batches to leave out at the start, to go on mid-epoch.
        """
        rotations = self._rotations(epoch) if self.augment else None
        for members in self._plan(epoch)[start_batch:]:
            yield self._collate(members, rotations)

    def collate(self, members: np.ndarray, epoch: int) -> LabelledBatch:
        """A batch of chosen structures, rotated as in an epoch.

        Args:
            members: positions in :attr:`structures`; one may occur more than once.
            epoch: number of the epoch, at least 0.
        """
        return self._collate(members, self._rotations(epoch) if self.augment else None)

    def _collate(self, members: np.ndarray, rotations: Tensor | None) -> LabelledBatch:
        batch = collate_labelled([self._prepared[member] for member in members.tolist()])
        return batch if rotations is None else rotate_batch(batch, rotations[members])

    def batch_sizes(self, epoch: int = 0) -> list[int]:
        """Number of structures in each batch of an epoch."""
        return [len(members) for members in self._plan(epoch)]

    def order(self, epoch: int = 0) -> np.ndarray:
        """Positions in :attr:`structures` of what an epoch yields, one batch after the other."""
        return np.concatenate(self._plan(epoch))

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """Which structures make up each batch of an epoch."""
        order = self._order(epoch)
        if self.max_atoms_per_batch is not None:
            return pack(order, self._num_atoms, self.max_atoms_per_batch, self.min_atoms_per_batch)
        assert self.batch_size is not None
        return np.split(order, range(self.batch_size, len(order), self.batch_size))

    def _order(self, epoch: int) -> np.ndarray:
        """All structures in the order of an epoch."""
        order = np.arange(len(self.structures))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, Stream.ORDER]).permutation(order)
        return order

    def _rotations(self, epoch: int) -> Tensor:
        """One rotation per structure, whatever batch it falls into; ``[len(structures), 3, 3]``."""
        sequence = np.random.SeedSequence([self.seed, epoch, Stream.ROTATIONS])
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        return random_rotations(len(self.structures), generator, self.dtype)


def _check_sizes(batch_size: int | None, max_atoms_per_batch: int | None, seed: int) -> None:
    """Refuse sizes that make no batches."""
    if batch_size is None and max_atoms_per_batch is None:
        raise DataError("Give the loader a batch_size or max_atoms_per_batch.")
    sizes = {"batch_size": batch_size, "max_atoms_per_batch": max_atoms_per_batch}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, found {value}.")
    if seed < 0:
        raise DataError(f"The seed must be at least 0, found {seed}.")


def pack(
    order: np.ndarray, num_atoms: np.ndarray, max_atoms: int, min_atoms: int = 0
) -> list[np.ndarray]:
    """Cut an order of structures into runs of at most ``max_atoms`` atoms.

    Args:
        order: indices of structures, in the order they are to be used.
        num_atoms: number of atoms of each structure (indexed by ``order``'s values).
        max_atoms: atoms that a batch may hold; a larger structure makes a batch of its own.
        min_atoms: batches with fewer atoms are left out.

    Returns:
        consecutive pieces of ``order``.
    """
    cuts, filled = [], 0
    for position, count in enumerate(num_atoms[order].tolist()):
        if filled and filled + count > max_atoms:
            cuts.append(position)
            filled = 0
        filled += count
    pieces = np.split(order, cuts)
    return [piece for piece in pieces if int(num_atoms[piece].sum()) >= min_atoms]


def count_packs(order: np.ndarray, num_atoms: np.ndarray, max_atoms: int, min_atoms: int) -> int:
    """How many pieces :func:`pack` makes, without making them; a few steps a piece."""
    ends = np.cumsum(num_atoms[order]).tolist()
    count = first = filled = 0
    while first < len(ends):
        # A structure that is too large is a piece of its own.
        last = max(first + 1, bisect_right(ends, filled + max_atoms, first))
        count += ends[last - 1] - filled >= min_atoms
        first, filled = last, ends[last - 1]
    return count
