"""Frames and frame numbers from files; every failure says what to look at.

ASE reads; what it takes for something else, leaves out or invents is seen to here and in the
modules beside: :mod:`.text`, :mod:`.formats`, :mod:`.extxyz`, :mod:`.symbols`, :mod:`.outputs`,
:mod:`.corrections`.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype, ioformats
from ase.io.runner.runneratoms import Units

from pet_finetune.errors import DataError, did_you_mean
from pet_finetune.files import check_file
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .ase_databases import is_database, is_lmdb, rows_of
from .corrections import clean_outcar, put_frames_right, put_right
from .extxyz import read_extxyz
from .formats import OF_ANY_UNITS, check_complete, check_ends, check_frames, format_of
from .metatrain_sets import Folder, identity_of_set, is_metatrain_set, read_metatrain_set
from .outputs import doubtful_frames, hint_of, settings_of
from .own_formats import is_deepmd, own_kind, read_deepmd, read_own
from .packing import packed
from .symbols import (
    LAMMPS,
    NAMING,
    UNUSED_TYPES,
    as_types,
    lammps_units,
    looks_like_lammps_data,
    with_elements,
    with_named_elements,
    with_type_numbers,
)
from .text import (
    Content,
    arrays_of,
    is_binary,
    load_bytes,
    named,
    to_text,
    unpacked,
    unpacked_name,
    what_else,
)

_logger = get_logger(__name__)

# Files that were read stay in memory up to so many frames and atoms, so that a look at the names of
# labels and the reading of them is one parse.
_KEPT_FRAMES, _KEPT_ATOMS = 50_000, 2_000_000
#: Words that a text needs, of formats that ASE tells by endings: .out, .log, .dat, .md.
_WORDS = {
    "castep-md": "<-- R",
    "espresso-out": "PWSCF",
    "gamess-us-punch": r"\$DATA",
    "gaussian-out": "Gaussian|SCF Done|GINC",
}
#: A name of ours: RuNNer's files in the units of the options.
_N2P2 = "n2p2"


@dataclass(frozen=True, eq=False)
class FrameFile:
    """The frames of one file. They are shared by all who read it: copy before changing one.

    Attributes:
        frames: as ASE keeps them; a list, or a :class:`~.metatrain_sets.Folder` on disk.
        doubtful: frames whose labels are no converged results of the calculation, and why.
        converted: ASE's name of the format whose numbers it converted to eV and Å; else empty.
        settings: of the calculation, that change its energies.
    """

    frames: Sequence[Atoms]
    doubtful: Mapping[int, str] = field(default_factory=dict)
    converted: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


_read: OrderedDict[tuple[Any, ...], FrameFile] = OrderedDict()


def read_frames(
    path: str | Path, format: str = "", types: Mapping[int, str] | None = None
) -> Sequence[Atoms]:
    """The structures of a file; see :func:`read_file`."""
    return read_file(path, format, types).frames


def read_file(
    path: str | Path, format: str = "", types: Mapping[int, str] | None = None
) -> FrameFile:
    """Read all structures of a file with ASE, and what is known of their labels.

    A file that was read already and has not changed is not parsed again.

    Args:
        path: the file, also compressed (.gz, .bz2, .xz); or a data set of metatrain's own, a folder
            of arrays or a zip, or a folder of DeePMD-kit.
        format: ASE's name of the format; guessed from name and content where empty.
        types: elements by type of atom, for LAMMPS files that do not say them.

    Raises:
        DataError: the file is missing, a folder, of a format ASE does not know, damaged, empty,
            or would be read as something else than is meant.
    """
    file = Path(path)
    if is_metatrain_set(file) or is_database(file) or is_deepmd(file):
        key: tuple[Any, ...] = (str(path), identity_of_set(file))
        if key not in _read and (frames := _read_set(file)) is not None:
            _keep(key, FrameFile(frames))
        if key in _read:
            _read.move_to_end(key)
            return _read[key]
    check_file(file, "data file")
    data = load_bytes(file)
    elements = as_types(types or {})
    key = (str(path), format, tuple(sorted(elements.items())), hashlib.blake2b(data).digest())
    if key not in _read:
        _keep(key, _parse(Content(file, str(path), unpacked(data, file)), format, elements))
    _read.move_to_end(key)
    return _read[key]


def _read_set(file: Path) -> Sequence[Atoms] | None:
    """A set of metatrain's, or a large database; a small SQLite is read as other files are."""
    if is_deepmd(file):
        return read_deepmd(file)
    large = packed(file)
    if large is not None or is_metatrain_set(file):
        return read_metatrain_set(file) if large is None else large
    return [atoms for _, atoms in rows_of(file)] if is_lmdb(file) else None


