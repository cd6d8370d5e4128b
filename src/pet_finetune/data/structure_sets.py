"""Sets of structures, in memory or read from disk one by one; the elements that they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TypeVar, overload

import numpy as np
import torch
from ase.data import chemical_symbols

from pet_finetune.errors import SpeciesError
from pet_finetune.keys import label_kind
from pet_finetune.log import get_logger

from .labelled_batch import num_known
from .neighbors import NeighborList, structure_neighbors
from .stored import ABSENT, PARTLY, WHOLE, Stored
from .structure import Structure, evenly_apart, structures_fingerprint

T = TypeVar("T")

_logger = get_logger(__name__)
#: Structures that stand for a set where a look at all of them takes too long, and those of an
#: element of which there are at least so many among them.
SAMPLE, OF_ELEMENT = 1_000, 50


class _Listed:
    """Structures in memory with the interface of :class:`~.stored.Stored`."""

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures = structures
        self.num_atoms = sizes_of_structures(structures)
        found = [np.unique(s.numbers.numpy(), return_counts=True) for s in structures]
        self.species = np.unique(np.concatenate([numbers for numbers, _ in found]))
        self.atoms_of = np.zeros((len(structures), len(self.species)), dtype=np.int32)
        for row, (numbers, counts) in enumerate(found):
            self.atoms_of[row, np.searchsorted(self.species, numbers)] = counts
        self.states: dict[str, np.ndarray] = {}
        for row, structure in enumerate(structures):
            for name, label in structure.labels.items():
                states = self.states.setdefault(name, np.zeros(len(structures), dtype=np.int8))
                states[row] = PARTLY if bool(label.isnan().any()) else WHOLE
        self.conditions = np.array([(s.charge, s.spin) for s in structures], dtype=np.float64)

    def structure(self, row: int) -> Structure:
        return self._structures[row]

    def places(self, rows: np.ndarray) -> tuple[list[int], list[str]]:
        chosen = [self._structures[row] for row in rows.tolist()]
        return [s.index for s in chosen], [s.source for s in chosen]

    def identity(self) -> str:
        return structures_fingerprint(self._structures)


#: Structures by number, and what is known of all of them.
Store = Stored | _Listed


class OnDisk(Sequence[Structure]):
    """Structures that are read on demand.

    Args:
        stores: where they are.
        which: the store of each, ``[n]``.
        rows: the number of each in its store, ``[n]``.
    """

    def __init__(self, stores: Sequence[Store], which: np.ndarray, rows: np.ndarray) -> None:
        self.stores, self.which, self.rows = tuple(stores), which, rows
        self._states: dict[str, np.ndarray] = {}
        self._rows_of: dict[str, tuple[bool, int]] = {}

    @classmethod
    def of(cls, store: Store, rows: np.ndarray) -> OnDisk:
        """Some structures of one store."""
        return cls([store], np.zeros(len(rows), dtype=np.int16), np.asarray(rows, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> OnDisk: ...
    def __getitem__(self, index: int | slice) -> Structure | OnDisk:
        """Read a structure, or choose some."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.stores[self.which[index]].structure(int(self.rows[index]))

    def with_neighbors(self, index: int, cutoff: float) -> tuple[Structure, NeighborList]:
        """A structure and its neighbour list, which is stored beside it or computed."""
        structure, store = self[index], self.stores[self.which[index]]
        row = int(self.rows[index])
        kept = store.neighbors(row, cutoff) if isinstance(store, Stored) else None
        return structure, structure_neighbors(structure, cutoff) if kept is None else kept

    def take(self, positions: np.ndarray) -> OnDisk:
        """Structures at some positions."""
        return OnDisk(self.stores, self.which[positions], self.rows[positions])

    def with_frames(self, frames: Sequence[int]) -> OnDisk:
        """Structures with some frame numbers, in that order, as far as they exist."""
        wanted = np.asarray(frames, dtype=np.int64)
        order = np.argsort(self.rows, kind="stable")
        places = np.searchsorted(self.rows, wanted, sorter=order)
        there = places < len(self)
        there[there] = self.rows[order[places[there]]] == wanted[there]
        return self.take(order[places[there]])

    @property
    def frames(self) -> tuple[int, ...]:
        """``Structure.index`` of each; of one store."""
        return tuple(self.rows.tolist())

    def places(self, positions: np.ndarray) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """``Structure.index`` and ``Structure.source`` of some, without reading them."""
        frames, sources = [0] * len(positions), [""] * len(positions)
        for store, at in self._by_store(positions):
            found = store.places(self.rows[positions[at]])
            for place_, frame, source in zip(at.tolist(), *found, strict=True):
                frames[place_], sources[place_] = frame, source
        return tuple(frames), tuple(sources)

    def _by_store(self, positions: np.ndarray) -> Iterator[tuple[Store, np.ndarray]]:
        """Each store, and where in ``positions`` its structures are."""
        for number, store in enumerate(self.stores):
            at = np.flatnonzero(self.which[positions] == number)
            if len(at):
                yield store, at

    @cached_property
    def _stores(self) -> list[tuple[Store, np.ndarray]]:
        """Each store, and the positions of its structures."""
        return list(self._by_store(np.arange(len(self))))

    def fingerprint(self) -> str:
        """Fingerprint as by :func:`~.structure.structures_fingerprint`, from a sample.

        What counts is which structures there are, the sizes of the files, and the content of
        1,000 structures.
        """
        digest = hashlib.sha256()
        for store, at in self._stores:
            digest.update(store.identity().encode())
            digest.update(np.ascontiguousarray(self.rows[at]).tobytes())
        some = self.take(evenly_apart(len(self), 1000))
        digest.update(structures_fingerprint(list(some)).encode())
        return digest.hexdigest()

    @cached_property
    def num_atoms(self) -> np.ndarray:
        """Atoms of each, ``[n]``."""
        found = np.zeros(len(self), dtype=np.int64)
        for store, at in self._stores:
            found[at] = store.num_atoms[self.rows[at]]
        return found

    @cached_property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        found: set[int] = set()
        for store, at in self._stores:
            occurs = (store.atoms_of[self.rows[at]] > 0).any(axis=0)
            found.update(store.species[occurs].tolist())
        return tuple(sorted(found))

    def with_species(self, species: Collection[int]) -> OnDisk:
        """Structures with any of some elements."""
        chosen = np.zeros(len(self), dtype=bool)
        for store, at in self._stores:
            columns = np.isin(store.species, sorted(species))
            chosen[at] = (store.atoms_of[self.rows[at]][:, columns] > 0).any(axis=1)
        return self.take(np.flatnonzero(chosen))

    def label_states(self, label: str) -> np.ndarray:
        """Completeness of a label in each: ``ABSENT``, ``PARTLY``, ``WHOLE``, ``[n]``."""
        if label not in self._states:
            self._states[label] = found = np.zeros(len(self), dtype=np.int8)
            for store, at in self._stores:
                if label in store.states:
                    found[at] = store.states[label][self.rows[at]]
        return self._states[label]

    def num_known(self, label: str, positions: np.ndarray, rotated: bool) -> np.ndarray:
        """Known numbers of a label in each of some structures, few of which are read for it."""
        states, numbers = self.label_states(label)[positions], np.zeros(len(positions), np.int64)
        for at in np.flatnonzero(states != ABSENT).tolist():
            if states[at] == WHOLE:
                of_atoms, width = self.row_of(label)
                numbers[at] = (self.num_atoms[positions[at]] if of_atoms else 1) * width
                continue
            one = self[int(positions[at])]
            kind, value = label_kind(label, one.kinds), one.labels[label]
            numbers[at] = num_known(value if kind.per_atom else value.unsqueeze(0), kind, rotated)
        return numbers

    def row_of(self, label: str) -> tuple[bool, int]:
        """Whether a label is per atom, and the length of its rows."""
        if label not in self._rows_of:
            one = self[int(np.flatnonzero(self.label_states(label))[0])]
            of_atoms = label_kind(label, one.kinds).per_atom
            rows = one.num_atoms if of_atoms else 1
            self._rows_of[label] = of_atoms, one.labels[label].numel() // rows
        return self._rows_of[label]

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """Labels that at least one structure has, sorted."""
        names = {name for store in self.stores for name in store.states}
        return tuple(sorted(name for name in names if self.label_states(name).any()))

    def one_of_each_condition(self) -> list[Structure]:
        """A structure of each charge and multiplicity that occur."""
        found: list[Structure] = []
        for store, at in self._stores:
            values = store.conditions[self.rows[at]]
            _, first = np.unique(values, axis=0, return_index=True)
            found += [self[int(position)] for position in at[first]]
        return found

    def sample(self, most: int, seed: int = 0) -> OnDisk:
        """At most about so many, drawn by a seed, in order; more where elements are rare."""
        if len(self) <= most:
            return self
        rng = np.random.default_rng([seed, len(self)])
        chosen = [rng.choice(len(self), most, replace=False)]
        for number in self.species:
            own = np.zeros(len(self), dtype=bool)
            for store, at in self._stores:
                column = np.flatnonzero(store.species == number)
                if len(column):
                    own[at] = store.atoms_of[self.rows[at], column[0]] > 0
            places = np.flatnonzero(own)
            chosen.append(rng.choice(places, min(len(places), OF_ELEMENT), replace=False))
        return self.take(np.unique(np.concatenate(chosen)))


