"""Frames as a memory-mapped folder takes them, prepared block by block, by several processes.

The blocks come back in their order, whichever process prepared them, so that what is written does
not depend on how many there are.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from pet_finetune.processes import num_cores
from pet_finetune.units import is_statement

from .ase_databases import row_numbers, rows_of
from .extxyz import read_extxyz
from .metatrain_sets import Folder
from .structure import check_geometry, place
from .symbols import as_types
from .text import to_text

#: Bytes of text of a block, and frames of others.
_TEXT = 1 << 20
_TOGETHER = 500
#: So many blocks pay for the start of a process; of more processes some wait for the one that
#: writes, which takes a sixth of their time for a frame.
_PAYS, _MOST = 8, 8
#: Names that metatrain keeps for other things.
_KEPT = frozenset({"x", "a", "c", "ns", "na", "numbers", "positions"})
#: Results of calculators that are of atoms.
_OF_ATOMS = frozenset({"forces", "energies", "stresses", "charges", "magmoms"})


class Block(NamedTuple):
    """Frames that one process prepares.

    Attributes:
        first: how many frames there are before them.
        read: gives them, each with the position behind it, in any process.
        notes: filled by ``read`` with how many frames have a peculiarity.
    """

    first: int
    read: Callable[[], Iterable[tuple[int, Atoms]]]
    notes: Counter[str]


@dataclass(frozen=True)
class FrameSource:
    """Where frames come from.

    Attributes:
        name: of the file, for messages.
        blocks: gives them from a position on, before which there is a number of frames.
        total: how many frames, or millions of bytes, there are.
        in_bytes: whether positions are bytes of a text.
        num_blocks: about how many blocks are worth a process of their own.
    """

    name: str
    blocks: Callable[[int, int], Iterator[Block]]
    total: int
    in_bytes: bool = False
    num_blocks: int = 0

    def workers(self, asked: int | None) -> int:
        """Number of processes: as asked for, or as many as pay on this machine."""
        most = min(num_cores(), _MOST, self.num_blocks // _PAYS)
        return most if asked is None else asked


def streamed(
    name: str, frames: Callable[[int], Iterator[tuple[int, Atoms]]], total: int
) -> FrameSource:
    """Source of frames that one process reads; ``frames`` gives them from a position on."""

    def blocks(position: int, done: int) -> Iterator[Block]:
        rest = frames(position)
        while some := list(islice(rest, _TOGETHER)):
            yield Block(done, partial(list, some), Counter())
            done += len(some)

    return FrameSource(name, blocks, total)


def rows(path: Path) -> FrameSource:
    """Source of the frames of a database."""
    numbers = row_numbers(path)

    def blocks(position: int, done: int) -> Iterator[Block]:
        for first in range(done, len(numbers), _TOGETHER):
            last = numbers[min(first + _TOGETHER, len(numbers)) - 1]
            yield Block(first, partial(rows_of, path, position, last=last), Counter())
            position = last

    return FrameSource(str(path), blocks, len(numbers), num_blocks=len(numbers) // _TOGETHER)


def stored(path: Path) -> FrameSource:
    """Source of the frames of metatrain's folder."""
    count, each = len(Folder(path)), 10 * _TOGETHER  # a folder takes a while to open

    def blocks(position: int, done: int) -> Iterator[Block]:
        for first in range(position, count, each):
            yield Block(first, partial(_stored, path, first, min(first + each, count)), Counter())

    return FrameSource(str(path), blocks, count, num_blocks=count // _TOGETHER)


def _stored(path: Path, first: int, last: int) -> Iterator[tuple[int, Atoms]]:
    """Some frames of a folder, each with the number of the next."""
    folder = Folder(path)
    for number in range(first, last):
        yield number + 1, folder[number]


def xyz(path: Path, types: Mapping[int, str], plain: bool) -> FrameSource:
    """Source of the frames of extended xyz; see :func:`.read_extxyz`."""
    size, read = path.stat().st_size, partial(read_extxyz, types=as_types(types), plain=plain)
    blocks = partial(_xyz_blocks, path, read)
    return FrameSource(str(path), blocks, size // 10**6, True, size // _TEXT)


def _xyz_blocks(
    file: Path, read: Callable[..., list[Atoms]], begin: int, frame: int
) -> Iterator[Block]:
    """Blocks of the frames of extended xyz from a byte and a number on."""
    with file.open("rb") as stream:
        line = 0
        if begin:  # what was read before counts in messages
            for piece in iter(lambda: stream.read(min(_TEXT, begin - stream.tell())), b""):
                line += piece.count(b"\n")
        while True:
            start = stream.tell()
            raw, ends = _whole_frames(stream)
            if not raw.strip():
                return
            notes = Counter[str]()
            counted = partial(read, before=(frame, line), notes=notes)
            yield Block(frame, partial(_xyz, file, start, len(raw), ends, counted), notes)
            line += raw.count(b"\n")
            frame += len(ends)


def _xyz(
    file: Path, start: int, size: int, ends: list[int], read: Callable[[str, str], list[Atoms]]
) -> Iterator[tuple[int, Atoms]]:
    """The frames of a piece of extended xyz, each with the byte behind it."""
    with file.open("rb") as stream:
        stream.seek(start)
        frames = read(to_text(stream.read(size), str(file)), str(file))
    for number, atoms in enumerate(frames):
        yield start + (ends[number] if number < len(ends) else size), atoms


def _whole_frames(stream: io.BufferedReader) -> tuple[bytes, list[int]]:
    """Lines of as many whole frames as make up some megabytes, and where each frame ends.

    Where lines are no frames, all that is left is given, and reading it says what is wrong.
    """
    lines: list[bytes] = []
    ends: list[int] = []
    size = 0
    while size < _TEXT:
        head = stream.readline()
        if not head:
            break
        lines.append(head)
        size += len(head)
        if not head.strip():
            continue
        if not head.strip().isdigit():
            lines.append(stream.read())
            break
        body = list(islice(stream, int(head) + 1))
        lines += body
        size += sum(map(len, body))
        place = stream.tell()
        while (more := stream.readline()).lstrip()[:3] == b"VEC":
            lines.append(more)
            size += len(more)
            place = stream.tell()
        stream.seek(place)
        ends.append(size)
    return b"".join(lines), ends


@dataclass
class Frame:
    """A structure as it is written.

    Attributes:
        end: the position behind it.
        size: number of atoms.
        geometry: bytes of positions, numbers and cell.
        labels: numbers by name, and whether they are of atoms.
        units: what it states of units.
        texts: the beginning of what is text, by name.
        pairs: bytes of the neighbour list, if there is one; see :class:`~.metatrain_sets.Folder`.
    """

    end: int
    size: int
    geometry: tuple[bytes, bytes, bytes]
    labels: dict[str, tuple[np.ndarray, bool]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    pairs: bytes = b""


def prepared(
    source: str, names: Collection[str] | None, cutoff: float | None, block: Block
) -> tuple[list[Frame], Counter[str]]:
    """The frames of a block, read and checked, and its notes.

    Args:
        source: of the frames, for messages.
        names: of the labels that are kept; None for all.
        cutoff: of a neighbour list, in the unit of the positions; None for no list.
        block: what is read.

    Raises:
        DataError: a frame cannot be read, or its geometry is none.
    """
    frames = []
    for number, (end, atoms) in enumerate(block.read(), block.first):
        pbc = np.array(atoms.pbc, dtype=bool)
        cell = np.where(pbc[:, None], np.asarray(atoms.cell, dtype=np.float64), 0.0)
        where = place(number, source)
        check_geometry(atoms.numbers, atoms.positions, cell, pbc, where)
        arrays = (atoms.positions.astype("<f4"), atoms.numbers.astype("<i4"), cell.astype("<f4"))
        x, a, c = (array.tobytes() for array in arrays)
        frames.append(Frame(end, len(atoms), (x, a, c)))
        _add_labels(frames[-1], atoms, names)
        if cutoff is not None:
            frames[-1].pairs = _pairs(arrays[0], arrays[2], pbc, cutoff, where)
    return frames, block.notes


def _pairs(x: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float, where: str) -> bytes:
    """The neighbour list of what is written, which has 32 bits."""
    import torch  # which frames without a list are read without

    from .neighbors import neighbor_list

    position, box = (torch.from_numpy(array.astype(np.float64)) for array in (x, cell))
    found = neighbor_list(position, box, torch.from_numpy(pbc), cutoff, where)
    columns = torch.stack([found.centers, found.neighbors, found.reverse], dim=1)
    return torch.cat([columns, found.shifts], dim=1).numpy().astype("<i4").tobytes()


def _add_labels(frame: Frame, atoms: Atoms, names: Collection[str] | None) -> None:
    """Take the numbers of a frame by name, and the texts."""
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
                frame.units.setdefault(name, value)
                continue
            kept = name not in _KEPT and "/" not in name and not name.startswith(".")
            if not kept or value is None or (names is not None and name not in names):
                continue
            if isinstance(value, str):
                frame.texts.setdefault(name, value[:20])
            elif name not in frame.labels:
                array = np.asarray(value)
                if array.dtype.kind in "iufb" and array.size:
                    shaped = _shaped(name, array.astype(np.float64))
                    frame.labels[name] = shaped, is_of_atoms(name)


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
