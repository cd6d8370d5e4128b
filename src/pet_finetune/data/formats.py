"""Statements of formats about themselves, and checks that files were read completely."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

from .text import CELL_WORDS, Content

_logger = get_logger(__name__)

#: Lines of which every step of VASP, and every energy of Gaussian, has one.
VASP_STEP = re.compile(r"FREE ENERGIE OF THE ION-ELECTRON SYSTEM")
GAUSSIAN_ENERGY = re.compile(r"^ *SCF Done:.*", re.M)


@dataclass(frozen=True)
class Format:
    """Statements in the text of a format that ASE's reader ignores.

    Attributes:
        frame: lines of which every frame of an output has one.
        frame_ends: whether that line ends the frame's part of the text; else it begins it.
        holds: what a part must hold for ASE to make a frame of it.
        last_words: what a finished run writes at the end.
        begins: what begins a frame: the file holds as many.
        part: how parts begin and end; ASE takes those without an end for whole ones.
        num_atoms: how many atoms each structure should have.
        no_cell: whether ASE reads no cell, though files may hold one.
        advice: what ASE most often misses in files that it cannot read.
    """

    frame: re.Pattern[str] | None = None
    frame_ends: bool = True
    holds: re.Pattern[str] | None = None
    last_words: str = ""
    begins: re.Pattern[str] | None = None
    part: tuple[str, str] = ("", "")
    num_atoms: re.Pattern[str] | None = None
    no_cell: bool = False
    advice: str = ""


_RUNNER = Format(part=("begin", "end"))
_MOL = r"(?:[^\n]*\n){3}(...)..."
#: By ASE's names.
FORMATS: Mapping[str, Format] = {
    "aims-output": Format(
        frame=re.compile(
            r"Self-consistency cycle converged|Self-consistency cycle not converged"
            r"|SELF-CONSISTENCY CYCLE DID NOT CONVERGE|SCF cycle not converged"
        ),
        last_words="Have a nice day",
    ),
    "castep-castep": Format(
        frame=re.compile(r"^ *Final (?:free )?energy.*=", re.M), last_words="Total time"
    ),
    "cif": Format(
        begins=re.compile(
            r"^\s*_atom_site_(?:label|type_symbol)\s*$(?:(?!^\s*data_)[\s\S])*", re.M
        ),
        advice=" Each atom of a CIF needs the symbol of its element and three numbers, not `?`.",
    ),
    "cp2k-dcd": Format(
        advice=" A DCD says no elements: write its frames as extended xyz with MDAnalysis or "
        "MDTraj.",
    ),
    "dlp4": Format(num_atoms=re.compile(r"\A[^\n]*\n\s*\d+\s+\d+\s+(\d+)")),
    "espresso-out": Format(
        frame=re.compile(r"Program PWSCF|ATOMIC_POSITIONS"),
        frame_ends=False,
        holds=re.compile(
            r"!    total energy|Forces acting on atoms|total   stress|Magnetic moment per site"
            r"|End of self-consistent calculation|End of band structure calculation"
        ),
        last_words="JOB DONE",
    ),
    "gaussian-in": Format(no_cell=True),
    "gaussian-out": Format(frame=GAUSSIAN_ENERGY, last_words="Normal termination"),
    "gen": Format(num_atoms=re.compile(r"\A\s*(\d+)")),
    "gpaw-out": Format(frame=re.compile(r"^Positions:", re.M), frame_ends=False),
    "gromos": Format(part=(r"(?:TITLE|TIMESTEP|POSITION|VELOCITY|BOX)\b", "END"), no_cell=True),
    "lammps-data": Format(
        advice=" The line `Atoms # full` of a data file names the style of its columns."
    ),
    "lammps-dump-text": Format(
        begins=re.compile(r"^ITEM: TIMESTEP", re.M),
        advice=" `ITEM: BOX BOUNDS` has to say how the box ends: `ITEM: BOX BOUNDS pp pp pp`.",
    ),
    "mol": Format(num_atoms=re.compile(rf"\A{_MOL}"), no_cell=True),
    "n2p2": _RUNNER,
    # Without an end ASE searches for hours.
    "nwchem-in": Format(part=("(?i:geometry)", "(?i:end)"), no_cell=True),
    "nwchem-out": Format(frame=re.compile(r"Total (?:DFT|SCF) energy")),
    "orca-output": Format(
        frame=re.compile(r"ORCA TERMINATED NORMALLY|ORCA GEOMETRY RELAXATION STEP"),
        last_words="ORCA TERMINATED NORMALLY",
    ),
    "proteindatabank": Format(
        begins=re.compile(r"^MODEL\b", re.M), part=(r"MODEL\b", "ENDMDL"), no_cell=True
    ),
    "res": Format(part=("TITL", "END")),
    "rmc6f": Format(num_atoms=re.compile(r"\A[\s\S]*?^Number of atoms: *(\d+)", re.M)),
    "runnerdata": _RUNNER,
    "sdf": Format(num_atoms=re.compile(rf"(?:\A|^\$\$\$\$[^\n]*\n){_MOL}", re.M), no_cell=True),
    "turbomole": Format(part=(r"\$coord", r"\$(?!coord)"), no_cell=True),
    "vasp": Format(advice=" The line before the numbers of atoms names their elements: Si O."),
    "vasp-out": Format(
        frame=VASP_STEP,
        last_words="General timing and accounting",
        begins=VASP_STEP,
        advice=" The vasprun.xml of the same calculation holds the same and is read as well.",
    ),
    "vasp-xdatcar": Format(
        begins=re.compile(r"^\s*Direct configuration\s*=", re.M),
        advice=" Each configuration has as many rows as the numbers of atoms say.",
    ),
    "vasp-xml": Format(begins=re.compile(r"<calculation>"), last_words="</modeling>"),
}
_NOTHING = Format()
#: What ASE takes as it stands; numbers of all other formats it converts to eV and Å.
OF_ANY_UNITS = frozenset(
    {"bundletrajectory", "cfg", "db", "extxyz", "json", "mlip", "mysql", "n2p2",
     "netcdftrajectory", "npz", "postgresql", "traj", "xyz"}
)  # fmt: skip


def format_of(kind: str) -> Format:
    """Entry of a format, by ASE's name."""
    return FORMATS.get(kind, _NOTHING)


