"""Batches for training: shuffled, packed and rotated anew each epoch, the same for a given seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pet_finetune.errors import DataError
from pet_finetune.keys import label_kind
from pet_finetune.log import get_logger
from pet_finetune.rng import Stream, torch_generator
from pet_finetune.terminal import Watch

from .epochs import count_packs, deal, in_blocks, pack, random_rotations, rotate_batch
from .labelled_batch import LabelledBatch, Whole, collate_labelled, num_known, prepare
from .neighbors import structure_neighbors
from .structure import Structure, evenly_apart
from .structure_sets import OF_ELEMENT, SAMPLE, OnDisk, label_names, sizes_of_structures

_logger = get_logger(__name__)


class Loader:
    """Cuts structures into batches.

    Neighbour lists are computed once, here; of sets that stay on disk, as each batch is made, and
    such a set is shuffled as :func:`~.epochs.in_blocks` says.

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
            DataError: no structures.
        """
        if not structures:
            raise DataError("There are no structures to load: the set is empty.")
        #: The structures, in the order given, and the atoms of each, ``[n]``.
        self.structures: Sequence[Structure] = structures
        self._prepared: _OnTheFly | list[LabelledBatch]
        self.num_atoms = sizes_of_structures(structures)
        if isinstance(structures, OnDisk):
            self._prepared = _OnTheFly(structures, cutoff, dtype)
        else:
            self.structures = tuple(structures)
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
        #: Which part of how many of each batch's share is made at the moment; the plan of an epoch.
        self._part, self._planned = (0, 1), (-1, list[np.ndarray]())
        self._turned: tuple[int, Tensor] | None = None
        largest = int(self.num_atoms.max())
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
            other.batch_size, other.max_atoms_per_batch = batch_size, max_atoms_per_batch
        other.min_atoms_per_batch = 0
        other.shuffle = shuffle
        other.augment = augment
        other._share = other._dealt = other._part = (0, 1)
        other._planned = (-1, [])
        return other

    @property
    def atoms_per_batch(self) -> int:
        """About how many atoms a batch has."""
        if self.max_atoms_per_batch is not None:
            return self.max_atoms_per_batch
        assert self.batch_size is not None
        return int(self.num_atoms.mean() * self.batch_size)

    def shared(self, rank: int, size: int) -> Loader:
        """The batches, each reduced to the part of this process.

        The structures of a batch are dealt out so that all processes have about as many edges
        and atoms to compute. What the parts make together does not depend on how many there are. A
        process may have no structure of a batch with few.
        """
        other = copy.copy(self)
        other._share = (rank, size)
        return other

    def dealt(self, rank: int, size: int) -> Loader:
        """Every ``size``-th batch alone, from number ``rank`` on: whole ones for each process."""
        other = copy.copy(self)
        other._dealt = (rank, size)
        return other

    def sampled(self, what: str = "", most: int | None = None, label: str = "") -> Loader:
        """A view of a part of the structures where a large set is on disk; else itself.

        Args:
            what: what looks at the part, for the log.
            most: as many structures are enough, also of a set in memory; of rare elements there
                are more.
            label: of a set in memory, those without it are left out of the part.
        """
        on_disk = isinstance(self.structures, OnDisk)
        count = min(most or len(self.structures), SAMPLE if on_disk else len(self.structures))
        if len(self.structures) <= count:
            return self
        other = self.view()
        if isinstance(self.structures, OnDisk):
            other.structures = part = self.structures.sample(count, self.seed)
            other.num_atoms = part.num_atoms
            other._prepared = _OnTheFly(part, self.cutoff, self.dtype)
        else:
            chosen = _spread(self.structures, count, label)
            other.structures = [self.structures[k] for k in chosen]
            other.num_atoms = self.num_atoms[chosen]
            other._prepared = [self._prepared[k] for k in chosen]
        other._turned = None
        if what:
            _logger.info(
                "%s: from %d of %d structures", what, len(other.structures), len(self.structures)
            )
        return other

    def parts(self, epoch: int, index: int, count: int) -> Iterator[LabelledBatch]:
        """The parts of a batch (or of this process's share of it) one after the other.

        Together they are what :meth:`epoch` gives. While one is out, :attr:`shares`
        tells which it is.

        Args:
            epoch: number of the epoch.
            index: number of the batch in it.
            count: of parts, with about as many edges and atoms; some may be empty.
        """
        if self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        members = self._planned[1][index]
        try:
            for number in range(count):
                self._part = (number, count)
                yield self.collate(members, epoch, (self._share, self._part))
        finally:
            self._part = (0, 1)

    @property
    def shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Which process of how many has its share of the batches here, and the part of that."""
        return self._share, self._part

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels that at least one structure has, sorted."""
        return tuple(sorted(label_names(self.structures)))

    def num_batches(self, epoch: int = 0) -> int:
        """Number of batches of an epoch; differs between epochs only when packing by atoms."""
        if self.max_atoms_per_batch is None:
            assert self.batch_size is not None
            return -(-len(self.structures) // self.batch_size)
        return count_packs(
            self._order(epoch), self.num_atoms, self.max_atoms_per_batch, self.min_atoms_per_batch
        )

    def __len__(self) -> int:
        """Number of batches of epoch 0."""
        return self.num_batches(0)

    def __iter__(self) -> Iterator[LabelledBatch]:
        """The batches of epoch 0: what a loader without shuffling yields in every epoch."""
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[LabelledBatch]:
        """The batches of an epoch from ``start_batch`` on, both from 0, made on demand."""
        first, step = self._dealt
        for members in self._plan(epoch)[start_batch + first :: step]:
            yield self.collate(members, epoch, (self._share,))

    def collate(
        self, members: np.ndarray, epoch: int, shares: Sequence[tuple[int, int]] = ()
    ) -> LabelledBatch:
        """A batch of chosen structures, rotated as in an epoch.

        Args:
            members: positions in :attr:`structures`; one may occur more than once.
            epoch: number of the epoch, at least 0.
            shares: which process of how many has its share of it, and which part of that it is.
        """
        positions, whole = np.arange(len(members)), True
        for number, count in shares:
            if count > 1:
                positions = positions[deal(self._work(members[positions]), count)[number]]
                whole = False
        own = members[positions]
        if len(own):
            batch = collate_labelled([self._prepared[member] for member in own.tolist()])
        else:
            batch = self._prepared[int(members[0])].first(0)
        if self.augment:
            batch = rotate_batch(batch, self._rotations(epoch)[own])
        return batch if whole else replace(batch, whole=self._whole(members, positions))

    def _whole(self, members: np.ndarray, positions: np.ndarray) -> Whole:
        """Numbers of the whole batch that its parts need."""
        if isinstance(self.structures, OnDisk):
            frames, sources = self.structures.places(members)
            known = {
                name: numbers for name in self.structures.label_names
                if (numbers := self.structures.num_known(name, members, self.augment)).any()
            }  # fmt: skip
            return Whole(positions, self.num_atoms[members], known, frames, sources)
        all_of_it = [self._prepared[member] for member in members.tolist()]
        names = dict.fromkeys(name for one in all_of_it for name in one.labels)
        counts = {
            name: [
                0 if name not in one.labels
                else num_known(one.labels[name], label_kind(name, one.kinds), self.augment)
                for one in all_of_it
            ]
            for name in names
        }  # fmt: skip
        return Whole(
            positions,
            self.num_atoms[members],
            {name: np.array(numbers) for name, numbers in counts.items()},
            tuple(frame for one in all_of_it for frame in one.frames),
            tuple(source for one in all_of_it for source in one.sources),
        )

    def _work(self, members: np.ndarray) -> np.ndarray:
        """Edges and atoms of structures: how long they take; on disk only atoms are known."""
        atoms = self.num_atoms[members]
        return atoms if isinstance(self._prepared, _OnTheFly) else atoms + self._edges[members]

    @cached_property
    def _edges(self) -> np.ndarray:
        """Edges of each structure."""
        assert isinstance(self._prepared, list)
        return np.array([one.graph.num_edges for one in self._prepared])

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
            return pack(order, self.num_atoms, self.max_atoms_per_batch, self.min_atoms_per_batch)
        assert self.batch_size is not None
        return np.split(order, range(self.batch_size, len(order), self.batch_size))

    def _order(self, epoch: int) -> np.ndarray:
        """All structures in the order of an epoch."""
        count = len(self.structures)
        if not self.shuffle:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, epoch, Stream.ORDER])
        return (
            in_blocks(count, rng) if isinstance(self.structures, OnDisk) else rng.permutation(count)
        )

    def _rotations(self, epoch: int) -> Tensor:
        """One rotation a structure, independent of its batch; ``[len(structures), 3, 3]``."""
        if self._turned is None or self._turned[0] != epoch:
            generator = torch_generator(self.seed, epoch, Stream.ROTATIONS)
            self._turned = epoch, random_rotations(len(self.structures), generator, self.dtype)
        return self._turned[1]


def _spread(structures: Sequence[Structure], count: int, label: str) -> np.ndarray:
    """Positions of so many structures, evenly spread; more where elements are rare."""
    having = [k for k, s in enumerate(structures) if not label or label in s.labels]
    chosen = [np.array(having or range(len(structures)))]
    at: dict[int, list[int]] = {}
    for position, structure in ((k, structures[k]) for k in chosen[0].tolist()):
        for number in set(structure.numbers.tolist()):
            at.setdefault(number, []).append(position)
    chosen += [np.array(places) for places in at.values()]
    counts = [count, *[min(OF_ELEMENT, count // 10)] * len(at)]
    picked = [
        places[evenly_apart(len(places), most)] for places, most in zip(chosen, counts, strict=True)
    ]
    return np.unique(np.concatenate(picked))


class _OnTheFly:
    """Batches of one structure each, read and prepared on demand."""

    def __init__(self, structures: OnDisk, cutoff: float, dtype: torch.dtype) -> None:
        self._structures, self._cutoff, self._dtype = structures, cutoff, dtype

    def __getitem__(self, member: int) -> LabelledBatch:
        return prepare(*self._structures.with_neighbors(member, self._cutoff), self._dtype)
