"""Files: written whole, whether they are there, and sizes as people read them."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pet_finetune.errors import DataError, PetFinetuneError, did_you_mean


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of ``path`` at the end.

    Readers find the old one or the new one, whole, also after a crash of the machine: what was
    written is on the disk before it gets its name. If the block raises, ``path`` stays as it was
    and what was written is removed.

    Args:
        path: the final place; its folder must exist. The path to write to has the same name, in
            a folder of its own beside it, since some formats go by the name or store it.

    Raises:
        OSError: no room, no permission.
    """
    path = Path(path)
    _check_replaceable(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        try:
            yield partial
            for file in (partial, *partial.rglob("*")):
                _sync(file)
        except OSError as error:
            if error.filename in (None, str(partial)):  # a full disk names no file
                error.filename = str(path)
            raise
        os.replace(partial, path)
    with suppress(OSError):  # some file systems cannot do this for a folder
        _sync(path.parent)


def found_whole(folder: Path, name: str) -> list[Path]:
    """Files of a name in a folder and below, without what a killed :func:`replacing` left."""
    return sorted(p for p in folder.rglob(name) if not p.parent.name.startswith(f".{name}."))


def remove_half_written(folder: Path) -> None:
    """Remove what :func:`replacing` left in a folder of this process when it was killed there."""
    for place in folder.glob(".*.????????"):
        name = place.name[1:-9]
        if place.is_dir() and {path.name for path in place.iterdir()} <= {name}:
            shutil.rmtree(place, ignore_errors=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file in one step, text as UTF-8: it is whole or as it was.

    Raises:
        OSError: no room, no permission.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing_explained(folder: Path, kind: type[PetFinetuneError]) -> Iterator[None]:
    """Say of a failed write which output folder it was for and what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        above = next(path for path in (folder, *folder.parents, Path()) if os.path.lexists(path))
        if not above.is_dir():
            why = f"'{above}' is {'a link to nothing' if above.is_symlink() else 'a file'}"
        room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise kind(
            f"Cannot write to the output folder '{folder}': {why}. "
            f"{'Make room, or choose' if room else 'Choose'} another with -o FOLDER; a run that "
            "has saved its state goes on with --restart."
        ) from error


def make_writable(folder: Path, kind: type[PetFinetuneError]) -> None:
    """Make the output folder of a run where it does not exist, and try to write to it."""
    with writing_explained(folder, kind):
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "a file")


def check_room(folder: Path, size: int) -> None:
    """Refuse to begin a file of at least ``size`` bytes that the disk of a folder has no room for.

    Raises:
        OSError: there is less.
    """
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before work is spent on what would be in it.

    Raises:
        OSError: it is a folder, or there can be no file of this name.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _check_replaceable(path)
    above = next(place for place in path.absolute().parents if place.exists())
    try:  # what permissions say is not all: /proc, quotas, shares that are mounted read-only
        tempfile.TemporaryDirectory(prefix=".", dir=above).cleanup()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(above)) from error


def check_new(path: Path, *, makes_folders: bool = False) -> None:
    """Refuse a file that is there already or cannot be written, before work is spent on it.

    Args:
        path: the file, or a folder to be.
        makes_folders: whether the folders above it are made, or must exist.

    Raises:
        DataError: with what to do.
    """
    if os.path.lexists(path):  # a link to nothing, too
        raise DataError(f"'{path}' exists and is not overwritten. Remove it, or name another.")
    if not makes_folders and not path.absolute().parent.is_dir():
        raise DataError(f"'{path}': there is no folder '{path.parent}'. Make it first.")
    try:
        check_writable(path)
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be written ({error.filename}: {error.strerror}). Choose another "
            "place."
        ) from error


def _check_replaceable(path: Path) -> None:
    """Refuse a device, a pipe or a socket, which a file would put an end to (/dev/null for all)."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EEXIST, "a device or a pipe, no regular file", str(path))


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that this package wrote.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read, or holds no such object.
    """
    with _reading_explained(path, "JSON"):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"'{path}' is damaged: it holds a {kind}, not a JSON object. {_COPY}")
    return content


_COPY = "Put a whole copy of it in its place."


@contextmanager
def _reading_explained(path: Path, what: str) -> Iterator[None]:
    """Say of a file that cannot be read, or is not what it should be, which one it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"'{path}' is damaged: it is no {what} ({error}). {_COPY}") from error


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a CSV table that this package wrote.

    A row that is shorter or longer than the heading (half written, when a run was killed) is left
    out.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read.
    """
    what = "table of comma-separated values"
    with _reading_explained(path, what), path.open(newline="", encoding="utf-8") as stream:
        heading, *rows = list(csv.reader(stream)) or [[]]
    return heading, [row for row in rows if len(row) == len(heading)]


def note_digest(path: Path) -> None:
    """Write the digest of a file of the cache for :func:`is_sound`."""
    write_whole(path.with_suffix(".sha256"), hashlib.sha256(path.read_bytes()).hexdigest())


def is_sound(path: Path) -> bool:
    """Whether a cached file exists and is undamaged; a damaged one is reported."""
    if not path.exists():
        return False
    note = path.with_suffix(".sha256")
    if not note.exists():  # of an earlier release
        return True
    if note.read_bytes() == hashlib.sha256(path.read_bytes()).hexdigest().encode():
        return True
    logging.getLogger(__name__).warning("%s is damaged and made again.", path)
    return False


def size_text(size: int) -> str:
    """A number of bytes as people read it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def check_file(file: Path, what: str) -> None:
    """Refuse a path that is not a file, with the nearest name in its folder."""
    if file.is_dir():
        deepmd = (
            " It is a data set of DeePMD-kit without arrays of numpy; dpdata makes them: "
            f"dpdata.LabeledSystem({str(file)!r}, fmt='deepmd/raw').to('deepmd/npy', 'data')."
            if (file / "type.raw").exists()
            else ""
        )
        raise DataError(
            f"The {what} {str(file)!r} is a folder; give a file that ASE reads.{deepmd}"
        )
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"The name of the {what} {str(file)!r} is not UTF-8, as options and results are. "
            "Rename it, or set a locale of UTF-8 (LC_ALL=C.UTF-8)."
        ) from None
    if file.is_file():
        return
    folder = file.parent
    if file.is_symlink():
        raise DataError(f"The {what} {str(file)!r} is a link to nothing ({os.readlink(file)!r}).")
    if file.exists():
        raise DataError(
            f"The {what} {str(file)!r} is no regular file (a pipe or a device), and files are read "
            "more than once. Write its content to a file first."
        )
    near = ""
    if folder.is_dir():
        near = did_you_mean(file.name, (entry.name for entry in folder.iterdir()))
    before, at, _ = str(file).rpartition("@")
    if at and Path(before).is_file():
        near = f" Frames are chosen by `indices` next to `read_from: {before}`, not by @."
    elif str(file).startswith("~"):
        near = " ~ is known to the shell only: write the whole path."
    elif any(letter in str(file) for letter in "*?"):
        near = " Patterns are known to the shell only: name each file, as a data set of its own."
    absolute = "" if file.is_absolute() else f" (looked in {folder.resolve()})"
    missing = "" if folder.is_dir() else " The folder does not exist either."
    raise DataError(f"The {what} {str(file)!r} does not exist{absolute}.{missing}{near}")
