"""Writing metatrain's memory-mapped folder frame by frame: resumable, and by one process at a time.

Beside metatrain's own files there is ``converted.json``, and for numbers of structures that 32 bits
do not hold exactly the same with 64, as ``energy.npy`` beside ``energy.bin``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from pet_finetune.errors import DataError
from pet_finetune.files import read_object, write_whole
from pet_finetune.installation import cache_folders
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .ase_databases import count_rows, is_database, rows_of
from .metatrain_sets import ABOUT, VERSION, Folder, is_large, read_about, zip_count, zip_frames
from .stated_units import is_statement
from .structure import check_geometry, place

_logger = get_logger(__name__)
_PROGRESS, _SIZES = "progress.json", "sizes.bin"
#: Seconds between two records of what is done.
_SECONDS = 5.0
#: Names that metatrain keeps for other things.
_KEPT = frozenset({"x", "a", "c", "ns", "na", "numbers", "positions"})
#: Results of calculators that are of atoms.
_OF_ATOMS = frozenset({"forces", "energies", "stresses", "charges", "magmoms"})
#: Pieces of a file that tell it from others, and their bytes.
_PIECES, _PIECE = 256, 65536

#: Frames from a position on (before which there is a number of others), each with the position
#: behind it.
FrameSource = Callable[[int, int], "Iterator[tuple[int, Atoms]]"]


def identity_of(path: Path) -> str:
    """Changes with the content: the size of a file, and 256 pieces of it, evenly spread.

    Of a folder, of all its files.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size};".encode())
        with file.open("rb") as stream:
            for begin in np.linspace(0, max(0, size - _PIECE), _PIECES).astype(np.int64).tolist():
                stream.seek(begin)
                digest.update(stream.read(_PIECE))
                if size <= _PIECE:
                    break
    return digest.hexdigest()


def packed(path: Path) -> Folder | None:
    """A large database or zip of metatrain's as a folder in the cache, which is made once.

    Returns:
        The folder; None for what is no such file, or small enough for the memory.

    Raises:
        DataError: it is damaged; names the frame.
    """
    if is_database(path):
        count = count_rows(path)
    elif path.suffix == ".zip" and path.is_file():
        count = zip_count(path)
    else:
        return None
    if not is_large(count):
        return None
    key = identity_of(path)
    target = cache_folders()[-1] / "sets" / f"{key}-{VERSION}"
    if not target.exists():
        _logger.info("%s has %d structures: they are packed once into %s", path, count, target)
    pack(target, key, str(path), set_frames(path), total=count)
    return Folder(target, str(path))


def set_frames(path: Path) -> FrameSource:
    """Reader of the frames of a database or of metatrain's zip."""
    if is_database(path):
        return lambda position, done: rows_of(path, position)
    return lambda position, done: zip_frames(path, position)


def pack(
    target: Path,
    key: str,
    source: str,
    frames: FrameSource,
    *,
    names: Collection[str] | None = None,
    total: int | None = None,
) -> int:
    """Write frames as a memory-mapped folder, or continue an unfinished one.

    Args:
        target: the folder; it appears when it is whole.
        key: of the content and the options; a folder with the same one is there already.
        source: where the frames come from, for messages.
        frames: gives them.
        names: of the labels that are kept; None for all.
        total: how many frames there are, where that is known.

    Returns:
        How many structures there are.

    Raises:
        DataError: a frame cannot be stored, the disk is full, or the folder holds something else.
    """
    with only_one(target):
        if target.is_dir() and any(target.iterdir()):
            if read_about(target).get("key") == key:
                return int(np.load(target / "ns.npy"))
            raise DataError(
                f"{target} holds something else (another set, or the same with other options). "
                "Remove it, or choose another folder."
            )
        try:
            return _pack(target, key, source, frames, names, total)
        except OSError as error:
            raise DataError(
                f"Cannot write {target}: {error.strerror or error}. What is done stays beside it; "
                "the same command goes on with it."
            ) from error


def _pack(
    target: Path,
    key: str,
    source: str,
    frames: FrameSource,
    names: Collection[str] | None,
    total: int | None,
) -> int:
    writer = _Writer(target.with_name(f"{target.name}.part"), key, source, names)
    if writer.count:
        _logger.info("going on with %s after %d structures", target, writer.count)
    written, position = time.monotonic(), writer.position
    with Watch(f"packing {source}", "structures", total) as watch:
        watch.step(writer.count)
        try:
            for position, atoms in frames(writer.position, writer.count):
                writer.add(atoms)
                watch.step()
                if time.monotonic() - written > _SECONDS:
                    writer.record(position)
                    written = time.monotonic()
        except BaseException:
            writer.close()
            raise
    writer.finish(target)
    return writer.count