#: The cell that a PDB file has where there is none.
_UNITY = re.compile(r"^CRYST1(?: +1\.0+){3}(?: +90\.0+){3}", re.M)
_WHOLE = re.compile(r"\s*\d+(?:\s+\d+)*\s*(?:!.*)?")
_POSITION = re.compile(
    r"\s*[-+]?\d*\.\d+(?:[eE][-+]?\d+)?(?:\s+[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?){2}"
)
_IONIC_STEP = re.compile(r"Iteration +(\d+)\( *\d+\)")


def check_complete(content: Content, count: int) -> None:
    """Refuse files of which less was read, ``count`` frames, than they hold.

    Raises:
        DataError: frames or bytes are missing.
    """
    kind, data, text, source = content.kind, content.data, content.text, content.source
    if kind == "traj" and data.startswith(b"- of Ulm"):
        _check_ulm(data, source)
    elif kind == "db" and data.startswith(b"SQLite format 3\0"):
        check_sqlite(data[:100], len(data), source)
    elif kind == "vasp":
        _check_poscar(text, count, source)
    elif kind == "vasp-xdatcar":
        _check_last_line(text, source)
    _check_last_number(text, source)
    beginning = format_of(kind).begins
    expected = len(beginning.findall(text)) if beginning is not None else 0
    if kind == "vasp-xml" and expected == count + 1 and format_of(kind).last_words not in text:
        _logger.warning("%s ends within ionic step %d: it is left out", source, expected)
    elif expected > count:
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


def check_ends(content: Content) -> None:
    """Refuse a text in which a part has no end.

    Raises:
        DataError: it is cut off.
    """
    begins, ends = (
        len(re.findall(rf"^\s*{word}", content.text, re.M)) if word else 0
        for word in format_of(content.kind).part
    )
    if ends < begins:
        raise _cut(content.source, f"{begins} of its parts begin and {ends} end")


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


def check_sqlite(data: bytes, there: int, source: str) -> None:
    """The head of a SQLite file says how many pages there are, and their size.

    Args:
        data: the first 100 bytes.
        there: bytes of the file.
        source: the file, for messages.

    Raises:
        DataError: it is cut off.
    """
    size = int.from_bytes(data[16:18], "big")
    size = 65536 if size == 1 else size
    pages = int.from_bytes(data[28:32], "big")
    if pages * size > there and data[24:28] == data[92:96]:  # else the count is out of date
        raise _cut(source, f"it has {there} bytes of the {pages * size} that it says")


def _check_poscar(text: str, count: int, source: str) -> None:
    """Check that no further positions follow the last atom."""
    lines = text.split("\n")
    numbers = next((k for k in (5, 6) if k < len(lines) and _WHOLE.fullmatch(lines[k])), None)
    if numbers is None or count != 1:
        return
    atoms = sum(map(int, lines[numbers].split()))
    first = numbers + 2 + (lines[numbers + 1].strip()[:1] in tuple("sS"))
    if first + atoms < len(lines) and _POSITION.match(lines[first + atoms]):
        raise DataError(
            f"{source} says on line {numbers + 1} that it has {atoms} atoms, and line "
            f"{first + atoms + 1} holds another position. Correct the numbers, or remove it."
        )


