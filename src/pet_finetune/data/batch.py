"""The frozen ``Batch``: several structures as one disconnected graph, the model's only input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from ase import Atoms
from torch import Tensor

from pet_finetune.errors import DataError
from pet_finetune.keys import LabelKind, label_kind

from .neighbors import NeighborList, edge_vectors, structure_neighbors
from .structure import Structure, atoms_to_structure

__all__ = [
    "Batch",
    "PreparedStructure",
    "batch_from_atoms",
    "collate",
    "collate_prepared",
    "prepare",
]


@dataclass(frozen=True, eq=False)
class Batch:
    """``b`` structures with ``n`` atoms and ``e`` directed edges in all; lengths in Å.

    Edges may be longer than the model's cutoff (a skin); the model filters them. Atoms and edges
    of one structure are contiguous, in the order of the structures.
    """

    #: Atomic numbers, ``[n]`` int64.
    numbers: Tensor
    #: Vectors from centre to neighbour, ``[e, 3]``.
    edge_vectors: Tensor
    #: Central atom of each edge, ``[e]`` int64, ascending.
    centers: Tensor
    #: Neighbouring atom of each edge, ``[e]`` int64.
    neighbors: Tensor
    #: The opposite edge of each edge, ``[e]`` int64.
    reverse: Tensor
    #: Structure of each atom, ``[n]`` int64, ascending.
    structure_index: Tensor
    #: Cell vectors as rows, ``[b, 3, 3]``; zero rows where not periodic.
    cells: Tensor
    #: Total charges, ``[b]`` int64.
    charges: Tensor
    #: Spin multiplicities 2S+1, ``[b]`` int64.
    spins: Tensor
    #: ``"<t>"`` ``[b]`` (always float64: a total energy of -20,000 eV has steps of 2 meV in
    #: float32, so the baseline must be subtracted first), ``"<t>/forces"`` ``[n, 3]``,
    #: ``"<t>/stress"`` ``[b, 3, 3]``; of other targets ``[b, ...]`` or ``[n, ...]``, float64 where
    #: scalar. NaN where one structure lacks a label others have; a name that no structure of this
    #: batch has is absent.
    labels: Mapping[str, Tensor]
    #: ``Structure.index`` of each structure, ``[b]`` int64.
    frames: Tensor
    #: ``Structure.source`` of each structure.
    sources: tuple[str, ...] = ()
    #: What the labels of targets that are no energies belong to, by name.
    kinds: Mapping[str, LabelKind] = field(default_factory=dict)

    @property
    def num_atoms(self) -> int:
        """Number of atoms ``n``."""
        return int(self.numbers.shape[0])

    @property
    def num_structures(self) -> int:
        """Number of structures ``b``."""
        return int(self.cells.shape[0])

    @property
    def num_edges(self) -> int:
        """Number of directed edges ``e``."""
        return int(self.centers.shape[0])

    @property
    def atoms_per_structure(self) -> Tensor:
        """Number of atoms of each structure, ``[b]`` int64."""
        # Not `bincount`: on a GPU it makes the CPU wait for everything queued before it.
        counts = self.structure_index.new_zeros(self.num_structures)
        return counts.index_add_(0, self.structure_index, torch.ones_like(self.structure_index))

    @property
    def volumes(self) -> Tensor:
        """Cell volumes in Å³, ``[b]``; 0 where not periodic in all three directions."""
        determinants: Tensor = torch.linalg.det(self.cells)
        return determinants.abs()

    @property
    def where(self) -> str:
        """The structures of the batch as a user would look them up, for error messages."""
        frames = self.frames.tolist()
        by_source: dict[str, list[int]] = {}
        for source, frame in zip(self.sources or ("",) * len(frames), frames, strict=True):
            by_source.setdefault(source, []).append(frame)
        return "; ".join(
            f"frames {', '.join(map(str, indices))}" + (f" of {source}" if source else "")
            for source, indices in by_source.items()
        )

    def first(self, count: int) -> Batch:
        """The first structures alone."""
        atoms = int((self.structure_index < count).sum())
        edges = int((self.centers < atoms).sum())

        def rows(name: str, value: Tensor) -> Tensor:
            return value[: atoms if label_kind(name, self.kinds).per_atom else count]

        return replace(
            self,
            numbers=self.numbers[:atoms],
            edge_vectors=self.edge_vectors[:edges],
            centers=self.centers[:edges],
            neighbors=self.neighbors[:edges],
            reverse=self.reverse[:edges],
            structure_index=self.structure_index[:atoms],
            cells=self.cells[:count],
            charges=self.charges[:count],
            spins=self.spins[:count],
            labels={name: rows(name, value) for name, value in self.labels.items()},
            frames=self.frames[:count],
            sources=self.sources[:count],
        )

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Batch:
        """Move to a device and cast the floating-point tensors.

        Integers keep their type, and so do the float64 scalars in :attr:`labels`, except on
        devices without float64 (``mps``).
        """
        target = None if device is None else torch.device(device)
        total = torch.float32 if target is not None and target.type == "mps" else None

        def move(tensor: Tensor, cast: torch.dtype | None = None) -> Tensor:
            return tensor.to(device=target, dtype=cast, non_blocking=non_blocking)

        def move_label(name: str, value: Tensor) -> Tensor:
            return move(value, dtype if label_kind(name, self.kinds).rank else total)

        return replace(
            self,
            numbers=move(self.numbers),
            edge_vectors=move(self.edge_vectors, dtype),
            centers=move(self.centers),
            neighbors=move(self.neighbors),
            reverse=move(self.reverse),
            structure_index=move(self.structure_index),
            cells=move(self.cells, dtype),
            charges=move(self.charges),
            spins=move(self.spins),
            labels={name: move_label(name, value) for name, value in self.labels.items()},
            frames=move(self.frames),
        )

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without the CPU waiting."""
        return replace(
            self,
            numbers=self.numbers.pin_memory(),
            edge_vectors=self.edge_vectors.pin_memory(),
            centers=self.centers.pin_memory(),
            neighbors=self.neighbors.pin_memory(),
            reverse=self.reverse.pin_memory(),
            structure_index=self.structure_index.pin_memory(),
            cells=self.cells.pin_memory(),
            charges=self.charges.pin_memory(),
            spins=self.spins.pin_memory(),
            labels={name: value.pin_memory() for name, value in self.labels.items()},
            frames=self.frames.pin_memory(),
        )