def forget_files() -> None:
    """Give the memory of files that were read back: nothing reads them again soon."""
    _read.clear()


def _keep(key: tuple[Any, ...], content: FrameFile) -> None:
    """Cache a file, and drop the oldest ones."""
    _read[key] = content
    while len(_read) > 1:
        kept = [one.frames for one in _read.values() if not isinstance(one.frames, Folder)]
        frames = [len(one) for one in kept]
        atoms = sum(len(atoms) for one in kept for atoms in one)
        if sum(frames) <= _KEPT_FRAMES and atoms <= _KEPT_ATOMS:
            return
        _read.popitem(last=False)


def _parse(content: Content, format: str, types: Mapping[int, str]) -> FrameFile:
    """Read the content of a file that is there."""
    source, data = content.source, content.data
    if not data.strip():
        raise DataError(f"{source} is empty: it holds no structures.")
    content = replace(content, text="" if is_binary(data) else to_text(data, source))
    is_set = is_metatrain_set(content.file) or content.file.suffix == ".npz"
    other = "" if is_set else what_else(content)
    if other:
        raise DataError(f"{source} {other}.")
    kind = _named_format(format, source) if format else _guess(content)
    text = clean_outcar(content.text, source) if kind == "vasp-out" else content.text
    content = replace(content, kind=kind, text=text)
    check_ends(content)
    options = lammps_units(content) if kind in LAMMPS else {}
    as_they_stand = kind in OF_ANY_UNITS or (kind in LAMMPS and not options)
    with Watch(f"reading {source}", "frames") as watch:
        try:
            frames = list(_frames(content, types, watch, options))
        except DataError:
            raise
        except Exception as error:  # ASE's many readers raise whatever they meet
            raise _unreadable(error, content, bool(format)) from error
    if not frames:
        raise DataError(f"{source} holds no structures ASE can find.{hint_of(text, kind)}")
    if kind in LAMMPS:
        with_elements(content, frames, types)
    elif types and kind not in ("extxyz", "mlip", "xyz"):
        _logger.warning("%s: %s", source, UNUSED_TYPES)
    if kind in NAMING:
        with_named_elements(content, frames)
    check_complete(content, len(frames))
    check_frames(content, frames)
    put_frames_right(content, frames)
    doubtful = doubtful_frames(kind, text, frames)
    return FrameFile(frames, doubtful, "" if as_they_stand else kind, settings_of(kind, text))


def _named_format(format: str, source: str) -> str:
    """ASE's name of the format that the user gave."""
    if format in (*ioformats, _N2P2):
        return format
    if f"{format}-text" in ioformats:
        return f"{format}-text"
    raise DataError(
        f"format: ASE knows no {format!r}, with which {source} is to be read."
        f"{did_you_mean(format, ioformats)} `ase info --formats` lists them."
    )


def _guess(content: Content) -> str:
    """ASE's name of the format, from the name and the content of a file."""
    source, text = content.source, content.text
    if own := own_kind(content):
        return own
    if looks_like_lammps_data(text):
        return "lammps-data"
    head = text[:50_000].encode() if text else content.data[:50_000]
    try:
        kind: str = filetype(named(io.BytesIO(head), content.name))
    except UnknownFileTypeError:
        kind = ""
    if kind == "abinit-in" and re.search(r"^\.Version .* of ABINIT", text, re.M):
        kind = "abinit-out"  # whose echo of the input ASE takes for one
    if kind in ioformats and re.search(_WORDS.get(kind, ""), text):
        return kind
    arrays = arrays_of(content)
    if arrays:
        raise DataError(
            f"{source} holds {arrays}, and nothing says which of it is what. Write the structures "
            "as extended xyz; docs/finetuning.md names the arrays of a numpy .npz that are read."
        )
    raise DataError(
        f"ASE cannot read {source}: neither name nor content says which format it is. Say it: "
        "`format: ...` next to `read_from` of the systems, or --format on the command line (`ase "
        "info --formats` lists the names). Extended xyz (.xyz, .extxyz) always works; dpdata makes "
        "it of outputs that ASE does not know (ABACUS, SIESTA, OpenMX, PWmat...)."
    )


