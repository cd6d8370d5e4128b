"""Training sets of other programs as text: MLIP's ``.cfg`` and VASP's ``ML_AB``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
from ase import Atoms
from ase.units import GPa

from pet_finetune.errors import DataError, damage_explained

from .structure import place
from .text import as_number


def is_mlip(text: str) -> bool:
    """Whether a text begins as these files do."""
    return re.match(r"\s*BEGIN_CFG\b", text) is not None


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


def is_ml_ab(text: str) -> bool:
    """Whether a text begins as VASP's data for machine-learned force fields do."""
    begin = r"\s*(?:\d\.\d Version\s*)?\*{9,}\s*The number of configurations"
    return re.match(begin, text) is not None


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
