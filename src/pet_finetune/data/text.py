"""The content of a data file: unpacked, decoded, with plain line ends; columns, cells in words."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

Stream = TypeVar("Stream", bound=io.StringIO | io.BytesIO)

_logger = get_logger(__name__)

_PACKED = (".gz", ".bz2", ".xz")
#: What packed files begin with.
_UNPACK: Mapping[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
}
#: The same of what is not unpacked here, and what it is.
_ARCHIVES = (
    (b"\x28\xb5\x2f\xfd", 0, "is packed by Zstandard; unpack it first: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", 0, "is an archive of 7-Zip; unpack it first: 7z x"),
    (b"Rar!", 0, "is a RAR archive; unpack it first: unrar x"),
    (b"\x04\x22\x4d\x18", 0, "is packed by LZ4; unpack it first: unlz4"),
    (b"PK\x03\x04", 0, "is a zip archive; unpack it first: unzip"),
    (b"ustar", 257, "is a tar archive; unpack it first: tar -xf"),
)
#: What stands in place of data that never came, and what to do.
_NO_DATA = (
    (
        re.compile(r"version https://git-lfs"),
        "is a pointer of Git LFS, not the data itself: fetch it with `git lfs pull`",
    ),
    (
        re.compile(r"\s*(?!\{\s*\"\d+\":)[\[{][\s\S]{,20000}?\"@module\":\s*\"(?:pymatgen|emmet)"),
        "is JSON of pymatgen (as MPtrj's and MatPES's): write its structures with "
        "`.to_ase_atoms()` and ase.io.write to extended xyz, with energies and forces; stresses "
        "are there in kbar with VASP's sign: times -0.1 ase.units.GPa",
    ),
    (
        re.compile(r"(?i)\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype )?html"),
        "is a web page, not data: an error or a login was saved under its name. Download it again",
    ),
)
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BOX = r"(?:lattice|unit[-_ ]?cell|super[-_ ]?cell|cell|simulation[-_ ]?box|box)"
#: Three numbers or more of a cell that stands in a text in words, not as Lattice="...".
CELL_WORDS = re.compile(
    rf"(?i)(?<![a-z])(?:{_BOX}|pbc[-_ ]?box|cryst1|celldm|h[-_ ]?matrix|abc|dimensions?"
    r"|vec(?:tor)?s?[-_ ]?[1a]|tv)(?:[-_ ]?(?:vectors?|par\w*|sizes?|lengths?|matrix|dim\w*|abc))?"
    rf"(?![a-z])[^\d.+-]{{0,16}}{_NUMBER}(?:[\s,;\"'\]\[)(x]+{_NUMBER}){{2,}}"
)
#: More ways to write one: named lengths, flags of periodicity with lengths, one length of a cube.
_CELLS = (
    CELL_WORDS,
    re.compile(
        r"[^\d\n]{1,12}".join(
            rf"(?<![A-Za-z])(?:{names})\s*[=:]\s*{_NUMBER}"
            for names in (
                "L?a|[Ll]_?x|(?:[Cc]ell|[Bb]ox)_?[ax]",
                "L?b|[Ll]_?y|(?:[Cc]ell|[Bb]ox)_?[by]",
                "L?c|[Ll]_?z|(?:[Cc]ell|[Bb]ox)_?[cz]",
            )
        )
    ),
    re.compile(
        rf"(?i)(?<![a-z])(?:pbc|periodic)(?![a-z])[^\d.+-]{{0,8}}"
        rf"(?=\d{{2}}|\d\.){_NUMBER}(?:[\s,]+{_NUMBER}){{2,}}"
    ),
    re.compile(
        rf"(?i)(?<![a-z])(?:{_BOX}[-_ ]?(?:sizes?|lengths?|sides?|edges?|constant|parameters?|l)"
        rf"|alat|celldm(?:\(1\))?)(?![a-z])[^\d.+-]{{0,8}}{_NUMBER}"
    ),
    re.compile(
        rf"(?i)(?<![a-z]){_BOX}[^\d.+-]{{1,4}}{_NUMBER}\s*(?:(?-i:A|Å)|ang|angstroms?|nm|bohr)(?![a-z])"
    ),
)
_EXPONENT = str.maketrans("dD", "ee")  # as Fortran writes it


@dataclass(frozen=True)
class Content:
    """Content of a data file.

    Attributes:
        file: where it is.
        source: what messages call it.
        data: the whole of it, unpacked.
        text: the same as text; empty where it is binary.
        kind: ASE's name of the format; empty until it is known.
    """

    file: Path
    source: str
    data: bytes = b""
    text: str = ""
    kind: str = ""

    @property
    def name(self) -> str:
        """The path, less the ending of a compression: from it ASE tells formats."""
        return str(self.file.with_name(unpacked_name(self.file)))


def named(stream: Stream, name: str) -> Stream:
    """Text or bytes in memory under the name of their file, which some of ASE's readers ask for."""
    stream.name = name
    return stream


def unpacked_name(file: Path) -> str:
    """The name of a file without the ending of its compression."""
    return file.stem if file.suffix.lower() in _PACKED else file.name


def what_else(content: Content) -> str:
    """Kind of a file without data and what to do, as the end of a sentence; else empty."""
    data = content.data
    if data.startswith(b"PK\x03\x04") and re.search(rb"keys\.npy|blocks/", data[:4096]):
        return (
            "holds values of metatensor (.mts) without structures: write both as extended xyz, or "
            "as metatrain's zip or memory-mapped folder, which are read"
        )
    if data.startswith(b"PK") and b"/data.pkl" in data:  # as torch writes it
        return "is a checkpoint or an exported model, and structures are needed here"
    for mark, place, words in _ARCHIVES:
        if data[place : place + len(mark)] == mark:
            return f"{words} FILE, then give what is in it"
    for pattern, words in _NO_DATA:
        if pattern.match(content.text):
            return words
    return ""