def joined(sets: Sequence[Sequence[Structure]]) -> Sequence[Structure]:
    """Sets one behind the other; in memory if all are."""
    if not any(isinstance(structures, OnDisk) for structures in sets):
        return [structure for structures in sets for structure in structures]
    parts = [
        s if isinstance(s, OnDisk) else OnDisk.of(_Listed(s), np.arange(len(s)))
        for s in sets
        if len(s)
    ]
    if not parts:
        return []
    stores = list(dict.fromkeys(store for part in parts for store in part.stores))
    which = []
    for part in parts:
        numbers = np.array([stores.index(store) for store in part.stores], dtype=np.int16)
        which.append(numbers[part.which])
    return OnDisk(stores, np.concatenate(which), np.concatenate([part.rows for part in parts]))


def taken(structures: Sequence[Structure], positions: np.ndarray) -> Sequence[Structure]:
    """The structures at some positions."""
    if isinstance(structures, OnDisk):
        return structures.take(positions)
    return [structures[position] for position in positions.tolist()]


def sampled(structures: Sequence[Structure], what: str) -> Sequence[Structure]:
    """A set that is looked at more than once: of a large one on disk a part, in memory.

    ``what`` looks at it, for the one line that says so.
    """
    if not isinstance(structures, OnDisk):
        return structures
    part = structures.sample(SAMPLE)
    if len(part) < len(structures):
        _logger.info("%s: %d of %d structures stand for all", what, len(part), len(structures))
    return list(part)


