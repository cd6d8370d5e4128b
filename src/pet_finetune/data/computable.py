"""Whether a model can compute structures: their geometry, elements, charges and spins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.neighborlist import natural_cutoffs, neighbor_list
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pet_finetune.errors import DataError, SpeciesError
from pet_finetune.log import get_logger

from .structure import DEFAULT_CHARGE_KEYS, DEFAULT_SPIN_KEYS, Structure, place, usual_integer

__all__ = [
    "MISSING_CELL",
    "charge_and_spin",
    "check_atoms",
    "check_charges",
    "log_odd_charges",
    "misses_a_cell",
    "molecules_in",
]

_logger = get_logger(__name__)

#: What :func:`misses_a_cell` found, in words.
MISSING_CELL = "separate molecules fill a box as a liquid or crystal does, and there is no cell"
#: So many molecules, and atoms per cubic Angstrom of the box around them, are no gas and no cluster
#: (a round drop of water fills half of its box, to 0.05).
_MANY, _DENSE = 12, 0.065


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


def molecules_in(atoms: Atoms) -> int:
    """How many pieces a structure has between which there is no bond, by covalent radii."""
    if len(atoms) < 2:
        return len(atoms)
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.25))
    bonds = coo_matrix((np.ones(len(i)), (i, j)), (len(atoms), len(atoms)))
    return int(connected_components(bonds, directed=False)[0])


def misses_a_cell(atoms: Atoms) -> int:
    """How many molecules fill a box of which nothing is said; 0 where a cell is not missed.

    Files of many programs hold positions alone: a liquid would be a drop in vacuum.
    """
    if atoms.cell.any() or len(atoms) < _MANY or not np.isfinite(atoms.positions).all():
        return 0
    box = np.prod(np.ptp(atoms.positions, axis=0) + 2.0)  # with half of the gaps around
    if len(atoms) < _DENSE * box:
        return 0
    count = molecules_in(atoms)
    return count if count >= _MANY else 0


def charge_and_spin(atoms: Atoms, max_charge: int, max_spin: int) -> tuple[int, int]:
    """Total charge and spin multiplicity 2S+1 from ``atoms.info``; 0 and 1 where it is silent.

    Args:
        atoms: one structure.
        max_charge: largest absolute charge the model knows.
        max_spin: largest multiplicity the model knows.

    Raises:
        DataError: a value that is no whole number, or beyond what the model knows.
    """
    charge, odd_charge = usual_integer(atoms.info, DEFAULT_CHARGE_KEYS, 0)
    spin, odd_spin = usual_integer(atoms.info, DEFAULT_SPIN_KEYS, 1)
    if odd_charge or odd_spin:
        raise DataError(f"In atoms.info {odd_charge or odd_spin}, not a whole number.")
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


def check_charges(structures: Sequence[Structure], max_charge: int, max_spin: int) -> None:
    """Refuse structures whose total charge or multiplicity the model has no embedding for.

    Args:
        structures: what is to be predicted or trained on.
        max_charge: largest absolute charge the model knows.
        max_spin: largest multiplicity 2S+1 the model knows.

    Raises:
        DataError: names the first such structure and how many there are; also of structures with
            something else than a whole number in the place of one of the two.
    """
    odd = [structure for structure in structures if structure.odd]
    if odd:
        raise DataError(
            f"{odd[0].where}: {odd[0].odd}, where the model reads a whole number, as the total "
            f"charge or the spin multiplicity 2S+1 ({len(odd)} of {len(structures)} structures "
            "have such values). Correct them, or name other places in `extra_data`."
        )
    for name, values, low, high in (
        ("total charge", [s.charge for s in structures], -max_charge, max_charge),
        ("spin multiplicity (2S+1)", [s.spin for s in structures], 1, max_spin),
    ):
        wrong = [index for index, value in enumerate(values) if not low <= value <= high]
        if wrong:
            raise DataError(
                f"{structures[wrong[0]].where}: the {name} is {values[wrong[0]]}, and the model "
                f"knows those from {low} to {high} ({len(wrong)} of {len(structures)} structures "
                "are outside). Remove these structures; a model trained from scratch takes its "
                "limits from max_charge and max_spin_multiplicity in architecture.model."
            )


def log_odd_charges(structures: Sequence[Structure]) -> None:
    """Say once which frames hold something else than an integer as charge or spin."""
    odd = [structure for structure in structures if structure.odd]
    if odd:
        _logger.info(
            "%s: charge or spin of %d of %d frames is not an integer (%s: %s), and not taken as "
            "the one of the structure",
            odd[0].source,
            len(odd),
            len(structures),
            place(odd[0].index),
            odd[0].odd,
        )
