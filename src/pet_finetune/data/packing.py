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
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pet_finetune.errors import DataError
from pet_finetune.files import read_object, write_whole
from pet_finetune.installation import cache_folders
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .ase_databases import is_database
from .extxyz import tell
from .frame_blocks import Frame, FrameSource, prepared, rows, streamed
from .metatrain_sets import (
    ABOUT,
    PAIR,
    PAIR_ENDS,
    PAIRS,
    VERSION,
    Folder,
    is_large,
    read_about,
    zip_count,
    zip_frames,
)
from .process_pool import in_order
from .structure import place

_logger = get_logger(__name__)
_PROGRESS, _SIZES = "progress.json", "sizes.i8"
#: Endings of the files that grow with each frame.
_GROWING = (".bin", ".f8", ".i4", ".i8")
#: Seconds between two records of what is done.
_SECONDS = 5.0
#: Pieces of a file that tell it from others, and their bytes.
_PIECES, _PIECE = 256, 65536


def identity_of(path: Path, *, whole: bool = False) -> str:
    """Changes with the content: the size of a file, and 256 pieces of it, evenly spread, or all.

    Of a folder, of all its files.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        whole_file = whole or size <= _PIECE * _PIECES
        digest.update(f"{file.name if path.is_dir() else ''} {size};".encode())
        with file.open("rb") as stream:
            if whole_file:
                while piece := stream.read(_PIECE * 16):
                    digest.update(piece)
                continue
            for begin in np.linspace(0, size - _PIECE, _PIECES).astype(np.int64).tolist():
                stream.seek(begin)
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def packed(path: Path) -> Folder | None:
    """A large database or zip of metatrain's as a folder in the cache, which is made once.

    Returns:
        The folder; None for what is no such file, or small enough for the memory.

    Raises:
        DataError: it is damaged; names the frame.
    """
    if not is_database(path) and not (path.suffix == ".zip" and path.is_file()):
        return None
    source = set_frames(path)
    if not is_large(source.total):
        return None
    key = identity_of(path)
    target = cache_folders()[-1] / "sets" / f"{key}-{VERSION}"
    if not target.exists():
        _logger.info(
            "%s has %d structures: they are packed once into %s", path, source.total, target
        )
    pack(target, key, source)
    return Folder(target, str(path))


def set_frames(path: Path) -> FrameSource:
    """Source of the frames of a database or of metatrain's zip."""
    if is_database(path):
        return rows(path)
    return streamed(str(path), partial(zip_frames, path), zip_count(path))


def pack(
    target: Path,
    key: str,
    source: FrameSource,
    *,
    names: Collection[str] | None = None,
    cutoff: float | None = None,
    workers: int | None = 1,
) -> int:
    """Write frames as a memory-mapped folder, or continue an unfinished one.

    Args:
        target: the folder; it appears when it is whole.
        key: of the content and the options; a folder with the same one is there already.
        source: where the frames come from.
        names: of the labels that are kept; None for all.
        cutoff: of neighbour lists, in the unit of the positions; None for none.
        workers: processes that read and check; None for as many as pay.

    Returns:
        How many structures there are.

    Raises:
        DataError: a frame cannot be stored, the disk is full, or the folder holds something else.
    """
    with only_one(target):
        if target.is_dir() and any(target.iterdir()):
            if read_about(target).get("key") == key:
                _tidy(target)  # a process may have ended before it did
                return int(np.load(target / "ns.npy"))
            raise DataError(
                f"{target} holds something else (another set, or the same with other options). "
                "Remove it, or choose another folder."
            )
        try:
            return _pack(target, key, source, names, cutoff, workers)
        except OSError as error:
            raise DataError(
                f"Cannot write {target}: {error.strerror or error}. What is done stays beside it; "
                "the same command goes on with it."
            ) from error


