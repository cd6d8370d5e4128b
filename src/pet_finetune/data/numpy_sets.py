"""Arrays of numpy: an ``.npz`` of MD17, MD22, sGDL, NequIP and their like; DeePMD-kit's folders."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from pet_finetune.errors import DataError, damage_explained
from pet_finetune.log import get_logger

from .text import Content

_logger = get_logger(__name__)
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
