"""Formats that ASE does not know: sets of other programs, and single calculations of CP2K.

An ``.npz`` of MD17, MD22, sGDL, NequIP and their like; folders of DeePMD-kit; MLIP's ``.cfg``;
VASP's ``ML_AB``; outputs of CP2K.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import Bohr, GPa, Hartree

from pet_finetune.errors import DataError, damage_explained
from pet_finetune.log import get_logger

from .outputs import is_cp2k
from .structure import place
from .text import Content, as_number

_logger = get_logger(__name__)


def own_kind(content: Content) -> str:
    """Our name of the format of a file, by its content; empty where ASE may know it."""
    if is_cp2k(content.text):
        return "cp2k"
    if re.match(r"\s*BEGIN_CFG\b", content.text):
        return "mlip"
    if _ML_AB.match(content.text):
        return "ml-ab"
    return "npz" if names_in_npz(content) else ""


def read_own(content: Content, types: Mapping[int, str]) -> Iterator[Atoms]:
    """Frames of a file whose kind is ours; ``types`` are elements by type of atom.

    Raises:
        DataError: see the readers of each format.
    """
    if content.kind == "npz":
        yield from read_npz(content)
    elif content.kind == "mlip":
        yield from read_mlip(content.text, content.source, types)
    elif content.kind == "ml-ab":
        yield from read_ml_ab(content.text, content.source)
    else:
        yield read_cp2k(content.text, content.source)


# Arrays of numpy --------------------------------------------------------------------------------

#: Names in such files, in lower case, by what they are; a lattice is none: sGDL's has columns.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "positions": ("r", "coords", "coordinates", "positions", "pos"),
    "numbers": ("z", "nuclear_charges", "atomic_numbers", "numbers"),
    "energy": ("e", "energies", "energy"),
    "forces": ("f", "forces"),
    "cell": ("cell", "cells"),
    "pbc": ("pbc",),
    "energy-unit": ("e_unit",),
    "length-unit": ("r_unit",),
}
#: Where positions are in a folder.
_DEEPMD = ("set.*/coord.npy", "*/set.*/coord.npy")


def names_in_npz(content: Content) -> dict[str, str]:
    """Names in a file by what they are; none where it has no positions and elements."""
    if content.file.suffix != ".npz" or not zipfile.is_zipfile(io.BytesIO(content.data)):
        return {}
    with zipfile.ZipFile(io.BytesIO(content.data)) as file:
        names = {name.removesuffix(".npy").casefold(): name for name in file.namelist()}
    found = {ours: names[name] for ours, usual in _NAMES.items() for name in usual if name in names}
    whole = {"positions", "numbers"} <= found.keys() and "lattice" not in names
    return {ours: name.removesuffix(".npy") for ours, name in found.items()} if whole else {}


def read_npz(content: Content) -> Iterator[Atoms]:
    """The structures, with ``energy`` and ``forces`` where there are any, in the file's own units.

    One array of elements may stand for all structures; a zero or less in it is no atom.

    Raises:
        DataError: an array has another shape than its name says, or holds objects of Python.
    """
    names = names_in_npz(content)
    try:
        with np.load(io.BytesIO(content.data), allow_pickle=False) as file:
            arrays = {ours: np.asarray(file[name]) for ours, name in names.items()}
            others = sorted(set(file.files) - set(names.values()))
    except ValueError as error:
        raise DataError(f"{content.source} holds what numpy does not open: {error}.") from error
    if others:
        _logger.info("%s: %s are not read", content.source, ", ".join(others))
    positions = arrays["positions"]
    count, size = positions.shape[:2] if positions.ndim == 3 else (0, 0)
    shapes = {
        "positions": ((count, size, 3),),
        "numbers": ((size,), (count, size)),
        "energy": ((count,), (count, 1)),
        "forces": ((count, size, 3),),
        "cell": ((3, 3), (count, 3, 3)),
        "pbc": ((3,), (count, 3), ()),
    }
    for name, allowed in shapes.items():
        if name in arrays and arrays[name].shape not in allowed:
            raise DataError(
                f"{content.source}: the {name} have the shape {arrays[name].shape}, and the "
                f"positions {positions.shape}. Expected {' or '.join(map(str, allowed))}, with n "
                "structures and their atoms in positions of [n, atoms, 3]."
            )
    units = {name: str(arrays[name]) for name in ("energy-unit", "length-unit") if name in arrays}
    numbers = np.broadcast_to(arrays["numbers"], (count, size))
    cells = np.broadcast_to(arrays.get("cell", np.zeros((3, 3))), (count, 3, 3))
    periodic = np.broadcast_to(arrays.get("pbc", cells.any(axis=2)), (count, 3))
    for index in range(count):
        real = numbers[index] > 0
        atoms = Atoms(
            numbers[index][real].astype(int),
            positions[index][real],
            cell=cells[index],
            pbc=periodic[index],
            info=dict(units),
        )
        if "energy" in arrays:
            atoms.info["energy"] = float(arrays["energy"].reshape(count)[index])
        if "forces" in arrays:
            atoms.arrays["forces"] = arrays["forces"][index][real].astype(float)
        yield atoms


def is_deepmd(path: Path) -> bool:
    """Whether a folder holds systems of DeePMD-kit as arrays of numpy."""
    return bool(_coordinates(path))


def _coordinates(path: Path) -> list[Path]:
    """The positions of one system, or of several in folders of their own."""
    return sorted(file for place in _DEEPMD for file in path.glob(place))


def read_deepmd(path: Path) -> list[Atoms]:
    """The structures of all systems in a folder, with ``energy``, ``forces`` and ``stress``.

    Their units are eV and Å, and their virial is minus the stress times the volume.

    Raises:
        DataError: the elements are not named, or an array is missing, damaged or of another shape.
    """
    frames = list[Atoms]()
    for coordinates in _coordinates(path):
        folder = coordinates.parent
        names = folder.parent / "type_map.raw"
        said = names.read_text().split() if names.is_file() else []
        if not said or not set(said) <= set(chemical_symbols[1:]):
            raise DataError(
                f"{folder.parent} does not say its elements: write their symbols into "
                f"type_map.raw, in the order of the numbers in type.raw (found: {said or 'none'})."
            )
        with damage_explained(lambda met, at=folder: DataError(f"{at} cannot be read: {met}.")):  # type: ignore[misc]
            frames += _system(folder, np.array(said))
    return frames


def _system(folder: Path, symbols: np.ndarray) -> Iterator[Atoms]:
    """The structures of one ``set.000`` of DeePMD-kit."""
    types = np.array((folder.parent / "type.raw").read_text().split(), dtype=int)
    arrays = {file.stem: np.load(file) for file in folder.glob("*.npy")}
    count, shape = len(arrays["coord"]), (len(arrays["coord"]), len(types), 3)
    if "box" not in arrays and not (folder.parent / "nopbc").exists():
        raise DataError(f"{folder} has no box.npy, and no file nopbc beside it says why.")
    positions = arrays["coord"].reshape(shape)
    cells = arrays.get("box", np.zeros((count, 9))).reshape(count, 3, 3)
    # Of mixed systems; -1 is no atom.
    types = arrays.get("real_atom_types", np.broadcast_to(types, shape[:2])).astype(int)
    for index in range(count):
        real = types[index] >= 0
        periodic = not (folder.parent / "nopbc").exists()
        atoms = Atoms(symbols[types[index][real]], positions[index][real], pbc=periodic)
        atoms.cell[:] = cells[index] if periodic else 0.0
        if "energy" in arrays:
            atoms.info["energy"] = float(arrays["energy"].reshape(count)[index])
        if "force" in arrays:
            atoms.arrays["forces"] = arrays["force"].reshape(shape)[index][real].astype(float)
        if "virial" in arrays and periodic:
            atoms.info["stress"] = -arrays["virial"].reshape(count, 3, 3)[index] / atoms.cell.volume
        yield atoms


# MLIP, and VASP's machine-learned force fields -------------------------------------------------


def read_mlip(text: str, source: str, types: Mapping[int, str]) -> Iterator[Atoms]:
    """The configurations, with ``energy``, ``forces`` and ``stress`` where there are any.

    Their units are taken as they stand, eV and Å in files of MLIP. ``PlusStress`` is minus the
    stress times the volume.

    Args:
        text: of the file.
        source: the file, for messages.
        types: elements by type of atom.

    Raises:
        DataError: a configuration is cut off or damaged, or has a type without an element.
    """
    for number, part in enumerate(text.split("BEGIN_CFG")[1:]):
        where = place(number, source)
        body, end, _ = part.partition("END_CFG")
        if not end:
            raise DataError(f"{where} is cut off: it has no END_CFG. Remove it.")
        with damage_explained(lambda met, at=where: DataError(f"{at} cannot be read: {met}.")):  # type: ignore[misc]
            yield _configuration(body, where, types)


def _configuration(body: str, where: str, types: Mapping[int, str]) -> Atoms:
    """One configuration: words at the beginning of a line name what follows."""
    headers, values = dict[str, list[str]](), dict[str, list[list[str]]]()
    name = ""
    for words in filter(None, map(str.split, body.splitlines())):
        if words[0][0].isalpha():
            name = words[0].rstrip(":")
            headers[name], values[name] = words[1:], []
        else:
            values[name].append(words)
    if "Stress" in headers or "Virial" in headers:
        raise DataError(f"{where} has a stress of another sign than PlusStress. Convert the file.")
    table = np.array(values["AtomData"], dtype=float)
    if len(table) != int(values["Size"][0][0]):
        raise DataError(f"{where} has {len(table)} of {values['Size'][0][0]} atoms.")
    column = dict(zip(headers["AtomData"], table.T, strict=True))
    kinds = column["type"].astype(int)
    if unknown := sorted(set(kinds.tolist()) - set(types)):
        raise DataError(
            f"{where} has types of atoms ({', '.join(map(str, unknown))}) that no element is given "
            "for: `types: {0: O, 1: H}` next to `read_from` of the systems, or --types 0=O,1=H."
        )
    vectors = np.array(values.get("Supercell", []), dtype=float).reshape(-1, 3)
    cell = np.zeros((3, 3))
    cell[: len(vectors)] = vectors
    direct = "direct_x" in column
    positions = np.stack(
        [column[f"{'direct' if direct else 'cartes'}_{axis}"] for axis in "xyz"], 1
    )
    atoms = Atoms(
        [types[kind] for kind in kinds],
        positions @ cell if direct else positions,
        cell=cell,
        pbc=np.arange(3) < len(vectors),
    )
    if "fx" in column:
        atoms.arrays["forces"] = np.stack([column[f"f{axis}"] for axis in "xyz"], 1)
    if "Energy" in values:
        atoms.info["energy"] = float(values["Energy"][0][0])
    if "PlusStress" in values and len(vectors) == 3:
        virial = dict(zip(headers["PlusStress"], map(float, values["PlusStress"][0]), strict=True))
        order = [virial[name] for name in ("xx", "yy", "zz", "yz", "xz", "xy")]
        atoms.info["stress"] = -np.array(order) / atoms.cell.volume
    return atoms


#: How VASP's data for machine-learned force fields begin.
_ML_AB = re.compile(r"\s*(?:\d\.\d Version\s*)?\*{9,}\s*The number of configurations")
#: A section: its name, a rule, and what follows up to a heavier rule.
_SECTION = re.compile(r"^ *([A-Za-z][^\n]*?) *\n-{20,} *\n(.*?)(?=^[=*]{20,}|\Z)", re.M | re.S)


def read_ml_ab(text: str, source: str) -> Iterator[Atoms]:
    """The calculations of an ``ML_AB`` or ``ML_ABN``, with energy, forces and stress in ASE's sign.

    Raises:
        DataError: one is missing, cut off or damaged.
    """
    header, *parts = re.split(r"^ *Configuration num\. *\d+ *$", text, flags=re.M)
    count = dict(_SECTION.findall(header)).get("The number of configurations", "0").strip()
    if str(len(parts)) != count:
        raise DataError(f"{source} says it has {count} configurations, and {len(parts)} are there.")
    for number, part in enumerate(parts):
        where = place(number, source)
        with damage_explained(lambda met, at=where: DataError(f"{at} cannot be read: {met}.")):  # type: ignore[misc]
            yield _calculation(dict(_SECTION.findall(part)))


def _calculation(sections: Mapping[str, str]) -> Atoms:
    words = sections["Atom types and atom numbers"].split()
    symbols = np.repeat(words[::2], np.array(words[1::2], dtype=int))

    def numbers(name: str, *shape: int) -> np.ndarray:
        values = np.array([as_number(word) for word in sections[name].split()])
        return values[np.isfinite(values)].reshape(shape)

    atoms = Atoms(
        symbols,
        numbers("Atomic positions (ang.)", len(symbols), 3),
        cell=numbers("Primitive lattice vectors (ang.)", 3, 3),
        pbc=True,
    )
    atoms.info["energy"] = float(numbers("Total energy (eV)", 1)[0])
    atoms.arrays["forces"] = numbers("Forces (eV ang.^-1)", len(symbols), 3)
    if "Stress (kbar)" in sections:  # xx yy zz xy yz zx, positive where compressed
        atoms.info["stress"] = -0.1 * GPa * numbers("Stress (kbar)", 6)[[0, 1, 2, 4, 5, 3]]
    return atoms


# CP2K -------------------------------------------------------------------------------------------

_NUMBER = r"-?\d+\.\d+(?:[Ee][-+]?\d+)?"
_THREE = rf"((?: +{_NUMBER}){{3}})"
_ENERGY = re.compile(rf"^ ENERGY\| Total FORCE_EVAL .*? energy \S+ *({_NUMBER}) *$", re.M)
_VECTOR = re.compile(rf"^ CELL\| Vector [abc] \[angstrom\]: *{_THREE}", re.M)
_PERIODIC = re.compile(r"^ (?:POISSON|CELL)\| Periodicity +(\w+)", re.M)
_ATOMS = re.compile(r"ATOMIC COORDINATES IN ANGSTROM\s+Atom +Kind.*?\n\s*\n?((?: +\d.*\n)+)", re.I)
#: Its forces under the heads of versions to 2024, and from 2025 on; then its stress, likewise.
_FORCES = (
    re.compile(rf"^ +\d+ +\d+ +[A-Z][a-z]?{_THREE} *$", re.M),
    re.compile(rf"^ FORCES\| +\d+{_THREE}", re.M),
)
_STRESS = re.compile(rf"(?:STRESS\|)? +[XYZxyz]{_THREE} *$", re.M)
_STRESS_HEAD = re.compile(r"^ (?:STRESS\| Analytical stress tensor|STRESS TENSOR) \[(\w+)\]", re.M)
_UNITS = {"GPa": GPa, "bar": 1e-4 * GPa, "kbar": 0.1 * GPa}


def read_cp2k(text: str, source: str) -> Atoms:
    """The structure with the energy, forces and stress of its calculation, in eV, Å and ASE's sign.

    Raises:
        DataError: it is of several steps, whose positions CP2K writes to other files, or not whole.
    """
    energies, blocks = _ENERGY.findall(text), _ATOMS.findall(text)
    run = re.search(r"^ GLOBAL\| Run type +(\S+)", text, re.M)
    if run is None or not run[1].startswith("ENERGY") or len(energies) != 1 or len(blocks) != 1:
        raise DataError(
            f"{source} is an output of CP2K ({run[1] if run else 'of no known run type'}) with "
            f"{len(energies)} energies and {len(blocks)} tables of positions. Of each single "
            "calculation with RUN_TYPE ENERGY_FORCE the output can be read; of molecular dynamics "
            "dpdata (cp2k/aimd_output) makes extended xyz."
        )
    with damage_explained(lambda met: DataError(f"{source} cannot be read: {met}.")):
        rows = [row.split() for row in blocks[0].splitlines()]
        if any(float(row[7]) == 0.0 for row in rows):
            raise DataError(f"{source} has ghost atoms (Z(eff) of 0), which no potential knows.")
        periodic = _PERIODIC.search(text)
        axes = "XYZ" if periodic is None else periodic[1].upper()
        cell = np.array([row.split() for row in _VECTOR.findall(text)[:3]], dtype=float)
        pbc = [axis in axes for axis in "XYZ"] if axes != "NONE" else False
        positions = np.array([row[4:7] for row in rows], dtype=float)
        atoms = Atoms([int(row[3]) for row in rows], positions, cell=cell, pbc=pbc)
        atoms.info["energy"] = float(energies[0]) * Hartree
        _, *behind = re.split(r"ATOMIC FORCES in \[a\.u\.\]|FORCES\| Atomic forces \[", text)
        for part in behind[:1]:
            if not part.startswith(("hartree/bohr]", "\n", " ")):
                raise DataError(f"{source} has forces in {part.split(']')[0]}: print hartree/bohr.")
            found = next(filter(None, (pattern.findall(part) for pattern in _FORCES)), [])
            forces = np.array([row.split() for row in found], dtype=float)
            atoms.arrays["forces"] = forces.reshape(len(atoms), 3) * Hartree / Bohr
        if head := _STRESS_HEAD.search(text):
            stress = np.array([row.split() for row in _STRESS.findall(text, head.end())[:3]], float)
            atoms.info["stress"] = -stress.reshape(3, 3) * _UNITS[head[1]]
    return atoms
