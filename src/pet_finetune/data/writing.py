"""Structures with predicted values, written as files of several formats."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from pet_finetune.config.dataset import SystemsOptions
from pet_finetune.errors import DataError
from pet_finetune.files import check_new, replacing
from pet_finetune.keys import LabelKind, forces_key, label_kind, stress_key, uncertainty_key
from pet_finetune.log import get_logger

from .frame_files import read_frames
from .structure import Structure

if TYPE_CHECKING:
    from ase.db.core import Database

_logger = get_logger(__name__)
_XYZ = (".xyz", ".extxyz")
_DB = ".db"
#: Endings of the files that predictions can be written to.
PREDICTION_ENDINGS = (*_XYZ, _DB)
#: What ASE keeps as results of a calculator, in its forms.
_RESULTS: dict[str, Callable[[np.ndarray], Any]] = {
    "energy": float,
    "forces": np.asarray,
    "stress": full_3x3_to_voigt_6_stress,
}


class PredictionWriter:
    """A file of structures with predictions, in eV and Å, in the order of writing.

    It appears whole when the ``with`` block ends. If that ends with an error, what came until then
    is in a file beside it, ``<name>.partial<ending>``.

    * ``.xyz``, ``.extxyz`` and ``.db`` (ASE's database): the frames as they were read, with what
      stands in them, and the predictions of the ``main`` energy as ASE's results ``energy``,
      ``forces`` and ``stress``, and ``energy_uncertainty`` where the model has one. Other targets
      stand under their names (without ``mtt::``), their derivatives as ``<name>_forces`` and
      ``<name>_stress``.
    * a folder (a path that ends in ``/``): metatrain's memory-mapped arrays, ``<target>.bin``,
      ``<target>_forces.bin`` and ``<target>_stress.bin`` in float32.
    """

    def __init__(
        self,
        path: str | Path,
        main: str | None,
        *,
        kinds: Mapping[str, LabelKind] | None = None,
        systems: Mapping[str, SystemsOptions] | None = None,
    ) -> None:
        """Make ready to write.

        Args:
            path: where to.
            main: the energy whose values are ASE's results.
            kinds: what the values of targets that are no energies belong to.
            systems: by file that was read, how.

        Raises:
            DataError: the ending is not known, something is there already, or the folder it would
                be in does not exist.
        """
        self.path = check_prediction_path(path)
        self.main, self.kinds, self.systems = main, dict(kinds or {}), dict(systems or {})
        self._partial: Path
        self._streams = ExitStack()
        self._frames: dict[str, Sequence[Atoms]] = {}
        self._write: Callable[[Structure, Mapping[str, np.ndarray]], None]
        self._sizes: list[int] = []
        self._count, self._failed = 0, False
        self._arrays: dict[str, IO[bytes]] = {}

    def __enter__(self) -> PredictionWriter:
        """Open the file that becomes the final one."""
        with self._explained(), ExitStack() as opening:
            self._partial = opening.enter_context(replacing(self.path))
            if self._is_folder:
                self._partial.mkdir()
                self._write = self._to_arrays
            elif self.path.suffix == _DB:
                from ase.db import connect  # takes a while to import

                database = connect(str(self._partial), type="db")
                self._write = lambda s, values: self._to_database(database, s, values)
            else:
                stream = self._streams.enter_context(self._partial.open("w", encoding="utf-8"))
                self._write = lambda s, values: ase.io.write(
                    stream, self._atoms(s, values), format="extxyz"
                )
            self._open = opening.pop_all()
        return self

    def add(
        self, structures: Sequence[Structure], values: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        """Write more structures."""
        with self._explained():
            for structure, own in zip(structures, values, strict=True):
                self._write(structure, own)
                self._count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Close the file and give it its name, or that of a part of it."""
        with self._explained():
            try:
                self._streams.close()
                if self._is_folder:
                    np.save(self._partial / "ns.npy", len(self._sizes))
                    np.save(self._partial / "na.npy", np.cumsum([0, *self._sizes], dtype=np.int64))
                if kind is not None and self._count and not self._failed:
                    self._keep_part()
            except OSError:
                self._open.__exit__(*sys.exc_info())
                raise
            self._open.__exit__(kind, error, where)

    def _keep_part(self) -> None:
        """Keep what came before an error that has nothing to do with writing."""
        part = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        if part.is_dir():
            shutil.rmtree(part)
        shutil.move(self._partial, part)
        _logger.warning("the first %d structures, predicted before: %s", self._count, part)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a failed write which file it was for."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            self._failed = True
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(
                f"Cannot write '{self.path}': {reason}. Nothing is left of it. Check that its "
                "folder is writable and has space left."
            ) from error

    @property
    def _is_folder(self) -> bool:
        return not self.path.suffix

    def _atoms(self, structure: Structure, values: Mapping[str, np.ndarray]) -> Atoms:
        """The frame as it was read, in Å, with predictions in the place of ASE's results."""
        if structure.source not in self._frames:
            how = self.systems.get(structure.source)
            other = () if how is None else (how.format, how.types)
            self._frames = {structure.source: read_frames(structure.source, *other)}
        atoms = self._frames[structure.source][structure.index].copy()
        # Lengths in another unit than Å; directions without a period keep their cell vectors.
        lengths = np.linalg.norm(np.vstack([structure.positions, structure.cell]))
        as_read = np.linalg.norm(np.vstack([atoms.positions, atoms.cell[atoms.pbc]]))
        if as_read > 0 and abs(lengths / as_read - 1) > 1e-12:
            atoms.set_cell(atoms.cell.array * (lengths / as_read))
            atoms.positions = structure.positions.numpy()
        for name in _RESULTS:  # labels that were no results of a calculator
            atoms.info.pop(name, None)
            atoms.arrays.pop(name, None)
        results: dict[str, Any] = {}
        for label, array in values.items():
            name = self._name(label)
            if np.isnan(array).all():
                continue  # a stress where no volume is defined
            if name in _RESULTS:
                results[name] = _RESULTS[name](array)
            elif label_kind(label, self.kinds).per_atom:
                atoms.arrays[name] = array.reshape(structure.num_atoms, -1)
            else:
                atoms.info[name] = float(array) if array.ndim == 0 else array
        atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    def _name(self, label: str) -> str:
        """Name of a label in the file."""
        for kind, key in (("energy", ""), ("forces", forces_key("")), ("stress", stress_key(""))):
            target = label.removesuffix(key)
            if self.main is not None and label == f"{self.main}{key}":
                return kind
            if key and target != label:
                return f"{_short(target)}_{kind}"
        if self.main is not None and label == uncertainty_key(self.main):
            return uncertainty_key("energy")
        return _short(label)

    def _to_database(
        self, database: Database, structure: Structure, values: Mapping[str, np.ndarray]
    ) -> None:
        """Write a row; values without a column go into its ``data``."""
        atoms = self._atoms(structure, values)
        data = {**atoms.info, **{k: v for k, v in atoms.arrays.items() if k not in _STRUCTURE}}
        database.write(atoms, data={name: _plain(value) for name, value in data.items()})

    def _to_arrays(self, structure: Structure, values: Mapping[str, np.ndarray]) -> None:
        """Append to metatrain's arrays."""
        self._sizes.append(structure.num_atoms)
        arrays: dict[str, np.ndarray] = {
            "a": structure.numbers.numpy().astype(np.int32),
            "x": structure.positions.numpy().astype(np.float32),
            "c": structure.cell.numpy().astype(np.float32),
        }
        for label, array in values.items():
            name = label
            for kind, key in (("forces", forces_key("")), ("stress", stress_key(""))):
                if label.endswith(key):
                    name = f"{label.removesuffix(key)}_{kind}"
            if "/" in name:
                raise DataError(
                    f"'{self.path}/': a target named '{name}' cannot be a file in a folder of "
                    "arrays. Write a file that ends in .xyz or .db instead."
                )
            arrays[name] = array.astype(np.float32)
        for name, array in arrays.items():
            if name not in self._arrays:
                stream = (self._partial / f"{name}.bin").open("wb")
                self._arrays[name] = self._streams.enter_context(stream)
            array.tofile(self._arrays[name])


_STRUCTURE = frozenset({"numbers", "positions"})


def check_prediction_path(path: str | Path) -> Path:
    """Refuse a place that predictions cannot be written to.

    Raises:
        DataError: says which can.
    """
    text, file = str(path), Path(path)
    folder = text.endswith(("/", os.sep))
    if file.suffix and (folder or file.suffix not in PREDICTION_ENDINGS):
        endings = ", ".join(PREDICTION_ENDINGS)
        raise DataError(
            f"'{text}': predictions are written to files that end in {endings}, or as metatrain's "
            "arrays to a folder without an ending, given with a slash behind: predictions/."
        )
    if not file.suffix and not folder:
        raise DataError(
            f"'{text}' has no ending that says what to write: {text}.xyz, {text}.db, or {text}/ "
            "for a folder of metatrain's memory-mapped arrays."
        )
    check_new(file)
    return file


def numbered(path: str | Path, mark: str) -> str:
    """The path with ``_<mark>`` before its ending, for one of several sets."""
    text = str(path)
    if text.endswith(("/", os.sep)):
        return f"{text.rstrip('/' + os.sep)}_{mark}/"
    file = Path(text)
    return str(file.with_name(f"{file.stem}_{mark}{file.suffix}"))


def _short(target: str) -> str:
    """A target's name without the mark of metatrain's that a column of a file cannot have."""
    return target.removeprefix("mtt::").replace("::", "_")


def _plain(value: Any) -> Any:
    """Form of a value that a database can hold."""
    return value if isinstance(value, (int, float, str, bool, np.ndarray)) else str(value)
