"""metatrain's own data sets: a folder of memory-mapped arrays, a zip with one entry a structure.

Both are read with numpy alone, as frames with labels under the names that they have there:
``U0.bin`` or ``0/U0.mts`` is the label ``U0``. The frames of a large folder stay on disk.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from ase import Atoms

from pet_finetune.errors import DataError, damage_explained
from pet_finetune.files import read_object
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

_logger = get_logger(__name__)
_INDEX = ("ns.npy", "na.npy")
#: What ``pet-finetune convert`` says of a folder beside metatrain's files, and its version.
ABOUT, VERSION = "converted.json", 1
#: Beside it, neighbour lists: a row for each directed pair, and the pairs before each structure.
PAIRS, PAIR_ENDS, PAIR = "pairs.i4", "pairs.npy", np.dtype(("<i4", 6))
#: Structures, and a twentieth of the atoms, that a set may have to be kept in memory, where its
#: neighbour lists are too: about 1 GB.
MOST_IN_MEMORY = 50_000
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
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def read_metatrain_set(path: Path) -> Sequence[Atoms]:
    """The frames of a set, with labels in ``info`` (of structures) and ``arrays`` (of atoms).

    Returns:
        A list, or of a large folder the :class:`Folder`, whose frames stay on disk.

    Raises:
        DataError: something is missing, cut off, or of a shape that fits nothing.
    """
    folder = Folder(path) if path.is_dir() else None
    if folder is not None and is_large(len(folder), int(folder.ends[-1])):
        return folder
    with Watch(f"reading {path}", "frames") as watch:
        found = []
        for frame in (frame for _, frame in zip_frames(path)) if folder is None else folder:
            found.append(frame)
            watch.step()
    return found


def is_large(structures: int, atoms: int = 0) -> bool:
    """Whether a set stays on disk."""
    return structures > MOST_IN_MEMORY or atoms > 20 * MOST_IN_MEMORY


# The folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """The values of one name in a folder.

    Attributes:
        array: ``[n, ...]``, a row for each structure or each atom; read from disk where indexed.
        of_atoms: which of the two.
    """

    array: np.ndarray
    of_atoms: bool


class Folder(Sequence["Atoms"]):
    """A memory-mapped folder: frames that are read from disk on demand.

    Attributes:
        path: of the folder.
        source: what messages call it, the path unless another file was packed into it.
        ends: atoms before each structure, and all of them, ``[n + 1]``.
        numbers: atomic numbers, ``[atoms]``.
        positions: ``[atoms, 3]``.
        cells: ``[n, 3, 3]``; None where there are none.
        labels: the values of each name.
        notes: texts that all frames have in ``info``, such as units.
        cutoff: of the neighbour lists that it has, in the unit of positions; None without.

    Raises:
        DataError: something is missing, cut off, or of a shape that fits nothing.
    """

    def __init__(self, path: Path, source: str = "") -> None:
        for name in (*_INDEX, "x.bin", "a.bin"):
            if not (path / name).is_file():
                raise DataError(
                    f"{path} misses '{name}', without which a memory-mapped set is none."
                )
        with damage_explained(lambda met: DataError(f"{path} cannot be read: {met}.")):
            count, ends = int(np.load(path / "ns.npy")), np.load(path / "na.npy").astype(np.int64)
        if len(ends) != count + 1 or ends[0] != 0 or (np.diff(ends) < 1).any():
            raise DataError(
                f"{path}: na.npy has to count the atoms before each of the {count} structures, and "
                f"all of them, upwards from 0; it has {len(ends)} numbers."
            )
        if not count:
            raise DataError(f"{path} is empty: it holds no structures.")
        self.path, self.source, self.ends = path, source or str(path), ends
        with damage_explained(lambda met: DataError(f"{path / ABOUT} is damaged: {met}.")):
            about = read_about(path)
            self.notes: dict[str, str] = dict(about.get("notes", {}))
            shapes = {
                name: (bool(one["of_atoms"]), tuple(map(int, one["shape"])))
                for name, one in about.get("labels", {}).items()
            }
        self._maps: list[np.memmap] = []
        atoms = int(ends[-1])
        self.positions = self._mapped(path / "x.bin", (atoms, 3), "<f4")
        self.numbers = self._mapped(path / "a.bin", (atoms,), "<i4")
        self.cells = None
        if (path / "c.bin").exists():
            self.cells = self._mapped(path / "c.bin", (count, 3, 3), "<f4")
        self.labels = {
            file.stem: self._label(file, shapes.get(file.stem))
            for file in sorted(path.glob("*.bin"))
            if file.stem not in _GEOMETRY
        }
        self._warn_of_digits()
        self.cutoff: float | None = about.get("cutoff")
        if self.cutoff is not None:
            with damage_explained(lambda met: DataError(f"{path} cannot be read: {met}.")):
                self._pair_ends = np.load(path / PAIR_ENDS)
                there = (path / PAIRS).stat().st_size // PAIR.itemsize
            if there != self._pair_ends[count]:
                raise DataError(f"{path / PAIRS} is cut off. Convert the data again.")
            self._pairs = np.empty((0, 6), "<i4")
            if there:  # no empty file can be mapped
                mapped = np.memmap(path / PAIRS, "<i4", "r", shape=(there, 6))
                self._pairs = self._kept(mapped)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Atoms: ...
    @overload
    def __getitem__(self, index: slice) -> list[Atoms]: ...
    def __getitem__(self, index: int | slice) -> Atoms | list[Atoms]:
        """The frame with a number, or several."""
        if isinstance(index, slice):
            return [self._frame(number) for number in range(*index.indices(len(self)))]
        return self._frame(range(len(self))[index])

    @property
    def num_atoms(self) -> np.ndarray:
        """Atoms of each structure, ``[n]`` int64."""
        return np.diff(self.ends)

    def rows(self, index: int) -> slice:
        """The atoms of a structure."""
        return slice(int(self.ends[index]), int(self.ends[index + 1]))

    def pairs(self, index: int) -> np.ndarray:
        """Centre, neighbour, reverse and cell shift of each directed pair, ``[e, 6]`` int32."""
        return self._pairs[self._pair_ends[index] : self._pair_ends[index + 1]]

    def release(self) -> None:
        """Let the pages that were read go: they count as memory of the process until then."""
        for array in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def _frame(self, index: int) -> Atoms:
        rows = self.rows(index)
        cell = np.zeros((3, 3)) if self.cells is None else np.array(self.cells[index], np.float64)
        frame = Atoms(np.array(self.numbers[rows]), np.array(self.positions[rows], np.float64),
                      cell=cell, pbc=cell.any(axis=1))  # fmt: skip
        for name, values in self.labels.items():
            chosen = values.array[rows if values.of_atoms else index]
            _put(frame, name, np.array(chosen, np.float64), values.of_atoms)
        frame.info.update(self.notes)
        return frame

    def _mapped(self, file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A memory-mapped array; one that is shorter is cut off."""
        wanted, there = int(np.prod(shape)) * np.dtype(dtype).itemsize, file.stat().st_size
        if there != wanted:
            last = ""
            if there < wanted:
                # Of atoms or of structures: how many structures are whole.
                rows = there // max(1, wanted // shape[0])
                of_atoms = shape[0] == self.ends[-1]
                whole = np.searchsorted(self.ends, rows, "right") - 1 if of_atoms else rows
                last = f" The last whole structure is number {int(whole) - 1}, counted from 0."
            raise DataError(
                f"{file} has {there} bytes, and {wanted} belong to {len(self)} structures with "
                f"{int(self.ends[-1])} atoms: it is cut off, or of another set.{last} Copy it "
                "again."
            )
        return self._kept(np.memmap(file, dtype, "r", shape=shape))

    def _kept(self, array: np.memmap) -> np.ndarray:
        self._maps.append(array)
        return array.view(np.ndarray)

    def _label(self, file: Path, known: tuple[bool, tuple[int, ...]] | None) -> Values:
        """The values of a label, in 64 bits where the folder has them."""
        of_atoms, inner = self._guessed(file) if known is None else known
        rows = int(self.ends[-1]) if of_atoms else len(self)
        array = self._mapped(file, (rows, *inner), "<f4")
        exact = file.with_suffix(".npy")
        if exact.exists():
            with damage_explained(lambda met: DataError(f"{exact} cannot be read: {met}.")):
                whole = np.load(exact, mmap_mode="r")
            if whole.shape != array.shape:
                raise DataError(f"{exact} has the shape {whole.shape}; {array.shape} is expected.")
            array = self._kept(whole)
        return Values(array, of_atoms)

    def _guessed(self, file: Path) -> tuple[bool, tuple[int, ...]]:
        """Whether a label is of atoms, and the shape of a row, from its size and its name."""
        size, atoms, count = file.stat().st_size // 4, int(self.ends[-1]), len(self)
        name = file.stem.lower()
        of_atoms = size % atoms == 0
        if of_atoms and size % count == 0:  # both would do
            columns = size // count
            of_atoms = "force" in name or (size == 3 * atoms and "stress" not in name)
            of_atoms = of_atoms or columns not in (1, 3, 9)
        if not of_atoms and size % count:
            return ("force" in name), ((3,) if "force" in name else (max(1, round(size / count)),))
        columns = size // (atoms if of_atoms else count)
        return of_atoms, () if columns == 1 else (3, 3) if columns == 9 else (columns,)

    def _warn_of_digits(self) -> None:
        """Say of energies that they are stored with too few digits."""
        for name, values in self.labels.items():
            array = values.array
            if values.of_atoms or array.ndim != 1 or array.dtype != np.float32:
                continue
            step = float(np.nanmax(np.abs(array) / self.num_atoms, initial=0.0)) * _DIGITS
            if step > _STEP:
                _logger.warning(
                    "%s: '%s' is stored with 32 bits, in steps of %.2g for each atom: subtract the "
                    "energies of the atoms before a set is written, write it with `pet-finetune "
                    "convert`, or keep extended xyz",
                    self.source, name, step,
                )  # fmt: skip


