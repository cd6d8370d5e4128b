"""A labelled set of structures and predictions of models, as one small ``.npz`` file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pet_finetune.errors import DataError, damage_explained
from pet_finetune.keys import label_kind, weights_key

from .structure import Structure, place

_VERSION = 1
# Of the structures themselves; all other arrays are named "<model>:<label>".
_PLAIN = ("sizes", "numbers", "positions", "cells", "pbc", "frames", "source_index", "sources")
_LABELS, _BASELINES = "label", "baseline"


@dataclass(frozen=True, eq=False)
class Predicted:
    """``b`` structures with ``n`` atoms in all, their labels, and predictions of several models."""

    #: Which set it is: ``test``, ``validation`` or ``train``.
    set_name: str
    #: Atoms of each structure, ``[b]``.
    sizes: np.ndarray
    #: Atomic numbers, ``[n]``.
    numbers: np.ndarray
    #: Å, ``[n, 3]``.
    positions: np.ndarray
    #: Cell vectors as rows, Å, ``[b, 3, 3]``; zero rows where not periodic.
    cells: np.ndarray
    #: ``[b, 3]`` bool.
    pbc: np.ndarray
    #: ``Structure.index`` of each structure, ``[b]``.
    frames: np.ndarray
    #: Which of :attr:`sources` each structure is from, ``[b]``.
    source_index: np.ndarray
    #: The files.
    sources: tuple[str, ...]
    #: Labels by name, as in ``Structure.labels``: ``[b, ...]`` or ``[n, ...]``; NaN where missing.
    labels: Mapping[str, np.ndarray]
    #: Sum of the species' baselines for each energy, eV, ``[b]``.
    baselines: Mapping[str, np.ndarray] = field(default_factory=dict)
    #: For each model (``before``, ``after``) its predictions, named and shaped as the labels. A
    #: committee also has ``<label>~spread``, the standard deviation over its members.
    models: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, structures: Sequence[Structure], set_name: str) -> Predicted:
        """The structures and their labels, without predictions."""
        sources = tuple(dict.fromkeys(structure.source for structure in structures))
        return cls(
            set_name=set_name,
            sizes=np.array([s.num_atoms for s in structures], dtype=np.int32),
            numbers=np.concatenate([s.numbers.numpy() for s in structures]).astype(np.int16),
            positions=np.concatenate([s.positions.numpy() for s in structures]).astype(np.float32),
            cells=np.stack([s.cell.numpy() for s in structures]).astype(np.float32),
            pbc=np.stack([s.pbc.numpy() for s in structures]),
            frames=np.array([s.index for s in structures], dtype=np.int64),
            source_index=np.array([sources.index(s.source) for s in structures], dtype=np.int32),
            sources=sources,
            labels=_labels(structures),
        )

    @property
    def starts(self) -> np.ndarray:
        """First atom of each structure, and the number of all atoms, ``[b + 1]``."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def structure_index(self) -> np.ndarray:
        """Structure of each atom, ``[n]``."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def where(self, structure: int) -> str:
        """A structure's place as messages name it."""
        source = self.sources[int(self.source_index[structure])]
        return place(int(self.frames[structure]), source)

    def same_structures(self, other: Predicted) -> bool:
        """Whether both are of the same set, so that their predictions can be compared."""
        return (
            self.set_name == other.set_name
            and np.array_equal(self.sizes, other.sizes)
            and np.array_equal(self.numbers, other.numbers)
            and np.array_equal(self.positions, other.positions)
        )

    def to_bytes(self) -> bytes:
        """Compressed ``.npz`` that opens without pickle."""
        arrays = {name: np.asarray(getattr(self, name)) for name in _PLAIN}
        arrays |= {"version": np.array(_VERSION), "set_name": np.array(self.set_name)}
        groups = {_LABELS: self.labels, _BASELINES: self.baselines, **self.models}
        for group, values in groups.items():
            arrays |= {f"{group}:{name}": array for name, array in values.items()}
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    @classmethod
    def read(cls, path: Path) -> Predicted:
        """Read what :meth:`to_bytes` made.

        Raises:
            DataError: the file is damaged, or of another release.
        """
        with damage_explained(
            lambda why: DataError(f"'{path}' holds no predictions of a run, or is damaged ({why}).")
        ):
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if int(arrays.pop("version")) != _VERSION:
                raise DataError(f"'{path}' was written by another release of pet-finetune.")
            plain = {name: arrays.pop(name) for name in _PLAIN}
            set_name = str(arrays.pop("set_name"))
            # A damaged character is found where it becomes one of Python's.
            plain["sources"] = tuple(str(source) for source in plain["sources"])
        groups: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            group, _, label = name.partition(":")
            groups.setdefault(group, {})[label] = array
        return cls(
            set_name=set_name,
            labels=groups.pop(_LABELS, {}),
            baselines=groups.pop(_BASELINES, {}),
            models=groups,
            **plain,
        )


def _labels(structures: Sequence[Structure]) -> dict[str, np.ndarray]:
    """Labels one after the other, NaN where a structure lacks one that others have."""
    labels = {}
    names = dict.fromkeys(name for s in structures for name in s.labels)
    for name in (name for name in names if not name.endswith(weights_key(""))):
        known = next(s for s in structures if name in s.labels)
        kind = label_kind(name, known.kinds)
        shape = known.labels[name].shape[1:] if kind.per_atom else known.labels[name].shape
        parts = []
        for s in structures:
            rows = s.num_atoms if kind.per_atom else 1
            missing = np.full((rows, *shape), np.nan)
            label = s.labels.get(name)
            parts.append(missing if label is None else label.numpy().reshape(rows, *shape))
        # Totals need all digits (-20,000 eV in steps of 2 meV); their derivatives do not.
        labels[name] = np.concatenate(parts).astype(np.float32 if kind.rank else np.float64)
    return labels
