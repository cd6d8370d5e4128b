"""The structures of a memory-mapped folder as options read them, one by one or looked at together.

What a run has to know of all of them (sizes, elements, which labels there are) is found in one pass
over the arrays, without making the structures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from pet_finetune.config.dataset import ExtraDataOptions
from pet_finetune.config.target import TargetOptions
from pet_finetune.errors import DataError
from pet_finetune.keys import LabelKind, forces_key, label_kind, stress_key, weights_key
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .dataset_files import DatasetFiles, energy_column, gradient_of, property_column
from .label_columns import Column, without_fixed
from .metatrain_sets import Folder
from .neighbors import NeighborList
from .structure import (
    DEFAULT_CHARGE_KEYS,
    DEFAULT_SPIN_KEYS,
    Structure,
    as_integer,
    check_geometry,
    evenly_apart,
    place,
)

_logger = get_logger(__name__)
#: Atoms that a pass over the arrays looks at together, and structures after whose reading their
#: pages are let go.
_ATOMS_TOGETHER, _RELEASE = 1_000_000, 50_000
#: Structures that are read as those of a file are, to judge labels and units.
_JUDGED = 500
#: What is known of a label of a structure.
ABSENT, PARTLY, WHOLE, _INFINITE = range(4)


@dataclass(frozen=True)
class StoredLabel:
    """Place of the values of a label and their conversion to eV and Angstrom.

    Attributes:
        label: its name in ``Structure.labels``.
        column: its values in the folder.
        factor: multiplies them.
        per_volume: whether it counts only where the structure has a volume.
        virial: whether it is divided by that volume, with the other sign.
        partial: whether single numbers may be unknown (NaN).
        weights: names of numbers whose product is its weight in the loss.
    """

    label: str
    column: Column
    factor: float
    per_volume: bool = False
    virial: bool = False
    partial: bool = False
    weights: tuple[str, ...] = ()


class Stored:
    """The structures of a folder, as options read them.

    Attributes:
        num_atoms: of each structure, ``[n]``.
        species: atomic numbers that occur, ascending.
        atoms_of: atoms of each species, ``[n, species]``.
        states: for each label what is known of it in each structure, ``[n]``.
        conditions: charge and spin, ``[n, 2]``.

    Args:
        folder: their arrays.
        labels: of several for one label the first counts that a structure has.
        kinds: what the labels of targets that are no energies belong to.
        length: Angstrom per unit of length.
        charge, spin: names of the charge and of the multiplicity in the folder, if it has them.
    """

    def __init__(
        self,
        folder: Folder,
        labels: Sequence[StoredLabel],
        kinds: Mapping[str, LabelKind],
        length: float = 1.0,
        charge: str | None = None,
        spin: str | None = None,
    ) -> None:
        self.folder, self.kinds, self._length = folder, dict(kinds), length
        self._labels = [(label, folder.labels[label.column.key]) for label in labels]
        self.num_atoms = folder.num_atoms
        self.conditions = np.zeros((len(folder), 2)) + (0, 1)
        for column, key in enumerate((charge, spin)):
            if key is not None:
                values = folder.labels[key].array.reshape(len(folder), -1)
                self.conditions[:, column] = values[:, 0]
        self.species, self.atoms_of = self._count_atoms()
        self.states: dict[str, np.ndarray] = {}
        self._sound = np.ones(len(folder), dtype=bool)
        self._look()
        self._reads = 0

    def structure(self, row: int) -> Structure:
        """Read the structure with a number."""
        folder, rows = self.folder, self.folder.rows(row)
        self._reads += 1
        if self._reads % _RELEASE == 0:
            folder.release()
        cell = np.zeros((3, 3))
        if folder.cells is not None:
            cell = folder.cells[row].astype(np.float64) * self._length
        pbc = cell.any(axis=1)
        volume = abs(float(np.linalg.det(cell))) if pbc.all() else 0.0
        labels: dict[str, torch.Tensor] = {}
        for stored, values in self._labels:
            if stored.label in labels or (stored.per_volume and not volume):
                continue
            raw = np.array(values.array[rows if values.of_atoms else row], np.float64)
            if np.isnan(raw).all():
                continue
            value = stored.column.shape(raw, rows.stop - rows.start) * stored.factor
            value = -value / volume if stored.virial else value
            known = torch.as_tensor(value, dtype=torch.float64)
            of_forces = stored.label.endswith(forces_key(""))
            labels[stored.label] = without_fixed(known) if of_forces else known
            if stored.weights:
                labels[weights_key(stored.label)] = self._weights(row, stored)
        (charge, spin), odd = self._condition(row)
        return Structure(
            index=row,
            source=folder.source,
            numbers=torch.from_numpy(folder.numbers[rows].astype(np.int64)),
            positions=torch.from_numpy(folder.positions[rows].astype(np.float64) * self._length),
            cell=torch.from_numpy(cell),
            pbc=torch.from_numpy(pbc),
            charge=charge,
            spin=spin,
            labels=labels,
            kinds=self.kinds,
            odd=odd,
        )

    def neighbors(self, row: int, cutoff: float) -> NeighborList | None:
        """The neighbour list of a structure, if the folder has one for this cutoff (Å)."""
        kept = self.folder.cutoff
        if kept is None:
            return None
        if not math.isclose(kept * self._length, cutoff, rel_tol=1e-6):
            _tell_of_cutoff(self.folder.source, kept, cutoff)
            return None
        return stored_neighbors(self.folder, row)

    def _weights(self, row: int, stored: StoredLabel) -> torch.Tensor:
        """The weights of a label's rows: a number for each atom, or one."""
        rows, per_atom = self.folder.rows(row), label_kind(stored.label, self.kinds).per_atom
        weights = np.ones(rows.stop - rows.start if per_atom else ())
        for key in stored.weights:
            values = self.folder.labels[key]
            own = np.array(values.array[rows if values.of_atoms else row], np.float64)
            where = f"{place(row, self.folder.source)}: the weights of {stored.label!r} ({key!r})"
            if (own < 0).any():
                raise DataError(f"{where} must not be negative, found {own.min():g}.")
            weights = weights * np.where(np.isnan(own), 1.0, own)
        return torch.as_tensor(weights, dtype=torch.float64)

    def places(self, rows: np.ndarray) -> tuple[list[int], list[str]]:
        """Numbers and file of some structures."""
        return rows.tolist(), [self.folder.source] * len(rows)

    def identity(self) -> str:
        """Text that changes when the content does: the sizes of the arrays."""
        arrays = {"ends": self.folder.ends, **{k: v.array for k, v in self.folder.labels.items()}}
        return str([(name, array.shape) for name, array in arrays.items()])

    def check(self, rows: np.ndarray, energies: Iterable[str]) -> None:
        """Refuse structures that cannot be trained on; of ``energies`` each has to have some label.

        Raises:
            DataError: names the first of them.
        """
        for row in rows[~self._sound[rows]].tolist():
            made = self.structure(row)
            check_geometry(
                made.numbers.numpy(), made.positions.numpy(), made.cell.numpy(), made.pbc.numpy(),
                made.where,
            )  # fmt: skip
        for stored, _ in self._labels:
            states = self.states[stored.label][rows]
            wrong = states == _INFINITE
            if not stored.partial:
                wrong |= states == PARTLY
            if wrong.any():
                first = place(int(rows[int(wrong.argmax())]), self.folder.source)
                raise DataError(
                    f"The {stored.column.what} ({stored.column.key!r}) are NaN or infinite in "
                    f"{int(wrong.sum())} of {len(rows)} frames, first in {first}. Remove these "
                    "frames or compute them again."
                )
        for target in energies:
            names = (target, forces_key(target), stress_key(target))
            known = [self.states[name][rows] > ABSENT for name in names if name in self.states]
            bare = ~np.any(known, axis=0) if known else np.ones(len(rows), dtype=bool)
            if bare.any():
                first = place(int(rows[int(bare.argmax())]), self.folder.source)
                raise DataError(
                    f"Target {target!r}: {int(bare.sum())} of {len(rows)} frames have neither "
                    f"energy, forces nor stress, first {first}. Remove them, or name others with "
                    "`indices`."
                )

    def _condition(self, row: int) -> tuple[tuple[int, int], str]:
        """Charge and spin of a structure, and what is no whole number among them."""
        found, odd = [], []
        for default, raw in zip((0, 1), self.conditions[row].tolist(), strict=True):
            whole = as_integer(raw)
            found.append(default if whole is None else whole)
            odd += [] if whole is not None else [f"{'spin' if default else 'charge'} is {raw}"]
        return (found[0], found[1]), ", ".join(odd)

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        """Structures and their atoms, about a million atoms at a time."""
        ends, first = self.folder.ends, 0
        while first < len(ends) - 1:
            last = int(np.searchsorted(ends, ends[first] + _ATOMS_TOGETHER, "right")) - 1
            last = max(last, first + 1)
            yield slice(first, last), slice(int(ends[first]), int(ends[last]))
            first = last

    def _count_atoms(self) -> tuple[np.ndarray, np.ndarray]:
        """The species that occur, and the atoms of each in each structure."""
        found = [np.unique(self.folder.numbers[atoms]) for _, atoms in self._pieces()]
        species = np.unique(np.concatenate(found)).astype(np.int64)
        counts = np.zeros((len(self.num_atoms), len(species)), dtype=np.int32)
        for which, atoms in self._pieces():
            sizes = self.num_atoms[which]
            owners = np.repeat(np.arange(len(sizes)), sizes)
            columns = np.searchsorted(species, self.folder.numbers[atoms])
            flat = np.bincount(owners * len(species) + columns, minlength=counts[which].size)
            counts[which] = flat.reshape(-1, len(species))
        return species, counts

    def _look(self) -> None:
        """The one pass over all arrays: geometries, and what is known of each label."""
        folder, count = self.folder, len(self.folder)
        for stored, _ in self._labels:
            states = self.states.setdefault(stored.label, np.zeros(count, dtype=np.int8))
            if stored.weights:
                self.states[weights_key(stored.label)] = states
        with Watch(f"looking through {folder.source}", "structures", count) as watch:
            for which, atoms in self._pieces():
                starts = folder.ends[which] - folder.ends[which.start]
                bad = ~np.isfinite(folder.positions[atoms]).all(axis=1)
                bad |= folder.numbers[atoms] < 1
                sound = ~np.logical_or.reduceat(bad, starts)
                volume = np.zeros(len(sound), dtype=bool)
                if folder.cells is not None:
                    cells = folder.cells[which].astype(np.float64)
                    rows = cells.any(axis=2).sum(axis=1)
                    some = np.flatnonzero(rows)
                    finite = np.logical_and.reduce(np.isfinite(cells), axis=(1, 2))
                    ranks = np.linalg.matrix_rank(np.nan_to_num(cells[some]))
                    sound[some] &= finite[some] & np.equal(ranks, rows[some])
                    volume = rows == 3
                self._sound[which] = sound
                for stored, values in self._labels:
                    found = _state(values.array[atoms if values.of_atoms else which],
                                   starts if values.of_atoms else None)  # fmt: skip
                    if stored.per_volume:
                        found[~volume] = ABSENT
                    states = self.states[stored.label]
                    states[which] = np.where(states[which] == ABSENT, found, states[which])
                folder.release()
                watch.step(len(sound))