class _Writer:
    """The arrays of a folder while they grow."""

    def __init__(self, folder: Path, key: str, source: str, names: Collection[str] | None) -> None:
        self._folder, self._key, self._source, self._names = folder, key, source, names
        self.count = self.position = self._atoms = 0
        self._columns: dict[str, dict[str, Any]] = {}
        self._dropped: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._told: set[str] = set()
        self._files: dict[str, BinaryIO] = {}
        self._resume()

    def _resume(self) -> None:
        """Go on where a process ended, or begin anew."""
        record = self._folder / _PROGRESS
        if record.exists():
            state = read_object(record)
            if (state.get("key"), state.get("version")) == (self._key, VERSION):
                self.count, self.position = state["count"], state["position"]
                self._atoms, self._columns = state["atoms"], state["columns"]
                self._dropped, self._notes = state["dropped"], state["notes"]
                for name, size in state["sizes"].items():
                    os.truncate(self._folder / name, size)
                return
        elif self._folder.is_dir() and any(self._folder.iterdir()):
            known = {"x.bin", "a.bin", "c.bin", _SIZES}
            if not known & {file.name for file in self._folder.iterdir()}:
                raise DataError(f"{self._folder} is in the way: remove it.")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("ab", buffering=1 << 18)
        return self._files[name]

    def add(self, atoms: Atoms) -> None:
        """Write a frame behind the others."""
        where, count = place(self.count, self._source), len(atoms)
        pbc = np.array(atoms.pbc, dtype=bool)
        cell = np.where(pbc[:, None], np.asarray(atoms.cell, dtype=np.float64), 0.0)
        check_geometry(atoms.numbers, atoms.positions, cell, pbc, where)
        self._file("x.bin").write(atoms.positions.astype("<f4").tobytes())
        self._file("a.bin").write(atoms.numbers.astype("<i4").tobytes())
        self._file("c.bin").write(cell.astype("<f4").tobytes())
        self._file(_SIZES).write(np.int64(count).tobytes())
        labels = self._labels(atoms, where)
        for name, (array, of_atoms) in labels.items():
            column = self._columns.get(name)
            if column is None:
                column = self._new_column(name, array, of_atoms)
            shape = array.shape[1:] if of_atoms else array.shape
            if column["of_atoms"] != of_atoms or tuple(column["shape"]) != shape:
                self._drop(name, f"{where} has it in another shape than frames before")
        for name in self._texts.keys() & self._columns.keys():
            self._tell_text(name)
        for name, column in self._columns.items():
            rows = (count,) if column["of_atoms"] else ()
            array = (
                labels[name][0] if name in labels else np.full((*rows, *column["shape"]), np.nan)
            )
            self._write_values(name, column, array)
        self.count += 1
        self._atoms += count

    def _tell_text(self, name: str) -> None:
        """Warn once of a label that is text in a frame (such as stars) and a number elsewhere."""
        if name not in self._told:
            self._told.add(name)
            _logger.warning(
                "%s: %r is text there and a number in other frames: it counts as unknown",
                self._texts[name],
                name,
            )

    def _write_values(self, name: str, column: dict[str, Any], array: np.ndarray) -> None:
        narrow = array.astype("<f4")
        self._file(f"{name}.bin").write(narrow.tobytes())
        if not column["of_atoms"] and not column["shape"]:
            self._file(f"{name}.f8").write(array.astype("<f8").tobytes())
            if float(narrow) != float(array) and not np.isnan(array):
                column["exact"] = False

    def _labels(self, atoms: Atoms, where: str) -> dict[str, tuple[np.ndarray, bool]]:
        """Numbers of a frame by name, and whether they are of atoms; notes texts about units."""
        found: dict[str, tuple[np.ndarray, bool]] = {}
        results: Mapping[str, Any] = getattr(atoms.calc, "results", None) or {}
        places = (
            (atoms.info, lambda name: False),
            (atoms.arrays, lambda name: True),
            (results, lambda name: name in _OF_ATOMS),
        )
        for values, is_of_atoms in places:
            for key, value in values.items():
                name = str(key)
                if isinstance(value, str) and is_statement(name):
                    if self._notes.setdefault(name, value) != value:
                        raise DataError(
                            f"{where} states {name}={value}, and frames before it "
                            f"{name}={self._notes[name]}. Make two sets of them."
                        )
                    continue
                if value is None or name in found or not self._wanted(name):
                    continue
                if isinstance(value, str):
                    self._texts.setdefault(name, f"{where} ({value[:20]!r})")
                    continue
                array = np.asarray(value)
                if array.dtype.kind in "iufb" and array.size:
                    found[name] = _shaped(name, array.astype(np.float64)), is_of_atoms(name)
        return found

    def _wanted(self, name: str) -> bool:
        if name in _KEPT or "/" in name or name.startswith("."):
            return False
        return name not in self._dropped and (self._names is None or name in self._names)

    def _new_column(self, name: str, array: np.ndarray, of_atoms: bool) -> dict[str, Any]:
        """Begin a label; the frames before this one lack it."""
        shape = list(array.shape[1:] if of_atoms else array.shape)
        column = {"of_atoms": of_atoms, "shape": shape, "exact": True}
        self._columns[name] = column
        before = (self._atoms if of_atoms else self.count) * int(np.prod(shape))
        for first in range(0, before, 1 << 20):
            unknown = np.full(min(1 << 20, before - first), np.nan)
            self._file(f"{name}.bin").write(unknown.astype("<f4").tobytes())
            if not of_atoms and not shape:
                self._file(f"{name}.f8").write(unknown.tobytes())
        return column

    def _drop(self, name: str, why: str) -> None:
        """Leave a label out that has no one shape."""
        _logger.warning("%s: '%s' is left out: %s", self._source, name, why)
        self._dropped[name] = why
        del self._columns[name]
        for file in (f"{name}.bin", f"{name}.f8"):
            if file in self._files:
                self._files.pop(file).close()
            (self._folder / file).unlink(missing_ok=True)

    def record(self, position: int) -> None:
        """Record the progress, from which another process can continue."""
        self.position = position
        for file in self._files.values():
            file.flush()
        names = [name for name in os.listdir(self._folder) if name.endswith((".bin", ".f8"))]
        state = {
            "key": self._key, "version": VERSION, "count": self.count, "position": position,
            "atoms": self._atoms, "columns": self._columns, "dropped": self._dropped,
            "notes": self._notes,
            "sizes": {name: (self._folder / name).stat().st_size for name in names},
        }  # fmt: skip
        write_whole(self._folder / _PROGRESS, json.dumps(state))

    def close(self) -> None:
        """Let the files go."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def finish(self, target: Path) -> None:
        """Write the index, and give the folder its name."""
        if not self.count:
            self.close()
            raise DataError(f"{self._source} holds no structures.")
        self.close()
        sizes = np.fromfile(self._folder / _SIZES, np.int64)
        np.save(self._folder / "ns.npy", np.array(self.count))
        np.save(self._folder / "na.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        for name, column in self._columns.items():
            wide = self._folder / f"{name}.f8"
            if wide.exists():
                if not column["exact"]:
                    _as_npy(wide, self._folder / f"{name}.npy", self.count)
                wide.unlink()
        labels = {
            name: {"of_atoms": column["of_atoms"], "shape": column["shape"]}
            for name, column in self._columns.items()
        }
        about = {"version": VERSION, "key": self._key, "source": self._source, "labels": labels,
                 "notes": self._notes}  # fmt: skip
        write_whole(self._folder / ABOUT, json.dumps(about))
        for name in (_SIZES, _PROGRESS):
            (self._folder / name).unlink(missing_ok=True)
        if target.is_dir():  # an empty one
            target.rmdir()
        self._folder.rename(target)


def _shaped(name: str, array: np.ndarray) -> np.ndarray:
    """Values as metatrain has them: numbers without axes, stress and virial as 3x3."""
    if array.shape == (1,):
        return array.reshape(())
    if "stress" in name.lower() or "virial" in name.lower():
        if array.shape == (6,):
            return np.asarray(voigt_6_to_full_3x3_stress(array))
        if array.shape == (9,):
            return array.reshape(3, 3)
    return array


def _as_npy(raw: Path, target: Path, count: int) -> None:
    """Numbers of 64 bits with the header of numpy's format before them."""
    with target.open("wb") as file, raw.open("rb") as numbers:
        header = {"descr": "<f8", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(numbers, file)
