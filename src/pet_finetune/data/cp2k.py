"""Outputs of single calculations of CP2K (energy and forces), which ASE has no reader for."""

from __future__ import annotations

import re

import numpy as np
from ase import Atoms
from ase.units import Bohr, GPa, Hartree

from pet_finetune.errors import DataError, damage_explained

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
