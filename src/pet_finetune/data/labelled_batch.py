"""A ``Batch`` of graphs with its labels and the origin of its structures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from pet_finetune.errors import DataError
from pet_finetune.graph import Batch, join_graphs
from pet_finetune.keys import LabelKind, label_kind

from .neighbors import NeighborList, edge_vectors, structure_neighbors
from .structure import Structure, atoms_to_structure


@dataclass(frozen=True, eq=False)
class Whole:
    """The batch that a process has some structures of; the others have the rest."""

    #: Which of its structures the process has, ``[b]``, ascending.
    positions: np.ndarray
    #: Atoms of each of its structures.
    atoms: np.ndarray
    #: How many known numbers each of its structures has of each label.
    known: Mapping[str, np.ndarray]
    #: ``Structure.index`` and ``Structure.source`` of each of its structures.
    frames: tuple[int, ...]
    sources: tuple[str, ...]

    def first(self, count: int) -> Whole:
        """The first structures alone."""
        return Whole(
            self.positions[self.positions < count],
            self.atoms[:count],
            {name: numbers[:count] for name, numbers in self.known.items()},
            self.frames[:count],
            self.sources[:count],
        )

    def rows(self, per_atom: bool) -> Tensor:
        """Indices of the process's structures (or atoms) among those of all."""
        if not per_atom:
            return torch.from_numpy(self.positions)
        ends = np.cumsum(self.atoms)
        runs = [np.arange(ends[p] - self.atoms[p], ends[p]) for p in self.positions]
        return torch.from_numpy(np.concatenate(runs) if runs else np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """A batch with its labels and the origin of its structures."""

    #: The ``b`` structures with ``n`` atoms in all: the network's input.
    graph: Batch
    #: ``"<t>"`` ``[b]`` (always float64: a total energy of -20,000 eV has steps of 2 meV in
    #: float32, so the baseline must be subtracted first), ``"<t>/forces"`` ``[n, 3]``,
    #: ``"<t>/stress"`` ``[b, 3, 3]``; of other targets ``[b, ...]`` or ``[n, ...]``, float64 where
    #: scalar. NaN where one structure lacks a label others have; a name that no structure of this
    #: batch has is absent.
    labels: Mapping[str, Tensor]
    #: ``Structure.index`` of each structure.
    frames: tuple[int, ...]
    #: ``Structure.source`` of each structure.
    sources: tuple[str, ...]
    #: What the labels of targets that are no energies belong to, by name.
    kinds: Mapping[str, LabelKind] = field(default_factory=dict)
    #: Where several processes share a batch and this is the part of one: the batch.
    whole: Whole | None = None

    @property
    def size(self) -> int:
        """Number of structures, those that other processes have included."""
        return self.graph.num_structures if self.whole is None else len(self.whole.atoms)

    @property
    def share(self) -> float:
        """The part of the structures that this process has."""
        return self.graph.num_structures / max(1, self.size)

    def num_known(self, name: str) -> Tensor | int:
        """Number of known values of a label in all processes."""
        if self.whole is not None:
            known = self.whole.known.get(name)
            return 0 if known is None else int(known.sum())
        return (~self.labels[name].isnan()).sum()

    @property
    def where(self) -> str:
        """The structures of the batch as a user would look them up, for error messages."""
        by_source: dict[str, list[int]] = {}
        origin = self if self.whole is None else self.whole
        for source, frame in zip(origin.sources, origin.frames, strict=True):
            by_source.setdefault(source, []).append(frame)
        return "; ".join(
            f"frames {', '.join(map(str, indices))}" + (f" of {source}" if source else "")
            for source, indices in by_source.items()
        )

    def first(self, count: int) -> LabelledBatch:
        """The first structures alone; of a part, those of the first structures of its whole."""
        whole = None if self.whole is None else self.whole.first(count)
        count = count if whole is None else len(whole.positions)
        graph = self.graph.first(count)

        def rows(name: str, value: Tensor) -> Tensor:
            per_atom = label_kind(name, self.kinds).per_atom
            return value[: graph.num_atoms if per_atom else count]

        return replace(
            self,
            graph=graph,
            labels={name: rows(name, value) for name, value in self.labels.items()},
            frames=self.frames[:count],
            sources=self.sources[:count],
            whole=whole,
        )

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> LabelledBatch:
        """Move to a device and cast the floating-point tensors.

        Integers keep their type, and so do the float64 scalars in :attr:`labels`, except on
        devices without float64 (``mps``).
        """
        target = None if device is None else torch.device(device)
        total = torch.float32 if target is not None and target.type == "mps" else None

        def move(name: str, value: Tensor) -> Tensor:
            cast = dtype if label_kind(name, self.kinds).rank else total
            return value.to(device=target, dtype=cast, non_blocking=non_blocking)

        return replace(
            self,
            graph=self.graph.to(target, dtype, non_blocking=non_blocking),
            labels={name: move(name, value) for name, value in self.labels.items()},
        )

    def pinned(self) -> LabelledBatch:
        """The batch in page-locked memory, from which a GPU copies without the CPU waiting."""
        labels = {name: value.pin_memory() for name, value in self.labels.items()}
        return replace(self, graph=self.graph.pinned(), labels=labels)


def prepare(structure: Structure, pairs: NeighborList, dtype: torch.dtype) -> LabelledBatch:
    """A batch of one structure, so that collating only concatenates.

    Its edges have int32 indices, half the memory of a kept list. Vectors are formed in float64,
    then cast.
    """
    vectors = edge_vectors(structure.positions, structure.cell, pairs)
    labels = {}
    for name, value in structure.labels.items():
        kind = label_kind(name, structure.kinds)
        value = value.to(dtype if kind.rank else torch.float64)
        labels[name] = value if kind.per_atom else value.unsqueeze(0)
    graph = Batch(
        numbers=structure.numbers,
        positions=structure.positions.to(dtype),
        edge_vectors=vectors.to(dtype),
        centers=pairs.centers.to(torch.int32),
        neighbors=pairs.neighbors.to(torch.int32),
        reverse=pairs.reverse.to(torch.int32),
        structure_index=torch.zeros(1, dtype=torch.int64).expand(structure.num_atoms),
        cells=structure.cell.to(dtype).unsqueeze(0),
        charges=torch.tensor([structure.charge]),
        spins=torch.tensor([structure.spin]),
    )
    return LabelledBatch(graph, labels, (structure.index,), (structure.source,), structure.kinds)


def num_known(label: Tensor, kind: LabelKind, rotated: bool) -> int:
    """Known numbers of a label: of rotated vectors and tensors, those that are known whole."""
    known = ~label.isnan()
    if rotated:
        for axis in range(1, 1 + kind.rank):
            known = known.all(axis, keepdim=True).expand_as(known)
    return int(known.sum())


def collate(items: Sequence[tuple[Structure, NeighborList]], dtype: torch.dtype) -> LabelledBatch:
    """Join structures and their neighbour lists into one batch of the given float dtype."""
    return collate_labelled([prepare(structure, pairs, dtype) for structure, pairs in items])


def collate_labelled(items: Sequence[LabelledBatch]) -> LabelledBatch:
    """Join batches, such as those of :func:`prepare`.

    Structures without a label that others have get NaN.

    Raises:
        DataError: when ``items`` is empty.
    """
    if not items:
        raise DataError("A batch needs at least one structure.")
    names = dict.fromkeys(name for item in items for name in item.labels)
    return LabelledBatch(
        graph=join_graphs([item.graph for item in items]),
        labels={
            name: torch.cat([_label_or_nan(item, name, items) for item in items]) for name in names
        },
        frames=tuple(frame for item in items for frame in item.frames),
        sources=tuple(source for item in items for source in item.sources),
        kinds={name: kind for item in items for name, kind in item.kinds.items()},
    )


def batch_from_atoms(
    atoms: Atoms | Sequence[Atoms], cutoff: float, dtype: torch.dtype = torch.float64
) -> Batch:
    """Make a batch of ASE structures.

    Args:
        atoms: one structure or a sequence of them.
        cutoff: neighbour list cutoff in Å.
        dtype: float dtype of the batch.
    """
    frames = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    structures = [atoms_to_structure(frame, index) for index, frame in enumerate(frames)]
    return collate([(s, structure_neighbors(s, cutoff)) for s in structures], dtype).graph


def _label_or_nan(item: LabelledBatch, name: str, items: Sequence[LabelledBatch]) -> Tensor:
    """A label, or NaN in the shape and dtype that it would have."""
    if name in item.labels:
        return item.labels[name]
    other = next(other for other in items if name in other.labels)
    known = other.labels[name]
    per_atom = label_kind(name, other.kinds).per_atom
    rows = item.graph.num_atoms if per_atom else item.graph.num_structures
    return known.new_full((rows, *known.shape[1:]), float("nan"))


T = TypeVar("T")


class _End:
    """Marker of the end."""


_END: Final = _End()


def on_device(
    batches: Iterable[LabelledBatch],
    device: torch.device,
    dtype: torch.dtype,
    ready: Callable[[Batch], Batch] | None = None,
) -> Iterator[LabelledBatch]:
    """The same batches in the same order, moved to a device and cast.

    On a GPU the CPU would otherwise cut and rotate a batch while the GPU waits for it: a thread
    does that for one batch ahead, and puts it where the GPU reads it without stopping the CPU.

    Args:
        batches: on the CPU; a generator of them must share no state with the user of the batches
            (a :class:`~.loader.Loader`'s draws from its own random streams).
        device: where the batches go.
        dtype: of their floating-point tensors.
        ready: adds what a GPU would have to wait for, such as the edges that a network sees; that
            thread does it, too.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, dtype)
        return
    for batch in one_ahead(_pinned(batches, device, dtype, ready)):
        # Copied on the stream that computes, so nothing reads the batch before it is there.
        yield batch.to(device, dtype, non_blocking=True)


def _pinned(
    batches: Iterable[LabelledBatch],
    device: torch.device,
    dtype: torch.dtype,
    ready: Callable[[Batch], Batch] | None,
) -> Iterator[LabelledBatch]:
    for batch in batches:
        if ready is not None:  # of the lengths that the network will see
            batch = batch.to(dtype=dtype)
            batch = replace(batch, graph=ready(batch.graph))
        with torch.cuda.device(device):  # a new thread would wake the first GPU instead
            pinned = batch.pinned()
        yield pinned


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in order; a thread makes the next one while one is used.

    An error in making an item is raised where that item would have come.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        coming = thread.submit(next, iterator, _END)
        while not isinstance(item := coming.result(), _End):
            coming = thread.submit(next, iterator, _END)
            yield item