def _pack(
    target: Path,
    key: str,
    source: FrameSource,
    names: Collection[str] | None,
    cutoff: float | None,
    workers: int | None,
) -> int:
    writer = _Writer(target.with_name(f"{target.name}.part"), key, source.name, cutoff)
    if writer.count:
        _logger.info("going on with %s after %d structures", target, writer.count)
    blocks = source.blocks(writer.position, writer.count)
    prepare = partial(prepared, source.name, names, cutoff)
    found = in_order(prepare, blocks, source.workers(workers))
    written, notes = time.monotonic(), Counter[str]()
    unit = "MB" if source.in_bytes else "structures"
    with (
        Watch(f"packing {source.name}", unit, source.total) as watch,
        closing(writer),
        closing(found),
    ):
        for frames, some in found:
            for frame in frames:
                writer.add(frame)
                watch.done = frame.end // 10**6 if source.in_bytes else writer.count
                if time.monotonic() - written > _SECONDS:
                    writer.record()
                    written = time.monotonic()
            notes += some
        tell(notes, source.name, writer.count)
        writer.finish(target)
    return writer.count


class _Writer:
    """The arrays of a folder while they grow."""

    def __init__(self, folder: Path, key: str, source: str, cutoff: float | None) -> None:
        self._folder, self._key, self._source, self._cutoff = folder, key, source, cutoff
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
            sizes = state.get("sizes", {})
            there = {f.name: f.stat().st_size for f in self._folder.iterdir() if f.name in sizes}
            # Files are shorter than the record says where the machine went down.
            whole = all(there.get(name, -1) >= size for name, size in sizes.items())
            if (state.get("key"), state.get("version")) == (self._key, VERSION) and whole:
                self.count, self.position = state["count"], state["position"]
                self._atoms, self._columns = state["atoms"], state["columns"]
                self._dropped, self._notes = state["dropped"], state["notes"]
                for name, size in sizes.items():
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

    def add(self, frame: Frame) -> None:
        """Write a frame behind the others."""
        where, count = place(self.count, self._source), frame.size
        for file, content in zip(("x.bin", "a.bin", "c.bin"), frame.geometry, strict=True):
            self._file(file).write(content)
        edges = len(frame.pairs) // PAIR.itemsize
        self._file(_SIZES).write(np.array([count, edges], np.int64).tobytes())
        if self._cutoff is not None:
            self._file(PAIRS).write(frame.pairs)
        for name, text in frame.units.items():
            if self._notes.setdefault(name, text) != text:
                raise DataError(
                    f"{where} states {name}={text}, and frames before it "
                    f"{name}={self._notes[name]}. Make two sets of them."
                )
        for name, text in frame.texts.items():
            if name not in self._dropped:
                self._texts.setdefault(name, f"{where} ({text!r})")
        labels = {k: one for k, one in frame.labels.items() if k not in self._dropped}
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
        self.position = frame.end
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

    def record(self) -> None:
        """Record the progress, from which another process can continue."""
        for file in self._files.values():
            file.flush()
        names = [name for name in os.listdir(self._folder) if name.endswith(_GROWING)]
        state = {
            "key": self._key, "version": VERSION, "count": self.count, "position": self.position,
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
            raise DataError(f"{self._source} holds no structures.")
        self.record()
        self.close()
        sizes = np.fromfile(self._folder / _SIZES, np.int64).reshape(-1, 2)
        ends = np.concatenate([[[0, 0]], np.cumsum(sizes, axis=0)])
        np.save(self._folder / "ns.npy", np.array(self.count))
        np.save(self._folder / "na.npy", ends[:, 0])
        if self._cutoff is not None:
            np.save(self._folder / PAIR_ENDS, ends[:, 1])
        for name, column in self._columns.items():
            if not column["exact"]:
                _as_npy(self._folder / f"{name}.f8", self._folder / f"{name}.npy", self.count)
        labels = {
            name: {"of_atoms": column["of_atoms"], "shape": column["shape"]}
            for name, column in self._columns.items()
        }
        about = {"version": VERSION, "key": self._key, "source": self._source, "labels": labels,
                 "notes": self._notes, "cutoff": self._cutoff}  # fmt: skip
        write_whole(self._folder / ABOUT, json.dumps(about))
        if target.is_dir():  # an empty one
            target.rmdir()
        self._folder.rename(target)
        _tidy(target)


def _tidy(folder: Path) -> None:
    """Remove what only writing it took."""
    for file in (folder / _SIZES, folder / _PROGRESS, *folder.glob("*.f8")):
        file.unlink(missing_ok=True)


def _as_npy(raw: Path, target: Path, count: int) -> None:
    """Numbers of 64 bits with the header of numpy's format before them."""
    with target.open("wb") as file, raw.open("rb") as numbers:
        header = {"descr": "<f8", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(numbers, file)
