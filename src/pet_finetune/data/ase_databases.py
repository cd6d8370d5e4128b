"""Databases of ASE: SQLite (``.db``) and LMDB read row by row, and structures written bit for bit.

Extended XYZ rounds to eight digits. An ASE database holds binary numbers; what such a row has no
place for (``info``, ``arrays`` and results of any name) stands in its data.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties, compare_atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db.row import AtomsRow
from ase.io.jsonio import decode

from pet_finetune.errors import DataError, damage_explained
from pet_finetune.files import replacing
from pet_finetune.installation import missing_extra
from pet_finetune.log import get_logger

from .formats import check_sqlite

_logger = get_logger(__name__)
#: Key of a row's data under which everything but the bare structure stands.
_KEY = "pet_finetune_frame"
# Results stay valid when these are set afterwards, as labels of the same structure often are.
_NO_GEOMETRY = {"initial_charges", "initial_magmoms"}


def write_exact(path: str | Path, frames: Sequence[Atoms]) -> None:
    """Write structures with everything that may be a label to a ``.db``, which is replaced.

    Results of their calculators are written, nothing is computed.

    Raises:
        DataError: there are none, one is no ``Atoms``, its results are of another structure, or
            the file cannot be written; one that was there is then as it was.
    """
    contents = []
    left_out: set[str] = set()
    for number, atoms in enumerate(frames):
        if not isinstance(atoms, Atoms):
            raise DataError(
                f"structure {number}: expected ase.Atoms, got {type(atoms).__name__}. Give a list "
                "of Atoms, or the path of a file."
            )
        places = {
            "info": atoms.info,
            "arrays": {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")},
            "results": _results(atoms, number),
        }
        contents.append({name: _storables(values, left_out) for name, values in places.items()})
    if not contents:
        raise DataError("The list of structures is empty.")
    if again := len(frames) - len({id(atoms) for atoms in frames}):
        _logger.warning(
            "%d of %d structures are the same object as an earlier one in the list, with its last "
            "positions and results. In a loop, append a copy with results of its own.",
            again,
            len(frames),
        )
    if left_out:
        _logger.info("Not numbers or text, and left out: %s", ", ".join(sorted(left_out)))
    try:
        with replacing(path) as partial, ase.db.connect(str(partial), type="db") as rows:
            for atoms, content in zip(frames, contents, strict=True):
                bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
                rows.write(bare, data={_KEY: content})
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"Cannot write '{path}': {reason}. Check that its folder is writable and has space "
            "left; what was finished before is kept."
        ) from error


def restore_exact(atoms: Atoms) -> bool:
    """Restore info, arrays and results of a structure; False if the file is not ours."""
    data = atoms.info.get("data")
    content = data.get(_KEY) if isinstance(data, Mapping) else None
    if content is None:
        return False
    atoms.info.clear()
    atoms.info.update(content["info"])
    for name, values in content["arrays"].items():
        atoms.arrays[name] = values
    if content["results"]:
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results.update(content["results"])
    return True


def _results(atoms: Atoms, number: int) -> Mapping[str, Any]:
    """Results of a structure's calculator."""
    results: Mapping[str, Any] = getattr(atoms.calc, "results", None) or {}
    computed_for = getattr(atoms.calc, "atoms", None)
    if not results or computed_for is None:
        return results
    if changed := compare_atoms(computed_for, atoms, excluded_properties=_NO_GEOMETRY):
        raise DataError(
            f"structure {number}: its calculator's results are of another structure "
            f"({', '.join(changed)} differ). Give each structure a SinglePointCalculator with its "
            "own results, or set atoms.calc = None where the labels are in info and arrays."
        )
    return results