def _check_last_line(text: str, source: str) -> None:
    """In tables of fixed width a last line without its end may be half a number."""
    lines = text.splitlines()
    if text and not text.endswith("\n") and len(lines) > 1:
        last, before = lines[-1].rstrip(), lines[-2].rstrip()
        if last and len(last) < len(before):
            raise _cut(source, f"its last line is shorter than the one before: {last!r}")


def _check_last_number(text: str, source: str) -> None:
    """Tell of a last line without its end whose number has fewer decimals than the one above."""
    before, last = ([""] + text[-10_000:].split("\n"))[-2:]
    if not last.strip() or not before.strip():
        return
    decimals, above = (len(line.split()[-1].partition(".")[2]) for line in (last, before))
    if decimals < above:
        _logger.warning(
            "%s has no line break at its end, and its last number fewer decimals than the one "
            "above it (%r): the file may be cut off. Compare it with the original; a line break at "
            "its end says that it is whole.",
            source,
            last.strip(),
        )


def _cut(source: str, what: str) -> DataError:
    return DataError(
        f"{source} is damaged or cut off: {what}. Copy it again, or write its whole frames to "
        "extended xyz."
    )


def check_frames(content: Content, frames: Sequence[Atoms]) -> None:
    """Frames as ASE read them against the text: no atom invented, no cell lost.

    Raises:
        DataError: with the frame.
    """
    kind, text, source = content.kind, content.text, content.source
    for number, atoms in enumerate(frames):
        where = f"frame {number} of {source}"
        dummies = np.flatnonzero(atoms.numbers < 1)
        if len(dummies):
            raise DataError(
                f"{where}: {len(dummies)} of {len(atoms)} atoms, the first is atom {dummies[0]}, "
                "are dummies without an element (X), which no potential can be asked about. "
                "Remove them, or write their elements."
            )
        _check_occupancies(atoms, where)
    expected = format_of(kind).num_atoms
    if expected is not None:
        counts = [int(n) if n.strip().isdecimal() else 0 for n in expected.findall(text)]
        for number, (atoms, count) in enumerate(zip(frames, counts, strict=False)):
            if len(atoms) < count:
                raise _cut(source, f"frame {number} has {len(atoms)} of {count} atoms")
    if kind == "proteindatabank":
        _check_cryst1(text, frames, source)
    bare = (
        format_of(kind).no_cell
        and not _UNITY.search(text)
        and not any(a.pbc.any() or a.cell.any() for a in frames)
    )
    found = CELL_WORDS.search(text[:20_000]) if bare else None
    if found is not None:
        raise DataError(
            f"{source} seems to hold a cell ({' '.join(found[0].split())[:60]!r}), which is lost "
            f"in reading the format {kind!r}: the structure would be a molecule in vacuum. "
            "Convert it to extended xyz with a Lattice, or remove the cell if it is one."
        )


def _check_cryst1(text: str, frames: Sequence[Atoms], source: str) -> None:
    """Remove the dummy cell of 1 Å, and warn about symmetry that is not applied."""
    for atoms in frames if _UNITY.search(text) else ():
        atoms.set_cell(None)
        atoms.pbc = False
    group = re.search(r"^CRYST1.{49}([A-Z] [^\n]{,9})", text, re.M)
    if group is not None and group[1].split() not in (["P", "1"], ["P", "1", "1"]):
        _logger.warning(
            "%s names the space group %s, and holds the atoms of one asymmetric unit alone if that "
            "is meant: they are read as they stand. Write all atoms of the cell, as a CIF is read",
            source,
            " ".join(group[1].split()[:4]),
        )


def _check_occupancies(atoms: Atoms, where: str) -> None:
    """Refuse sites that are shared or partly empty: one atom would be taken for all of them."""
    sites = atoms.info.pop("occupancy", None)
    partial = []
    if isinstance(sites, Mapping):
        for number, shares in sites.items():
            values = [float(share) for share in shares.values()]
            if len(values) > 1 or any(value < 0.999 for value in values):
                shown = ", ".join(f"{name} {float(share):g}" for name, share in shares.items())
                partial.append(f"site {number}: {shown}")
    column = atoms.arrays.get("occupancy")
    if column is not None and np.issubdtype(np.asarray(column).dtype, np.number):
        some = np.flatnonzero((column > 0) & (column < 0.999))
        partial += [f"atom {k}: {column[k]:g}" for k in some]
    if partial:
        more = f" and {len(partial) - 3} more" if len(partial) > 3 else ""
        raise DataError(
            f"{where} has partly occupied sites ({'; '.join(partial[:3])}{more}). Such a structure "
            "is an average, not an arrangement of atoms: reading it would invent one. Make an "
            "ordered structure of it first (pymatgen's OrderDisorderedStructureTransformation, "
            "icet or supercell do that)."
        )
