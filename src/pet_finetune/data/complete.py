"""Whether a file was read whole: what it claims to hold against what was found in it."""

from __future__ import annotations

import re

import numpy as np

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

__all__ = ["check_complete"]

_logger = get_logger(__name__)

#: Lines that begin a frame, by format: as many frames are in the file.
_BEGINNINGS = {
    "vasp-out": re.compile(r"FREE ENERGIE OF THE ION-ELECTRON SYSTEM"),
    "vasp-xdatcar": re.compile(r"^\s*Direct configuration\s*=", re.M),
    "lammps-dump-text": re.compile(r"^ITEM: TIMESTEP", re.M),
    "proteindatabank": re.compile(r"^MODEL\b", re.M),
    "cif": re.compile(r"^\s*_atom_site_(?:label|type_symbol)\s*$(?:(?!^\s*data_)[\s\S])*", re.M),
    "vasp-xml": re.compile(r"<calculation>"),
}
_IONIC_STEP = re.compile(r"Iteration +(\d+)\( *\d+\)")


def check_complete(kind: str, data: bytes, text: str, count: int, source: str) -> None:
    """Refuse files of which less was read than they hold.

    Args:
        kind: ASE's name of the format.
        data: the file, unpacked.
        text: the same as text; empty where it is none.
        count: how many frames were read.
        source: the file, for messages.

    Raises:
        DataError: frames or bytes are missing.
    """
    if kind == "traj" and data.startswith(b"- of Ulm"):
        _check_ulm(data, source)
    elif kind == "db" and data.startswith(b"SQLite format 3\0"):
        _check_sqlite(data, source)
    elif kind == "vasp-xdatcar":
        _check_last_line(text, source)
    beginning = _BEGINNINGS.get(kind)
    expected = len(beginning.findall(text)) if beginning is not None else 0
    if expected > count:
        raise DataError(
            f"{source} holds {expected} frames, and ASE reads {count} of them. The file is "
            f"damaged or cut off after frame {count - 1}. Remove what is incomplete, or "
            "convert it to extended xyz."
        )
    if kind == "vasp-out" and beginning is not None:
        # By place, not by number: numbers jump where machine-learned steps were left out.
        done = max((mark.end() for mark in beginning.finditer(text)), default=0)
        begun = _IONIC_STEP.search(text, done)
        if begun is not None:
            _logger.warning(
                "%s ends within ionic step %s, which has no energy yet: it is left out",
                source,
                begun[1],
            )


def _check_ulm(data: bytes, source: str) -> None:
    """The head of a .traj says how many items there are, and a table where each begins."""
    if len(data) < 48:
        raise _cut(source, f"it has {len(data)} bytes, less than the head of a trajectory")
    items, table = np.frombuffer(data, "<i8", 2, 32).tolist()
    if table < 0 or items < 0 or table + 8 * items > len(data):
        raise _cut(source, f"its table of {items} frames lies beyond the end of the file")
    end = table + 8 * items
    for number, place in enumerate(np.frombuffer(data, "<i8", items, table).tolist()):
        if not 0 <= place <= len(data) - 8:
            raise _cut(source, f"frame {number} of {items} lies beyond the end of the file")
        size = int(np.frombuffer(data, "<i8", 1, place)[0])
        end = max(end, place + 8 + size)
        if size < 0 or end > len(data):
            raise _cut(source, f"frame {number} of {items} ends beyond the end of the file")
    if data[end:].strip(b"\0"):  # what was written before a run was stopped; the table ends in 0
        raise _cut(source, f"{len(data) - end} bytes stand behind the last of {items} frames")


def _check_sqlite(data: bytes, source: str) -> None:
    """The head of a SQLite file says how many pages there are, and their size."""
    size = int.from_bytes(data[16:18], "big")
    size = 65536 if size == 1 else size
    pages = int.from_bytes(data[28:32], "big")
    if pages * size > len(data) and data[24:28] == data[92:96]:  # else the count is out of date
        raise _cut(source, f"it has {len(data)} bytes of the {pages * size} that it says")


def _check_last_line(text: str, source: str) -> None:
    """In tables of fixed width a last line without its end may be half a number."""
    lines = text.splitlines()
    if text and not text.endswith("\n") and len(lines) > 1:
        last, before = lines[-1].rstrip(), lines[-2].rstrip()
        if last and len(last) < len(before):
            raise _cut(source, f"its last line is shorter than the one before: {last!r}")


def _cut(source: str, what: str) -> DataError:
    return DataError(
        f"{source} is damaged or cut off: {what}. Copy it again, or write its whole frames to "
        "extended xyz."
    )