def _storables(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The entries that a file can hold; names of the others go into ``left_out``."""
    kept = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            kept[str(name)] = _storable(value)
        except TypeError:
            left_out.add(str(name))
    return kept


def _storable(value: Any) -> Any:
    """A value as the database takes it: plain ones, arrays of numbers, and lists of these."""
    if hasattr(value, "detach"):  # torch's
        value = value.detach().cpu()
    if isinstance(value, np.generic):
        return _storable(value.item())
    if hasattr(value, "__array__"):  # JAX's too
        value = np.asarray(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "bifuc" else _storable(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _storable(item) for name, item in value.items()}
    raise TypeError


_SQLITE = b"SQLite format 3\0"
_LMDB = (".aselmdb", ".lmdb")


def is_lmdb(path: Path) -> bool:
    """Whether a file is a database of ASE in the format LMDB, by its name."""
    return path.suffix.lower() in _LMDB and path.is_file()


def is_database(path: Path) -> bool:
    """Whether a file is a database whose rows can be read one after the other."""
    if is_lmdb(path):
        return True
    if path.suffix != ".db" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def row_numbers(path: Path) -> list[int]:
    """The numbers of the rows of a database, ascending.

    Raises:
        DataError: it cannot be read.
    """
    if is_lmdb(path):
        with _Lmdb(path) as database:
            return database.ids()
    with (
        damage_explained(lambda met: DataError(f"{path} cannot be read: {met}.")),
        closing(sqlite3.connect(path)) as rows,
    ):
        return [number for (number,) in rows.execute("SELECT id FROM systems ORDER BY id")]


def rows_of(
    path: Path, after: int = 0, kind: str = "db", last: int | None = None
) -> Iterator[tuple[int, Atoms]]:
    """The frames of a database with the numbers of their rows.

    Args:
        path: the file.
        after: the number of the last row that is left out.
        kind: ASE's name of the format, of a file that is no LMDB.
        last: the number of the last row that is read; None for all.

    Raises:
        DataError: it is damaged or cut off; names the row.
    """
    if is_lmdb(path):
        with _Lmdb(path) as database:
            for number in database.ids(after, last):
                yield number, frame_of(database.row(number), {})
        return
    if kind == "db":
        with path.open("rb") as file:
            check_sqlite(file.read(100), path.stat().st_size, str(path))
    with ase.db.connect(str(path), type=kind) as rows:
        units, limits = _units_of_schnet(rows.metadata), [f"id>{after}"] if after else []
        found = iter(rows.select(",".join([*limits, *([] if last is None else [f"id<={last}"])])))
        while True:
            with damage_explained(
                lambda met, after=after: DataError(  # type: ignore[misc]
                    f"{path} cannot be read after row {after}: {met}. Copy it again."
                )
            ):
                row = next(found, None)
                if row is None:
                    return
                frame = frame_of(row, units)
            after = int(row.id)
            yield after, frame


def frame_of(row: AtomsRow, units: Mapping[str, str]) -> Atoms:
    """A row of a database with its labels in ``info``, where ``units`` go too."""
    atoms = row.toatoms(add_additional_information=True)
    if not restore_exact(atoms):
        _flatten(atoms)
        atoms.info |= units
    return atoms


def _units_of_schnet(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Units in the metadata of a database of SchNetPack, as extended XYZ says them."""
    units = metadata.get("_property_unit_dict")
    stated = dict(units) if isinstance(units, Mapping) else {}
    stated["length"] = metadata.get("_distance_unit")
    return {f"{name}-unit": str(unit) for name, unit in stated.items() if unit}


def _flatten(atoms: Atoms) -> None:
    """Bring the columns and data of a row of an ASE database where labels are looked for."""
    for place in ("key_value_pairs", "data"):
        values = atoms.info.get(place)
        if isinstance(values, Mapping):
            del atoms.info[place]
            for key, value in values.items():
                atoms.info.setdefault(key, value)


class _Lmdb:
    """An LMDB of ASE's rows, as ``ase-db-backends`` writes it, open for reading.

    The keys are numbers of rows; ``nextid`` and ``deleted_ids`` say which there are. Each value is
    JSON, compressed with zlib.
    """

    def __init__(self, path: Path) -> None:
        missing = missing_extra("lmdb", "lmdb")
        if missing:
            raise DataError(f"{path} {missing}")
        self._path = path

    def __enter__(self) -> _Lmdb:
        import lmdb

        try:
            self._file = lmdb.open(str(self._path), subdir=False, readonly=True, lock=False)
        except lmdb.Error as error:
            raise DataError(f"{self._path} is no LMDB, or is cut off: {error}.") from error
        # Beyond its end a mapped file would end the process.
        wanted = (self._file.info()["last_pgno"] + 1) * self._file.stat()["psize"]
        if wanted > self._path.stat().st_size:
            self._file.close()
            there = self._path.stat().st_size
            raise DataError(
                f"{self._path} is cut off: it has {there} bytes of the {wanted} that it says. Copy "
                "it again."
            )
        self._read = self._file.begin()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._read.abort()
        self._file.close()

    def ids(self, after: int = 0, last: int | None = None) -> list[int]:
        """Numbers of the rows behind one, ascending, to the last."""
        following = self._value("nextid")
        if not isinstance(following, int):
            raise DataError(
                f"{self._path} is no database of ASE's (it has no 'nextid'). The older LMDB files "
                "of OCP hold pickles, which may run any code when they are read: convert them with "
                "fairchem, or write extended xyz."
            )
        deleted = set(self._value("deleted_ids") or ())
        end = following if last is None else last + 1
        return [number for number in range(after + 1, end) if number not in deleted]

    def row(self, number: int) -> AtomsRow:
        """The row with a number."""
        found = self._value(str(number))
        if not isinstance(found, dict):
            raise DataError(
                f"{self._path} is cut off or damaged: row {number} is missing. Copy it again."
            )
        for key in all_properties:
            if isinstance(found.get(key), list):
                found[key] = np.array(found[key])
        return AtomsRow({"unique_id": str(number), **found, "id": number})

    def _value(self, key: str) -> Any:
        raw = self._read.get(key.encode("ascii"))
        if raw is None:
            return None
        try:
            return decode(zlib.decompress(raw).decode("utf-8"))
        except (zlib.error, ValueError):
            return None
