"""Extended XYZ, frame by frame: all that the text holds is read, or the line is named.

ASE stops without a word at the first empty line, ignores columns that ``Properties`` does not
name, and knows one form of a stress. Here the frames are walked by their numbers of atoms, and
each is handed to ASE by itself.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from ase.io.extxyz import key_val_str_to_dict, read_xyz

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

from .outputs import is_cp2k_comment, units_of_ipi, wrong_in_cp2k
from .structure import ASYMMETRIC, ROUNDING, asymmetry
from .symbols import UNUSED_TYPES, element_of, is_dummy
from .text import SymbolLayout, as_number, cell_in_words, named

_logger = get_logger(__name__)

_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d+)?|[-+]?(?i:nan|inf)")
# By the letter of a column in Properties.
_WORDS = {"R": (_FLOAT, "a number"), "I": (re.compile(r"[-+]?\d+"), "a whole number")}
# Values of the keys for which ASE allows nine numbers and nothing else.
_MATRIX = re.compile(
    r"(?<![\w-])(Lattice|stress|virial)\s*=\s*"
    r"(\"[^\"]*\"|'[^']*'|\{[^}]*\}|\[\s*\[.*?\]\s*\]|\[[^\]]*\]|[^\s\"'{\[]\S*)"
)
# Keys that have one meaning, of which ASE takes the last.
_ONCE = re.compile(r"(?<!\S)(Lattice|Properties|pbc|energy|stress|virial)\s*=")
_FORTRAN = re.compile(r"(?<![A-Za-z])(\d*\.?\d+)[dD]([-+]?\d+)(?![A-Za-z])")
_FORTRAN_REAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+)[dD][-+]?\d{1,3}")
# The comment says that the frame is a molecule.
_NO_CELL = re.compile(r"(?i)\bpbc\s*=\s*[\"'\[{]?\s*f\w*[\s,]+f\w*[\s,]+f")
_VECTOR = re.compile(r"\s*VEC[1-3]\s")


def read_extxyz(
    text: str,
    source: str,
    types: Mapping[int, str] | None = None,
    *,
    plain: bool = False,
    step: Callable[[], None] = lambda: None,
    before: tuple[int, int] = (0, 0),
    notes: Counter[str] | None = None,
) -> list[Atoms]:
    """All frames of an XYZ file, plain or extended.

    Empty lines between frames are skipped. Numbers and isotopes stand for their elements, six
    numbers of a stress or virial for a symmetric matrix (xx yy zz yz xz xy).

    Args:
        text: of the file, with plain line ends.
        source: the file, for messages.
        types: elements by number, where the first column holds types of atoms.
        plain: whether the comment is only a comment.
        step: called after each frame.
        before: frames and lines of the file before this text, where it is a part.
        notes: where notices are counted, for :func:`tell`.

    Raises:
        DataError: names frame and line of what cannot be read, or would be read as something
            else than is meant.
    """
    reader = _Reader(text.split("\n"), source, dict(types or {}), plain, text.endswith("\n"))
    reader.frame, reader.before = before
    reader.notes = Counter() if notes is None else notes
    frames = list(reader.frames(step))
    reader.finish(len(frames))
    if notes is None:
        tell(reader.notes, source, len(frames))
    return frames


def tell(notes: Counter[str], source: str, count: int) -> None:
    """Log notices of a file with so many frames."""
    for note, found in notes.items():
        level = logging.WARNING if note.endswith(ASYMMETRIC) else logging.INFO
        _logger.log(level, "%s: %d of %d frames %s", source, found, count, note)


@dataclass
class _Reader:
    """Goes through the lines of one file."""

    lines: list[str]
    source: str
    types: dict[int, str]
    plain: bool
    ended: bool
    notes: Counter[str] = field(default_factory=Counter)
    #: Whole numbers met in place of elements, and whether any real symbol was.
    numeric: set[int] = field(default_factory=set)
    symbolic: bool = False
    #: Whether any of the given types was one of an atom.
    mapped: bool = False
    frame: int = 0
    #: Lines of the file before these.
    before: int = 0
    #: Index of the line with the frame's number of atoms.
    start: int = 0

    @property
    def shown(self) -> int:
        """The line of the file on which the frame begins, as editors count."""
        return self.start + 1 + self.before

    def frames(self, step: Callable[[], None]) -> Iterator[Atoms]:
        """Each frame in turn, and a call after each."""
        line = 0
        while True:
            while line < len(self.lines) and not self.lines[line].strip():
                line += 1
            if line >= len(self.lines):
                return
            count, self.start = self._count(line), line
            end = line + 2 + count
            last = min(len(self.lines), end + 3)
            while end < last and _VECTOR.match(self.lines[end]):
                end += 1
            yield self._read(count, end)
            step()
            self.frame += 1
            line = end

    def finish(self, count: int) -> None:
        """Judge what only the whole text tells."""
        if self.types and not self.mapped:
            _logger.warning("%s: %s", self.source, UNUSED_TYPES)
        if self.numeric and not self.symbolic and not self.types:
            if self.numeric == set(range(1, len(self.numeric) + 1)):
                raise DataError(self._typed(len(self.numeric)))
            self.notes["have atomic numbers in place of symbols; they are taken as such"] = count

    def _count(self, line: int) -> int:
        """The number of atoms that a frame begins with."""
        word = self.lines[line].strip()
        if word.isdecimal():
            return int(word)
        if not self.frame:
            self._fail(line, f"a number of atoms is expected, found {_shown(word)}")
        before = f"frame {self.frame - 1}, which begins on line {self.shown}"
        missing = f"the number of atoms of the next frame is expected, found {_shown(word)}"
        if len(word.split()) >= 4:
            self._fail(line, f"{missing}. This looks like an atom more than {before}, says it has")
        self._fail(line, f"{before}, ends here, and {missing}")

    def _read(self, count: int, end: int) -> Atoms:
        """The frame that begins at ``start``."""
        first = self.start + 2
        rows = self.lines[first : first + count]
        comment = self.lines[self.start + 1] if self.start + 1 < len(self.lines) else ""
        layout = SymbolLayout.of("" if self.plain else comment)
        if len(rows) < count or (rows and end >= len(self.lines) and not rows[-1].strip()):
            there = sum(bool(row.strip()) for row in rows)
            self._cut_off(f"is cut off: it says it has {count} atoms, and {there} are there")
        self._check_columns(rows, layout, first)
        self._cut_in_a_number(rows, end)
        rows, masses = self._with_elements(rows, layout, first, comment)
        vectors = self.lines[first + count : end]
        if not vectors:
            self._refuse_cell(comment)
        lines = [comment, *rows, *vectors]
        try:
            atoms = self._atoms(lines, count)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  ASE raises whatever it meets
            atoms = self._second_try(error, lines, count)
        if not self.frame and is_cp2k_comment(comment) and not atoms.pbc.any():
            wrong = "" if _NO_CELL.search(comment) else wrong_in_cp2k(self.source, atoms)
            if wrong:
                self._fail(self.start + 1, wrong)
            self.notes["are of CP2K, whose E is in Hartree, and taken as molecules in no cell"] = 1
        if wrong := units_of_ipi(comment, atoms):
            self._fail(self.start + 1, wrong)
        for index, mass in masses.items():
            if "masses" not in atoms.arrays:
                atoms.set_masses(atomic_masses[atoms.numbers])
            atoms.arrays["masses"][index] = mass
        return atoms

    def _check_columns(self, rows: list[str], layout: SymbolLayout, first: int) -> None:
        """Stop at a row with fewer columns than are named; note those with more."""
        if rows and not layout.placed:
            self._fail(first - 1, layout.NOWHERE.format(layout.names))
        more = 0
        for number, row in enumerate(rows):
            width = len(row.split())
            if width < layout.width:
                hint = (
                    f" The number of atoms on line {self.shown} is probably too large, or atoms "
                    "are missing."
                )
                hint = hint if row.strip().isdecimal() or not row.strip() else ""
                self._fail(
                    first + number,
                    f"{layout.width} columns are expected ({layout.names}), found "
                    f"{_shown(row.strip())}.{hint}",
                )
            more += width > layout.width
        if more:
            self.notes[
                f"have columns behind the {layout.width} that are named ({layout.names}); they are "
                "not read. If they are labels, name them with Properties=..."
            ] += 1

    def _cut_in_a_number(self, rows: Sequence[str], end: int) -> None:
        """The file ends within the last row, where all rows have one length."""
        if self.ended or end < len(self.lines) or len(rows) < 3:
            return
        for width in (len, lambda row: len(row.rpartition(".")[2])):
            if len({width(row) for row in rows[:-1]}) == 1 and width(rows[-1]) < width(rows[0]):
                self._cut_off(f"is cut off: the file ends within a row, {_shown(rows[-1])}")

    def _with_elements(
        self, rows: list[str], layout: SymbolLayout, first: int, comment: str
    ) -> tuple[list[str], dict[int, float]]:
        """Rows with symbols of elements, and the masses of isotopes by atom."""
        masses: dict[int, float] = {}
        if layout.species is not None:
            self._agreeing(rows, layout, first)
        if layout.species is None or layout.numbered:
            return rows, masses
        changed = list(rows)
        typed = bool(self.types) or comment.lstrip().startswith("Atoms. Timestep")
        for number, row in enumerate(rows):
            label = row.split(None, layout.species + 1)[layout.species]
            symbol, mass = self._element(label, first + number, typed)
            if mass is not None:
                masses[number] = mass
            if symbol != label:
                words = row.split()
                words[layout.species] = symbol
                changed[number] = " ".join(words)
        if masses:
            self.notes["name isotopes; they are read as their elements, with these masses"] += 1
        return changed, masses

    def _agreeing(self, rows: list[str], layout: SymbolLayout, first: int) -> None:
        """Stop where another column names another element than the column of symbols."""
        for number, row in enumerate(rows if layout.others else ()):
            words = row.split()
            species = words[layout.species or 0]
            known = element_of(species)
            for name, column in layout.others.items():
                other = element_of(words[column])
                if known and other and known[0] != other[0]:
                    meaning = "" if words[column] == other[0] else f", which is {other[0]}"
                    what = f"species is {species!r} and {name} is {words[column]!r}{meaning}"
                    self._fail(first + number, f"{what}. Remove the column that is wrong")

    def _element(self, label: str, line: int, typed: bool) -> tuple[str, float | None]:
        """Symbol and, for an isotope, mass."""
        if label.isdecimal() and int(label):
            if typed:
                if not self.types:
                    raise DataError(self._typed(0))
                if int(label) not in self.types:
                    self._fail(line, f"type {label} is not among the types given: {self.types}")
                self.mapped = True
                return self.types[int(label)], None
            self.numeric.add(int(label))
        else:
            self.symbolic = True
        found = element_of(label)
        if found is not None:
            return found
        if is_dummy(label):
            self._fail(
                line,
                f"{label!r} is a dummy atom, a place without an element, which no potential can "
                "be asked about. Remove such atoms, and lower the number of atoms",
            )
        self._fail(
            line,
            f"{label!r} is no element, and what it stands for is not clear. Write the symbol of "
            "the element in this column",
        )

    def _typed(self, largest: int) -> str:
        what = f"hold the numbers 1 to {largest}" if largest > 1 else "hold numbers"
        return (
            f"{self.source}: the places of the elements {what}, which are types of atoms in files "
            "of LAMMPS and would be hydrogen, helium, ... as atomic numbers. Say which type is "
            "which element: `types: {1: O, 2: H}` next to `read_from` of the systems, or --types "
            "1=O,2=H on the command line."
        )

    def _refuse_cell(self, comment: str) -> None:
        """Stop where the comment holds a cell that would be lost."""
        if _NO_CELL.search(comment) or (not self.plain and re.search(r"Lattice\s*=", comment)):
            return
        cell = cell_in_words(comment)
        if self.plain and not cell and "Lattice" in comment:
            cell = comment.strip()
        if not cell:
            return
        self._fail(
            self.start + 1,
            f"the comment seems to hold a cell ({_shown(cell)}), but not in the form "
            "that is read, so that the structure would be a molecule in vacuum. Write "
            'Lattice="ax ay az bx by bz cx cy cz" (in the unit of the positions), or pbc="F F F" '
            "if it is one",
        )

    def _parse(self, comment: str) -> dict[str, Any]:
        """The comment as ASE reads it, with matrices in the forms that have one meaning."""
        if self.plain:
            return {}
        twice = [name for name, count in Counter(_ONCE.findall(comment)).items() if count > 1]
        if twice:
            self._fail(self.start + 1, f"{twice[0]} stands more than once: remove the wrong ones")
        found = dict(key_val_str_to_dict(_MATRIX.sub(self._matrix, comment)))
        for key, value in found.items():
            if isinstance(value, str) and _FORTRAN_REAL.fullmatch(value):
                found[key] = as_number(value)
        return found

    def _matrix(self, found: re.Match[str]) -> str:
        """Nine numbers for the key, where its value says them."""
        key, value = found[1], found[2]
        numbers = [repr(as_number(word)) for word in _FLOAT.findall(value)]
        if len(numbers) == 6 and key != "Lattice":
            xx, yy, zz, yz, xz, xy = numbers
            numbers = [xx, xy, xz, xy, yy, yz, xz, yz, zz]
            self.notes[
                f"have a {key} of six numbers, taken in the order xx yy zz yz xz xy (Voigt)"
            ] += 1
        elif len(numbers) == 3 and key == "Lattice":
            x, y, z = numbers
            numbers = [x, "0", "0", "0", y, "0", "0", "0", z]
        elif len(numbers) == 9 and key != "Lattice":
            matrix = np.array([as_number(word) for word in numbers]).reshape(3, 3)
            if asymmetry(matrix) > ROUNDING:
                numbers = [repr(n) for n in ((matrix + matrix.T) / 2).flatten().tolist()]
                self.notes[f"have a {key} that {ASYMMETRIC}"] += 1
        elif len(numbers) != 9:
            allowed = "9 or 3" if key == "Lattice" else "9, or 6 in the order xx yy zz yz xz xy"
            self._fail(
                self.start + 1,
                f"{key} should be {allowed} numbers, found {_shown(value)}",
            )
        return f'{key}="{" ".join(numbers)}"'

    def _atoms(self, lines: Sequence[str], count: int) -> Atoms:
        """A frame by itself, as ASE reads it."""
        block = "\n".join([str(count), *lines, ""])
        return next(read_xyz(named(io.StringIO(block), self.source), 0, self._parse))

    def _second_try(self, error: Exception, lines: Sequence[str], count: int) -> Atoms:
        """The frame with exponents as Fortran writes them (1.0D-03); else what is wrong."""
        plain = [lines[0], *(_FORTRAN.sub(r"\1e\2", line) for line in lines[1:])]
        if plain != lines:
            try:
                return self._atoms(plain, count)
            except Exception:  # noqa: BLE001  the first error is explained
                pass
        self._explain(error, lines)

    def _explain(self, error: Exception, lines: Sequence[str]) -> NoReturn:
        """ASE's error with its place in the file."""
        layout, first = SymbolLayout.of("" if self.plain else lines[0]), self.start + 2
        for number, row in enumerate(lines[1:]):
            for column, (word, kind) in enumerate(zip(row.split(), layout.kinds, strict=False), 1):
                if kind in _WORDS and not _WORDS[kind][0].fullmatch(word):
                    what = f"{_WORDS[kind][1]} is expected in column {column}, found {word!r}"
                    self._fail(first + number, what)
        reason = str(error).strip() or type(error).__name__
        self._fail(self.start + 1, f"ASE cannot read the frame: {reason}")

    def _cut_off(self, what: str) -> NoReturn:
        raise DataError(
            f"{self.source}: the last frame, {self.frame}, which begins on line {self.shown}, "
            f"{what}. Remove it (the lines from {self.shown} on), or write the file again."
        )

    def _fail(self, line: int, what: str) -> NoReturn:
        end = "" if what.endswith((".", "!")) else "."
        raise DataError(
            f"{self.source}, line {line + 1 + self.before} (frame {self.frame}): {what}{end}"
        )


def _shown(text: str) -> str:
    """A piece of a file, short enough for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
