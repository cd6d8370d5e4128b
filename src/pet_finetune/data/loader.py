"""Batches for training: shuffled, packed and rotated anew each epoch, the same for a given seed."""

from __future__ import annotations

import copy
import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from pet_finetune.errors import DataError
from pet_finetune.keys import label_kind
from pet_finetune.log import Watch, get_logger
from pet_finetune.rng import Stream

from .augment import random_rotations, rotate_batch
from .batch import LabelledBatch, Whole, collate_labelled, prepare
from .neighbors import structure_neighbors
from .structure import Structure

__all__ = [
    "Beside",
    "Loader",
    "count_packs",
    "deal",
    "number_beside",
    "on_device",
    "one_ahead",
    "pack",
]

_logger = get_logger(__name__)


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
            augment: rotate (and maybe invert) each structure at random each epoch.
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
        #: Which process of how many this loader makes batches for, and which batches it makes.
        self._share, self._dealt = (0, 1), (0, 1)
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
        other._share = other._dealt = (0, 1)
        return other

    def shared(self, rank: int, size: int) -> Loader:
        """The same batches, of each of which this process has a part.

        The structures of a batch are dealt out so that all processes have about as many edges
        and atoms to compute. What the parts make together does not depend on how many there are. A
        process may have no structure of a batch with few.

        Args:
            rank: which process this is, from 0.
            size: how many there are.
        """
        other = copy.copy(self)
        other._share = (rank, size)
        return other

    def dealt(self, rank: int, size: int) -> Loader:
        """Every ``size``-th batch alone, from number ``rank`` on: whole ones for each process."""
        other = copy.copy(self)
        other._dealt = (rank, size)
        return other

    @property
    def share(self) -> tuple[int, int]:
        """Which process of how many has its parts of the batches here."""
        return self._share

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
        first, step = self._dealt
        for members in self._plan(epoch)[start_batch + first :: step]:
            yield self._collate(members, rotations, self._share)

    def collate(
        self, members: np.ndarray, epoch: int, share: tuple[int, int] = (0, 1)
    ) -> LabelledBatch:
        """A batch of chosen structures, rotated as in an epoch.

        Args:
            members: positions in :attr:`structures`; one may occur more than once.
            epoch: number of the epoch, at least 0.
            share: which process of how many has its part of it.
        """
        return self._collate(members, self._rotations(epoch) if self.augment else None, share)

    def _collate(
        self, members: np.ndarray, rotations: Tensor | None, share: tuple[int, int]
    ) -> LabelledBatch:
        rank, size = share
        positions = np.arange(len(members))
        if size > 1:
            positions = deal(self._work[members], size)[rank]
        own = members[positions]
        if len(own):
            batch = collate_labelled([self._prepared[member] for member in own.tolist()])
        else:
            batch = self._prepared[int(members[0])].first(0)
        batch = batch if rotations is None else rotate_batch(batch, rotations[own])
        return batch if size == 1 else replace(batch, whole=self._whole(members, positions))

    def _whole(self, members: np.ndarray, positions: np.ndarray) -> Whole:
        """What a part of a batch has to know of all of it."""
        all_of_it = [self._prepared[member] for member in members.tolist()]
        names = dict.fromkeys(name for one in all_of_it for name in one.labels)
        known = {name: [_num_known(one, name, self.augment) for one in all_of_it] for name in names}
        return Whole(
            positions,
            self._num_atoms[members],
            {name: np.array(numbers) for name, numbers in known.items()},
            tuple(frame for one in all_of_it for frame in one.frames),
            tuple(source for one in all_of_it for source in one.sources),
        )

    @cached_property
    def _work(self) -> np.ndarray:
        """Edges and atoms of each structure: how long it takes, in some unit."""
        return self._num_atoms + np.array([one.graph.num_edges for one in self._prepared])

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


def _num_known(batch: LabelledBatch, name: str, rotated: bool) -> int:
    """Known numbers of a label: of rotated vectors and tensors, those that are known whole."""
    label = batch.labels.get(name)
    if label is None:
        return 0
    known = ~label.isnan()
    if rotated:
        for axis in range(1, 1 + label_kind(name, batch.kinds).rank):
            known = known.all(axis, keepdim=True).expand_as(known)
    return int(known.sum())


def deal(work: np.ndarray, size: int) -> list[np.ndarray]:
    """Deal structures out to processes so that all have about as much to do.

    The largest goes first, always to whoever has least: within 4/3 of the best that there is (R. L.
    Graham, SIAM J. Appl. Math. 17, 416 (1969)).

    Args:
        work: of each structure, above 0.
        size: how many processes there are.

    Returns:
        Positions in ``work`` for each process, ascending; empty for some if there are too few.
    """
    heap = [(0, process) for process in range(size)]
    hands: list[list[int]] = [[] for _ in range(size)]
    for position in np.argsort(-work, kind="stable").tolist():
        held, process = heapq.heappop(heap)
        hands[process].append(position)
        heapq.heappush(heap, (held + int(work[position]), process))
    return [np.array(sorted(hand), dtype=np.int64) for hand in hands]


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


T = TypeVar("T")


class _End:
    """What comes after the last item."""


_END: Final = _End()


def on_device(
    batches: Iterable[LabelledBatch], device: torch.device, dtype: torch.dtype
) -> Iterator[LabelledBatch]:
    """The same batches in the same order, moved to a device and cast.

    On a GPU the CPU would otherwise cut and rotate a batch while the GPU waits for it: a thread
    does that for one batch ahead, and puts it where the GPU reads it without stopping the CPU.

    Args:
        batches: on the CPU; where they come from a generator, it must share no state with whoever
            uses the batches (a :class:`Loader`'s draws from its own random streams).
        device: where the batches go.
        dtype: of their floating-point tensors.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, dtype)
        return
    for batch in one_ahead(_pinned(batches, device)):
        # Copied on the stream that computes, so nothing reads the batch before it is there.
        yield batch.to(device, dtype, non_blocking=True)


def _pinned(batches: Iterable[LabelledBatch], device: torch.device) -> Iterator[LabelledBatch]:
    for batch in batches:
        with torch.cuda.device(device):  # a new thread would wake the first GPU instead
            pinned = batch.pinned()
        yield pinned


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order; a thread makes the next one while one is used.

    An error in making an item is raised where that item would have come.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        coming = thread.submit(next, iterator, _END)
        while not isinstance(item := coming.result(), _End):
            coming = thread.submit(next, iterator, _END)
            yield item


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
        return self.loader.collate(self._plan[batch], epoch, self.main.share)

    def _plan_of(self, epoch: int) -> list[np.ndarray]:
        sizes = [number_beside(own, self.fraction) for own in self.main.batch_sizes(epoch)]
        return np.split(self._order(epoch, sum(sizes)), np.cumsum(sizes)[:-1])

    def _order(self, epoch: int, count: int) -> np.ndarray:
        """Members of the second set, one permutation after the other, ``[count]``."""
        rng = np.random.default_rng([self.loader.seed, epoch, Stream.REPLAY])
        size = len(self.loader.structures)
        rounds: Sequence[np.ndarray] = [rng.permutation(size) for _ in range(-(-count // size))]
        return np.concatenate(rounds)[:count]
