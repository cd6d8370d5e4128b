"""Whether an ASE structure can be computed, and the charge and spin it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from pet_finetune.errors import DataError, SpeciesError

from .structure import DEFAULT_CHARGE_KEYS, DEFAULT_SPIN_KEYS, as_integer

__all__ = ["charge_and_spin", "check_atoms"]


def check_atoms(atoms: Atoms, species: Sequence[int]) -> None:
    """Refuse what no potential can be evaluated on, and elements that this one does not know.

    Args:
        atoms: one structure.
        species: atomic numbers the model knows.

    Raises:
        DataError: no atoms, positions that are not finite, or a cell that cannot be.
        SpeciesError: names the unknown elements.
    """
    if len(atoms) == 0:
        raise DataError("The structure has no atoms: there is nothing to calculate.")
    wrong = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(wrong):
        raise DataError(
            f"The positions of {len(wrong)} of {len(atoms)} atoms are NaN or infinite, first of "
            f"all atom {wrong[0]}. In a simulation: try a shorter time step, and check that the "
            "model knows structures like those before."
        )
    periodic = atoms.cell.array[atoms.pbc]
    if not np.isfinite(periodic).all() or np.linalg.matrix_rank(periodic) < len(periodic):
        raise DataError(
            f"The structure has pbc = {atoms.pbc.tolist()}, but its cell vectors there are zero, "
            f"linearly dependent or not finite: {periodic.tolist()}. Set the cell, or pbc."
        )
    unknown = Counter(z for z in atoms.numbers.tolist() if z not in species)
    if unknown:
        found = ", ".join(f"{chemical_symbols[z]} (Z={z}, {n} atoms)" for z, n in unknown.items())
        known = " ".join(chemical_symbols[z] for z in species)
        raise SpeciesError(f"The model does not know {found}. It knows: {known}.")


def charge_and_spin(atoms: Atoms, max_charge: int, max_spin: int) -> tuple[int, int]:
    """Total charge and spin multiplicity 2S+1 from ``atoms.info``; 0 and 1 where it is silent.

    Args:
        atoms: one structure.
        max_charge: largest absolute charge the model knows.
        max_spin: largest multiplicity the model knows.

    Raises:
        DataError: a value that is no whole number, or beyond what the model knows.
    """
    charge = _integer_of(atoms, DEFAULT_CHARGE_KEYS, 0)
    spin = _integer_of(atoms, DEFAULT_SPIN_KEYS, 1)
    if abs(charge) > max_charge:
        raise DataError(
            f"The total charge in atoms.info is {charge}, and the model knows charges from "
            f"{-max_charge} to {max_charge}."
        )
    if not 1 <= spin <= max_spin:
        raise DataError(
            f"The spin multiplicity (2S+1) in atoms.info is {spin}, and the model knows those "
            f"from 1 to {max_spin}."
        )
    return charge, spin


def _integer_of(atoms: Atoms, keys: Sequence[str], default: int) -> int:
    for key in keys:
        if key in atoms.info:
            value = as_integer(atoms.info[key])
            if value is None:
                raise DataError(f"atoms.info[{key!r}] is {atoms.info[key]!r}, not a whole number.")
            return value
    return default