def evenly_spread(items: Sequence[T], most: int = SAMPLE) -> Sequence[T]:
    """At most so many of what is read from disk item by item, evenly spread; lists as they are."""
    if len(items) <= most or isinstance(items, list | tuple):
        return items
    return [items[k] for k in np.linspace(0, len(items) - 1, most).astype(np.int64).tolist()]


def sizes_of_structures(structures: Sequence[Structure]) -> np.ndarray:
    """Number of atoms of each structure, [n] int64."""
    if isinstance(structures, OnDisk):
        return structures.num_atoms
    return np.array([s.num_atoms for s in structures], dtype=np.int64)


def label_names(structures: Sequence[Structure]) -> set[str]:
    """All labels that at least one structure has."""
    if isinstance(structures, OnDisk):
        return set(structures.label_names)
    return {name for structure in structures for name in structure.labels}


_FRAMES_SHOWN = 5


def find_species(structures: Sequence[Structure]) -> tuple[int, ...]:
    """Atomic numbers that occur, ascending."""
    if isinstance(structures, OnDisk):
        return structures.species
    return tuple(sorted({z for s in structures for z in np.unique(s.numbers.numpy()).tolist()}))


def of_species(structures: Sequence[Structure], species: Collection[int]) -> list[Structure]:
    """Structures with no other elements than these."""
    known = torch.tensor(sorted(species))
    return [s for s in structures if bool(torch.isin(s.numbers, known).all())]


def check_species(
    structures: Sequence[Structure], species: Collection[int], advice: str = ""
) -> None:
    """Check that a model knows all elements.

    Args:
        structures: what is to be predicted or trained on.
        species: atomic numbers the model knows.
        advice: what else can be done about it, for the end of the message.

    Raises:
        SpeciesError: names each unknown element, how many atoms and structures have it and the
            first frames.
    """
    known = set(species)
    if isinstance(structures, OnDisk):
        structures = structures.with_species(set(structures.species) - known)
    atoms: dict[int, int] = {}
    frames: dict[int, list[str]] = {}
    for structure in structures:
        elements, counts = np.unique(structure.numbers.numpy(), return_counts=True)
        for number, count in zip(elements.tolist(), counts.tolist(), strict=True):
            if number not in known:
                atoms[number] = atoms.get(number, 0) + count
                frames.setdefault(number, []).append(structure.where)
    if not atoms:
        return
    lines = []
    for number in sorted(atoms):
        shown = "; ".join(frames[number][:_FRAMES_SHOWN])
        more = len(frames[number]) - _FRAMES_SHOWN
        lines.append(
            f"  {chemical_symbols[number]} (Z={number}): {atoms[number]} atoms in "
            f"{len(frames[number])} structures: {shown}" + (f" and {more} more" if more > 0 else "")
        )
    symbols = " ".join(chemical_symbols[number] for number in sorted(known))
    raise SpeciesError(
        "The structures hold elements that the model does not know:\n"
        + "\n".join(lines)
        + f"\nThe model knows: {symbols}. Remove these structures or start from a model that "
        f"covers them.{advice and ' '}{advice}"
    )