@dataclass(frozen=True, eq=False)
class PreparedStructure:
    """A structure with its edges in the types of a batch, so that collating only concatenates."""

    #: Atomic numbers, ``[n]`` int64.
    numbers: Tensor
    #: Rows: centres, neighbours, reverse; ``[3, e]`` int32 (half the memory of a kept list).
    edges: Tensor
    #: ``[e, 3]`` in the dtype of the batches.
    edge_vectors: Tensor
    #: ``[3, 3]`` in the dtype of the batches.
    cell: Tensor
    #: Total charge.
    charge: int
    #: Spin multiplicity.
    spin: int
    #: Labels; totals ``[1]`` float64, forces ``[n, 3]`` and stress ``[1, 3, 3]`` in the dtype;
    #: others alike, scalars in float64, vectors and tensors in the dtype.
    labels: Mapping[str, Tensor]
    #: ``Structure.index``.
    frame: int
    #: ``Structure.source``.
    source: str
    #: ``Structure.kinds``.
    kinds: Mapping[str, LabelKind] = field(default_factory=dict)


def prepare(structure: Structure, pairs: NeighborList, dtype: torch.dtype) -> PreparedStructure:
    """Compute what a batch needs of one structure; vectors are formed in float64, then cast."""
    vectors = edge_vectors(structure.positions, structure.cell, pairs)
    labels = {}
    for name, value in structure.labels.items():
        kind = label_kind(name, structure.kinds)
        value = value.to(dtype if kind.rank else torch.float64)
        labels[name] = value if kind.per_atom else value.unsqueeze(0)
    return PreparedStructure(
        numbers=structure.numbers,
        edges=torch.stack([pairs.centers, pairs.neighbors, pairs.reverse]).to(torch.int32),
        edge_vectors=vectors.to(dtype),
        cell=structure.cell.to(dtype),
        charge=structure.charge,
        spin=structure.spin,
        labels=labels,
        frame=structure.index,
        source=structure.source,
        kinds=structure.kinds,
    )


def collate(items: Sequence[tuple[Structure, NeighborList]], dtype: torch.dtype) -> Batch:
    """Join structures and their neighbour lists into one batch of the given float dtype."""
    return collate_prepared([prepare(structure, pairs, dtype) for structure, pairs in items])


def collate_prepared(items: Sequence[PreparedStructure]) -> Batch:
    """Join prepared structures: concatenation and index offsets, nothing else.

    :raises DataError: when ``items`` is empty.
    """
    if not items:
        raise DataError("A batch needs at least one structure.")
    num_atoms = torch.tensor([item.numbers.shape[0] for item in items])
    num_edges = torch.tensor([item.edges.shape[1] for item in items])
    # Rows of `edges` are offset by atoms, atoms and edges respectively.
    before = torch.stack([num_atoms, num_atoms, num_edges])
    offsets = (before.cumsum(1) - before).unsqueeze(-1).unbind(1)
    shifted = [item.edges + offset for item, offset in zip(items, offsets, strict=True)]
    centers, neighbors, reverse = torch.cat(shifted, dim=1).unbind(0)
    return Batch(
        numbers=torch.cat([item.numbers for item in items]),
        edge_vectors=torch.cat([item.edge_vectors for item in items]),
        centers=centers,
        neighbors=neighbors,
        reverse=reverse,
        structure_index=torch.arange(len(items)).repeat_interleave(num_atoms),
        cells=torch.stack([item.cell for item in items]),
        charges=torch.tensor([item.charge for item in items]),
        spins=torch.tensor([item.spin for item in items]),
        labels=_collate_labels(items),
        frames=torch.tensor([item.frame for item in items]),
        sources=tuple(item.source for item in items),
        kinds={name: kind for item in items for name, kind in item.kinds.items()},
    )


def batch_from_atoms(
    atoms: Atoms | Sequence[Atoms], cutoff: float, dtype: torch.dtype = torch.float64
) -> Batch:
    """Make an unlabelled batch of ASE structures.

    :param atoms: one structure or a sequence of them.
    :param cutoff: neighbour list cutoff in Å.
    :param dtype: float dtype of the batch.
    """
    frames = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    structures = [atoms_to_structure(frame, index) for index, frame in enumerate(frames)]
    return collate([(s, structure_neighbors(s, cutoff)) for s in structures], dtype)


def _collate_labels(items: Sequence[PreparedStructure]) -> dict[str, Tensor]:
    """Concatenate labels; structures without one that others have contribute NaN."""
    names = dict.fromkeys(name for item in items for name in item.labels)
    return {name: torch.cat([_label_or_nan(item, name, items) for item in items]) for name in names}


def _label_or_nan(item: PreparedStructure, name: str, items: Sequence[PreparedStructure]) -> Tensor:
    """The label of one structure, or NaN in the shape and dtype that it would have."""
    if name in item.labels:
        return item.labels[name]
    other = next(other for other in items if name in other.labels)
    known = other.labels[name]
    rows = item.numbers.shape[0] if label_kind(name, other.kinds).per_atom else 1
    return known.new_full((rows, *known.shape[1:]), float("nan"))
