"""metatrain's own data sets: a folder of memory-mapped arrays, a zip with one entry a structure.

Both are read with numpy alone, as frames with labels under the names that they have there:
``U0.bin`` or ``0/U0.mts`` is the label ``U0``. All frames are in memory afterwards.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pet_finetune.errors import DataError, damage_explained
from pet_finetune.log import Watch, get_logger

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["identity_of_set", "is_metatrain_set", "read_metatrain_set"]

_logger = get_logger(__name__)
_INDEX = ("ns.npy", "na.npy")
_GEOMETRY = ("x", "a", "c", "momenta", "masses")
#: A float32 energy has 24 binary digits; eV an atom that its steps may have.
_DIGITS, _STEP = 2.0**-24, 1e-4


def is_metatrain_set(path: Path) -> bool:
    """Whether this is a data set of metatrain's own."""
    if path.is_dir():
        return any((path / name).exists() for name in _INDEX)
    return path.suffix == ".zip" and path.is_file()


def identity_of_set(path: Path) -> str:
    """Changes when the set does: names, sizes and dates of its files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def read_metatrain_set(path: Path) -> list[Atoms]:
    """The frames of a set, with labels in ``info`` (of structures) and ``arrays`` (of atoms).

    Args:
        path: the folder or the zip.

    Raises:
        DataError: something is missing, cut off, or of a shape that fits nothing.
    """
    frames = _folder(path) if path.is_dir() else _zip(path)
    with Watch(f"reading {path}", "frames") as watch:
        found = []
        for frame in frames:
            found.append(frame)
            watch.step()
    if not found:
        raise DataError(f"{path} is empty: it holds no structures.")
    return found


# The folder -------------------------------------------------------------------------------------


def _folder(path: Path) -> Iterator[Atoms]:
    from ase import Atoms

    for name in (*_INDEX, "x.bin", "a.bin"):
        if not (path / name).is_file():
            raise DataError(f"{path} misses '{name}', without which a memory-mapped set is none.")
    with damage_explained(lambda met: DataError(f"{path} cannot be read: {met}.")):
        count, ends = int(np.load(path / "ns.npy")), np.load(path / "na.npy").astype(np.int64)
    if len(ends) != count + 1 or ends[0] != 0 or (np.diff(ends) < 1).any():
        raise DataError(
            f"{path}: na.npy has to count the atoms before each of the {count} structures, and all "
            f"of them, upwards from 0; it has {len(ends)} numbers."
        )
    atoms = int(ends[-1])
    positions = _array(path / "x.bin", (atoms, 3), "<f4", ends)
    numbers = _array(path / "a.bin", (atoms,), "<i4", ends)
    cells = np.zeros((count, 3, 3))
    if (path / "c.bin").exists():
        cells = _array(path / "c.bin", (count, 3, 3), "<f4", ends)
    labels = {
        file.stem: _label(file, count, ends)
        for file in sorted(path.glob("*.bin"))
        if file.stem not in _GEOMETRY
    }
    _warn_of_digits(path, labels, ends)
    for index in range(count):
        rows = slice(int(ends[index]), int(ends[index + 1]))
        cell = np.array(cells[index], np.float64)
        frame = Atoms(np.array(numbers[rows]), np.array(positions[rows], np.float64), cell=cell,
                      pbc=cell.any(axis=1))  # fmt: skip
        for name, (values, of_atoms) in labels.items():
            _put(frame, name, np.array(values[rows if of_atoms else index], np.float64), of_atoms)
        yield frame


def _array(file: Path, shape: tuple[int, ...], dtype: str, ends: np.ndarray) -> np.ndarray:
    """A memory-mapped array; one that is shorter is cut off."""
    wanted, there = int(np.prod(shape)) * np.dtype(dtype).itemsize, file.stat().st_size
    if there != wanted:
        last = ""
        if there < wanted:
            # Of atoms or of structures: how many structures are whole.
            rows = there // max(1, wanted // shape[0])
            whole = np.searchsorted(ends, rows, "right") - 1 if shape[0] == ends[-1] else rows
            last = f" The last whole structure is number {int(whole) - 1}, counted from 0."
        raise DataError(
            f"{file} has {there} bytes, and {wanted} belong to {len(ends) - 1} structures with "
            f"{int(ends[-1])} atoms: it is cut off, or of another set.{last} Copy it again."
        )
    return np.memmap(file, dtype, "r", shape=shape) if wanted else np.zeros(shape, dtype)


def _label(file: Path, count: int, ends: np.ndarray) -> tuple[np.ndarray, bool]:
    """The values of a label, [n, ...], and whether they are of atoms."""
    size, atoms = file.stat().st_size // 4, int(ends[-1])
    name = file.stem.lower()
    of_atoms = size % atoms == 0
    if of_atoms and size % count == 0:  # both would do
        columns = size // count
        of_atoms = "force" in name or (size == 3 * atoms and "stress" not in name)
        of_atoms = of_atoms or columns not in (1, 3, 9)
    if not of_atoms and size % count:
        wanted = (atoms, 3) if "force" in name else (count, max(1, round(size / count)))
        return _array(file, wanted, "<f4", ends), of_atoms
    rows = atoms if of_atoms else count
    columns = size // rows
    inner = () if columns == 1 else (3, 3) if columns == 9 else (columns,)
    shape: tuple[int, ...] = (rows, *inner)
    return _array(file, shape, "<f4", ends), of_atoms


def _warn_of_digits(
    path: Path, labels: dict[str, tuple[np.ndarray, bool]], ends: np.ndarray
) -> None:
    """Say of energies that they are stored with too few digits."""
    for name, (values, of_atoms) in labels.items():
        if of_atoms or values.ndim != 1:
            continue
        step = float((np.abs(values) / np.diff(ends)).max()) * _DIGITS
        if step > _STEP:
            _logger.warning(
                "%s: '%s' is stored with 32 bits, in steps of %.2g for each atom: subtract the "
                "energies of the atoms before a set is written, or keep extended xyz",
                path, name, step,
            )  # fmt: skip


def _put(frame: Atoms, name: str, values: np.ndarray, of_atoms: bool) -> None:
    """Keep a label; where it is not known (NaN) it is absent."""
    if np.isnan(values).all():
        return
    if of_atoms:
        frame.arrays[name] = values
    else:
        frame.info[name] = values if values.ndim else float(values)


# The zip ----------------------------------------------------------------------------------------


def _zip(path: Path) -> Iterator[Atoms]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is damaged or cut off: {error}. Copy it again.") from None
    with archive:
        fields: dict[int, list[str]] = {}
        for name in archive.namelist():
            entry, _, field = name.partition("/")
            if entry.isdigit() and field.endswith((".mta", ".mts")):
                fields.setdefault(int(entry), []).append(field)
        if not fields or sorted(fields) != list(range(len(fields))):
            raise DataError(
                f"{path} is no data set of metatrain's: it needs the entries 0/system.mta, "
                "1/system.mta... without a gap. For another archive, unpack it."
            )
        for index in range(len(fields)):
            with damage_explained(
                lambda met, index=index: DataError(  # type: ignore[misc]
                    f"{path}, structure {index} cannot be read: {met}. Copy the file again."
                )
            ):
                frame = _entry(archive, index, sorted(fields[index]))
            yield frame


def _entry(archive: zipfile.ZipFile, index: int, fields: list[str]) -> Atoms:
    """One structure with its labels."""
    from ase import Atoms

    if "system.mta" not in fields:
        raise DataError(f"{archive.filename}, structure {index} has no system.mta.")
    parts = _arrays(archive.read(f"{index}/system.mta"))
    frame = Atoms(parts["types"], parts["positions"], cell=parts["cell"], pbc=parts["pbc"])
    for field in fields:
        if field.endswith(".mts"):
            stored = np.load(io.BytesIO(archive.read(f"{index}/{field}")), allow_pickle=False)
            _put_map(frame, field.removesuffix(".mts"), _arrays(stored.tobytes()))
    return frame


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file of metatensor's or metatomic's, which is a zip of them."""
    with zipfile.ZipFile(io.BytesIO(data)) as inner:
        return {
            name.removesuffix(".npy"): np.load(io.BytesIO(inner.read(name)), allow_pickle=False)
            for name in inner.namelist()
            if name.endswith(".npy")
        }


def _put_map(frame: Atoms, name: str, parts: dict[str, Any]) -> None:
    """Keep the values of a TensorMap of one block; gradients of energies are forces and stress."""
    if any(key.startswith("blocks/1/") for key in parts):
        return  # spherical: several blocks
    values = np.asarray(parts["blocks/0/values"], np.float64)
    of_atoms = "atom" in (parts["blocks/0/samples"].dtype.names or ())
    values = values if of_atoms else values[0]
    if values.shape[-1] == 1:
        values = values[..., 0]
    _put(frame, name, values, of_atoms)
    gradient = parts.get("blocks/0/gradients/positions/values")
    taken = {*frame.arrays, *frame.info}
    if gradient is not None:
        forces = -np.asarray(gradient, np.float64)[..., 0]
        _put(frame, "forces" if "forces" not in taken else f"{name}_forces", forces, True)
    strain = parts.get("blocks/0/gradients/strain/values")
    if strain is not None and frame.cell.rank == 3:
        stress = np.asarray(strain, np.float64)[0, ..., 0] / frame.get_volume()
        _put(frame, "stress" if "stress" not in taken else f"{name}_stress", stress, False)