def _unreadable(error: Exception, content: Content, given: bool) -> DataError:
    kind, source, text = content.kind, content.source, content.text
    if isinstance(error, ModuleNotFoundError):
        return DataError(
            f"{source} is of the format {kind!r}, which ASE reads with the package {error.name}. "
            f"Install it (pip install {error.name}), or convert the file to extended xyz."
        )
    reason = str(error).strip() or "no reason given"
    how = "as the options say" if given else "guessed from name and content; `format` names it"
    more = format_of(kind).advice
    if kind == "lammps-dump-text" and "ITEM: BOX BOUNDS\n" not in text:
        more = ""
    elif kind == "cif" and "Spacegroup" in type(error).__name__:
        more = (
            " ASE needs the name of the space group beside its operations: add the line "
            "_symmetry_space_group_name_H-M 'P -1' with the right one, or write all atoms as P 1."
        )
    return DataError(
        f"ASE cannot read {source} ({type(error).__name__}: {reason}).{hint_of(text, kind)} It "
        f"was taken for the format {kind!r} ({how}).{more} Extended xyz (.xyz, .extxyz) always "
        "works."
    )


def _frames(
    content: Content, types: Mapping[int, str], watch: Watch, options: dict[str, Any]
) -> Iterator[Atoms]:
    """The frames of a file, as its format is read with these options of ASE's."""
    kind, source, text = content.kind, content.source, put_right(content)
    if kind in ("extxyz", "xyz"):
        yield from read_extxyz(text, source, types, plain=kind == "xyz", step=watch.step)
        return
    if kind in ("cp2k", "ml-ab", "mlip", "npz"):
        for atoms in read_own(content, types):
            watch.step()
            yield atoms
        return
    if kind == _N2P2:
        kind = "runnerdata"
        options["output_units"] = Units.ATOMIC  # as which ASE takes what it reads
    elif kind == "runnerdata":
        _logger.warning(
            "%s states no units: it is read as RuNNer's, in Bohr and Hartree. If it is one of "
            "n2p2 in others, `format: n2p2` next to `read_from` (--format n2p2) takes the numbers "
            "as they stand, in the units of the options.",
            source,
        )
    elif kind == "cif":
        options["fractional_occupancies"] = True
    elif kind == "aims-output":
        options["non_convergence_ok"] = True  # it is looked for here
    elif kind == "lammps-data":
        text = with_type_numbers(text)
    for part in _records(kind, text) if text else (content.data,):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for atoms in _with_ase(kind, content, part, options):
                watch.step()
                yield atoms


def _with_ase(
    kind: str, content: Content, part: str | bytes, options: Mapping[str, Any]
) -> Iterator[Atoms]:
    """Frames that ASE finds in a piece of a file."""
    form, file, data = ioformats[kind], content.file, content.data
    if form.acceptsfd and kind != "json":
        stream: io.BytesIO | io.StringIO
        if form.isbinary:
            stream = io.BytesIO(part if isinstance(part, bytes) else part.encode())
        else:
            stream = io.StringIO(part if isinstance(part, str) else part.decode("latin-1"))
        yield from ase.io.iread(named(stream, content.name), ":", format=kind, **options)
        return
    as_it_is = isinstance(part, bytes) or part.encode(errors="ignore") == data
    if as_it_is and unpacked_name(file) == file.name and file.stat().st_size == len(data):
        yield from _from_path(kind, file, options)
        return
    with tempfile.TemporaryDirectory() as folder:  # unpacked, or with plain text
        copy = Path(folder) / unpacked_name(file)
        copy.write_bytes(part if isinstance(part, bytes) else part.encode())
        yield from _from_path(kind, copy, options)


def _from_path(kind: str, file: Path, options: Mapping[str, Any]) -> Iterator[Atoms]:
    """Frames of a format that ASE reads by the name of the file only."""
    if kind in ("db", "json"):
        yield from (atoms for _, atoms in rows_of(file, kind=kind))
        return
    yield from ase.io.iread(str(file), ":", format=kind, do_not_split_by_at_sign=True, **options)


def _records(kind: str, text: str) -> Iterator[str]:
    """The structures of a file one by one, where ASE reads only the first."""
    if kind == "sdf":
        parts = re.split(r"^\$\$\$\$[^\n]*\n?", text, flags=re.M)
        yield from (part for part in parts if part.strip())
    elif kind == "gromacs":
        lines = text.split("\n")
        line = 0
        while line + 1 < len(lines) and lines[line + 1].strip().isdecimal():
            end = line + 3 + int(lines[line + 1])
            yield "\n".join([*lines[line:end], ""])
            line = end
    elif kind == "vasp":
        lines = text.split("\n")
        starts = [0, *(k for k in range(8, len(lines) - 5) if _begins_poscar(lines, k))]
        for begin, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield "\n".join([*lines[begin:end], ""])
    else:
        yield text


def _begins_poscar(lines: list[str], line: int) -> bool:
    """Whether another POSCAR begins: after its comment a scale and three vectors."""
    words = [row.split() for row in lines[line + 1 : line + 5]]
    if [len(row) for row in words] != [1, 3, 3, 3]:
        return False
    try:
        for row in words:
            list(map(float, row))
    except ValueError:
        return False
    return True