def load_bytes(file: Path) -> bytes:
    """The whole content of a file, as it is.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read '{file}': {error.strerror}.") from error


def unpacked(data: bytes, file: Path) -> bytes:
    """The content of a file, unpacked in one go where it is compressed, whatever its name.

    ASE seeks in compressed files, and every step back unpacks from the start: hours for what
    takes a second.

    Raises:
        DataError: it cannot be unpacked.
    """
    unpack = next((how for mark, how in _UNPACK.items() if data.startswith(mark)), None)
    if unpack is None:
        return data  # also under a name that ends with .gz: browsers unpack what they download
    try:
        return unpack(data)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be unpacked ({error}): it is damaged or cut off. Copy it again, or "
            "unpack it yourself to see what is left."
        ) from error


def is_binary(data: bytes) -> bool:
    """Whether the content is not text in any supported encoding."""
    if any(data.startswith(mark) for mark, _ in _MARKS):
        return False
    return b"\0" in data[:8192]


def to_text(data: bytes, source: str) -> str:
    """Text of any usual encoding, without a byte-order mark, with plain line ends.

    What is not UTF-8 and has no mark is Latin-1, in which every byte has a meaning; elements,
    numbers and names of labels are the same in both.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        _logger.info("%s is not UTF-8; it is read as Latin-1", source)
    if "\r" in text:
        text = text.replace("\r\r\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
    return text


def arrays_of(content: Content) -> str:
    """Description of a file of unnamed numbers; else empty."""
    data, ending = content.data, content.file.suffix.lower()
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "tables of HDF5"
    if data.startswith(b"\x93NUMPY"):
        return "an array of numpy"
    if ending == ".npz":
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                shown = ", ".join(map(str, arrays.files[:12]))
        except (ValueError, OSError, zipfile.BadZipFile):
            return "arrays of numpy, and is damaged or cut off"
        return f"arrays of numpy ({shown})"
    if ending in (".pkl", ".pickle", ".pt", ".pth"):
        return "objects of Python (a pickle, which can run code and is not opened)"
    return ""


def cell_in_words(comment: str) -> str:
    """Text in a comment that seems to be a cell, named or as bare numbers; else empty.

    ``Lattice="..."``, which is read, is not looked for.
    """
    for pattern in _CELLS:
        found = pattern.search(comment)
        if found is not None:
            return found[0].strip()
    return comment.strip() if _is_bare_cell(comment) else ""


def _is_bare_cell(comment: str) -> bool:
    """Whether a comment of numbers only is a cell: lengths, lengths and angles, or vectors."""
    words = comment.strip().strip("#").replace(",", " ").split()
    values = np.array([as_number(word) for word in words])
    if len(words) not in (3, 6, 9) or not np.isfinite(values).all():
        return False
    if len(words) == 9:
        return bool(np.linalg.det(values.reshape(3, 3)) > 8.0)
    lengths = bool((values[:3] > 2.0).all())
    return lengths and (len(words) == 3 or bool(((values[3:] > 20) & (values[3:] < 160)).all()))


def as_number(word: str) -> float:
    """Number in a word, Fortran exponents included; NaN if it is not a number."""
    try:
        return float(word.translate(_EXPONENT))
    except ValueError:
        return float("nan")


_DEFAULT = "species:S:1:pos:R:3"
_PROPERTIES = re.compile(r"""Properties\s*=\s*["']?([^\s"']+)""")
#: Names under which programs write elements beside ``species``.
_ELEMENTS = frozenset(
    {"z", "numbers", "atomic_number", "atomic_numbers", "element", "elements", "symbol", "symbols"}
)


@dataclass(frozen=True)
class SymbolLayout:
    """The columns of a frame of extended XYZ."""

    #: How messages call them.
    names: str
    #: One letter a column: R, I, S or L.
    kinds: str
    #: The column with the symbol of the element; None where only atomic numbers or nothing say it.
    species: int | None
    #: Other columns that name it, by name.
    others: Mapping[str, int]
    #: Whether there are positions; ASE puts all atoms at the origin without them.
    placed: bool

    NOWHERE: ClassVar = (
        "no column is named pos, so that all atoms would be at the origin ({}). Name that of the "
        "positions pos:R:3; multiply fractional coordinates by the cell first"
    )

    @property
    def width(self) -> int:
        """The number of columns."""
        return len(self.kinds)

    @property
    def numbered(self) -> bool:
        """Whether there are atomic numbers that ASE reads in place of symbols."""
        return any(name in ("Z", "numbers") for name in self.others)

    @staticmethod
    def of(comment: str) -> SymbolLayout:
        """The columns that a comment names; element and position without it."""
        found = _PROPERTIES.search(comment)
        words = (found[1] if found else _DEFAULT).split(":")
        kinds, species, others, placed = "", None, {}, False
        for name, kind, count in zip(words[::3], words[1::3], words[2::3], strict=False):
            placed |= name in ("pos", "positions")
            if name == "species" and kind == "S":
                species = len(kinds)
            elif name.lower() in _ELEMENTS and count == "1":
                others[name] = len(kinds)
            kinds += kind[:1] * (int(count) if count.isdecimal() else 0)
        return SymbolLayout(":".join(words), kinds, species, others, placed)