def read_about(path: Path) -> dict[str, Any]:
    """Record of a folder written by ``pet-finetune convert``; empty for others.

    Raises:
        DataError: another version wrote it.
    """
    file = path / ABOUT
    if not file.exists():
        return {}
    about = read_object(file)
    if about.get("version") != VERSION:
        raise DataError(
            f"{path} was written by another version of pet-finetune (its sets have version "
            f"{about.get('version')}, this one reads {VERSION}). Convert the data again."
        )
    return about


def _put(frame: Atoms, name: str, values: np.ndarray, of_atoms: bool) -> None:
    """Keep a label; where it is not known (NaN) it is absent."""
    if np.isnan(values).all():
        return
    if of_atoms:
        frame.arrays[name] = values
    else:
        frame.info[name] = values if values.ndim else float(values)


# The zip ----------------------------------------------------------------------------------------


def zip_count(path: Path) -> int:
    """Number of structures in a zip."""
    with _opened(path) as archive:
        return sum(name.endswith("/system.mta") for name in archive.namelist())


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is damaged or cut off: {error}. Copy it again.") from None


def zip_frames(path: Path, first: int = 0) -> Iterator[tuple[int, Atoms]]:
    """The frames of a zip from a number on, each with the number of the next."""
    with _opened(path) as archive:
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
        for index in range(first, len(fields)):
            with damage_explained(
                lambda met, index=index: DataError(  # type: ignore[misc]
                    f"{path}, structure {index} cannot be read: {met}. Copy the file again."
                )
            ):
                frame = _entry(archive, index, sorted(fields[index]))
            yield index + 1, frame


def _entry(archive: zipfile.ZipFile, index: int, fields: list[str]) -> Atoms:
    """One structure with its labels."""
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
