"""Structures from memory written to a file that gives them back bit for bit.

Extended XYZ rounds to eight digits. An ASE database (SQLite) holds binary numbers; what such a row
has no place for (``info``, ``arrays`` and results of any name) stands in its data.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators.calculator import compare_atoms
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.errors import DataError
from pet_finetune.files import replacing
from pet_finetune.log import get_logger

__all__ = ["restore_exact", "write_exact"]

_logger = get_logger(__name__)
#: Key of a row's data under which everything but the bare structure stands.
_KEY = "pet_finetune_frame"
# Results stay valid when these are set afterwards, as labels of the same structure often are.
_NO_GEOMETRY = {"initial_charges", "initial_magmoms"}


def write_exact(path: str | Path, frames: Sequence[Atoms]) -> None:
    """Write structures with everything that may be a label.

    Args:
        path: ends in ``.db``; a file that exists is replaced.
        frames: in order. Results of their calculators are written, nothing is computed.

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
        contents.append({name: _plain(values, left_out) for name, values in places.items()})
    if not contents:
        raise DataError("The list of structures is empty.")
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
            "left; what was finished before stands."
        ) from error


def restore_exact(atoms: Atoms) -> bool:
    """Give a structure of such a file its info, arrays and results; False where it is another's."""
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
    """What the calculator of a structure has computed for it."""
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


def _plain(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The entries that a file can hold; names of the others go into ``left_out``."""
    kept = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            kept[str(name)] = _value(value)
        except TypeError:
            left_out.add(str(name))
    return kept


def _value(value: Any) -> Any:
    """A value as the database takes it: plain ones, arrays of numbers, and lists of these."""
    if isinstance(value, np.generic):
        return _value(value.item())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "bifuc" else _value(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _value(item) for name, item in value.items()}
    raise TypeError