@cache
def _tell_of_cutoff(source: str, kept: float, cutoff: float) -> None:
    _logger.info("%s has neighbour lists for the cutoff %g, the model has %g A: they are computed",
                 source, kept, cutoff)  # fmt: skip


def stored_neighbors(folder: Folder, row: int) -> NeighborList:
    """The neighbour list that a folder has of a structure."""
    columns = torch.from_numpy(folder.pairs(row).astype(np.int64))
    return NeighborList(columns[:, 0], columns[:, 1], columns[:, 3:], columns[:, 2])


def _state(values: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
    """Completeness of a label in each structure, ``[n]``; of atoms with their ``starts``."""
    flat = values.reshape(len(values), -1)
    unknown = np.isnan(flat)
    some, every = unknown.any(axis=1), unknown.all(axis=1)
    infinite = np.isinf(flat).any(axis=1)
    if starts is not None:
        some, infinite = (np.logical_or.reduceat(part, starts) for part in (some, infinite))
        every = np.logical_and.reduceat(every, starts)
    return np.select([infinite, every, some], [_INFINITE, ABSENT, PARTLY], WHOLE).astype(np.int8)


def stored_set(
    reading: DatasetFiles, folder: Folder, judge: Callable[[DatasetFiles], object]
) -> Stored:
    """The structures of a folder, all that are chosen looked at.

    Some of them are read as those of a file are, which judges names, shapes and units; what can be
    wrong with a single one is looked for in all.
    """
    chosen, options = np.array(reading.chosen), reading.options
    some = copy.copy(reading)
    some.chosen = chosen[evenly_apart(len(chosen), _JUDGED)].tolist()
    judge(some)
    labels = [
        label for name, target in options.targets.items()
        for label in _stored_labels(reading, folder, name, target)
    ]  # fmt: skip
    specs = {name: target.spec(name) for name, target in options.targets.items()}
    kinds = {name: spec.label_kind for name, spec in specs.items() if not spec.is_energy}
    extra = options.extra_data
    stored = Stored(
        folder,
        labels,
        kinds,
        reading.length,
        _stored_condition(reading, folder, extra.get("charge"), "charge", DEFAULT_CHARGE_KEYS),
        _stored_condition(reading, folder, extra.get("spin_multiplicity"), "spin_multiplicity",
                          DEFAULT_SPIN_KEYS),
    )  # fmt: skip
    stored.check(chosen, [name for name, spec in specs.items() if spec.is_energy])
    return stored


def _stored_labels(
    reading: DatasetFiles, folder: Folder, name: str, target: TargetOptions
) -> Iterator[StoredLabel]:
    """Labels of a target in a folder."""
    own_weights: dict[str, str] = {}
    if target.is_energy:
        column, factor = energy_column(reading, name, target)
        found = [StoredLabel(name, column, factor, partial=True)]
        length = reading.length
        for kind, label, own in (
            ("forces", forces_key(name), factor / length),
            ("stress", stress_key(name), factor / length**3),
            ("virial", stress_key(name), factor),
        ):
            asked = gradient_of(reading, kind, name, target)
            if asked.options.wanted:
                own_weights.setdefault(label, asked.options.weight_key)
                volume, virial = kind != "forces", kind == "virial"
                found.append(StoredLabel(label, *asked.column(own), volume, virial))
    else:
        spec = target.spec(name)
        column = property_column(reading, spec, target)
        found = [StoredLabel(name, column, target.factor, spec.per_volume, partial=True)]
    for one in found:
        column = one.column
        if column.source != reading.source:
            raise DataError(
                f"The {column.what} come from {column.source}, but {reading.source} is a large set "
                "that stays on disk: its labels have to be in it. Join them before the set is "
                "written (`pet-finetune convert`)."
            )
        if column.key in folder.labels:
            weights = tuple(filter(None, (target.weight_key, own_weights.get(one.label))))
            yield replace(one, weights=weights)


def _stored_condition(
    reading: DatasetFiles,
    folder: Folder,
    options: ExtraDataOptions | None,
    name: str,
    usual: Sequence[str],
) -> str | None:
    """The name of charges or multiplicities in a folder, if it has any."""
    if options is None:
        return next((key for key in usual if key in folder.labels), None)
    if options.read_from not in ("", reading.source):
        raise DataError(
            f"extra_data.{name}: {options.read_from} is another file than {reading.source}, a "
            "large set that stays on disk: write the values into the set."
        )
    return options.key or name
