"""ASE structures as input of a model: checks and batches.

The batches are made again and again while the atoms move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from ase.neighborlist import natural_cutoffs
from ase.neighborlist import neighbor_list as bonded_pairs
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.errors import DataError, SpeciesError
from pet_finetune.graph import Batch
from pet_finetune.log import get_logger

from .neighbors import NeighborList, edge_vectors, neighbor_list
from .structure import DEFAULT_CHARGE_KEYS, DEFAULT_SPIN_KEYS, check_elements, usual_integer

_logger = get_logger(__name__)

#: What :func:`misses_a_cell` found, in words.
MISSING_CELL = "separate molecules fill a box as a liquid or crystal does, and there is no cell"
#: So many molecules, and atoms per cubic Angstrom of the box around them, are no gas and no cluster
#: (a round drop of water fills half of its box, to 0.05).
_MANY, _DENSE = 12, 0.065


def check_atoms(atoms: Atoms, species: Sequence[int]) -> None:
    """Check that a potential can be evaluated on a structure and knows its elements.

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
    check_elements(atoms.numbers, "The structure")
    unknown = Counter(z for z in atoms.numbers.tolist() if z not in species)
    if unknown:
        found = ", ".join(f"{chemical_symbols[z]} (Z={z}, {n} atoms)" for z, n in unknown.items())
        known = " ".join(chemical_symbols[z] for z in species)
        raise SpeciesError(f"The model does not know {found}. It knows: {known}.")


def molecules_in(atoms: Atoms) -> int:
    """Number of molecules in a structure, by covalent radii."""
    if len(atoms) < 2:
        return len(atoms)
    i, j = bonded_pairs("ij", atoms, natural_cutoffs(atoms, mult=1.25))
    bonds = coo_matrix((np.ones(len(i)), (i, j)), (len(atoms), len(atoms)))
    return int(connected_components(bonds, directed=False)[0])


def misses_a_cell(atoms: Atoms) -> int:
    """Number of molecules that fill a box without a cell; 0 if no cell seems to be missing.

    Files of many programs hold positions alone: a liquid would be a drop in vacuum.
    """
    if atoms.cell.any() or len(atoms) < _MANY or not np.isfinite(atoms.positions).all():
        return 0
    box = np.prod(np.ptp(atoms.positions, axis=0) + 2.0)  # with half of the gaps around
    if len(atoms) < _DENSE * box:
        return 0
    count = molecules_in(atoms)
    return count if count >= _MANY else 0


def charge_and_spin(atoms: Atoms, hypers: ModelOptions) -> tuple[int, int]:
    """Total charge and spin multiplicity 2S+1 from ``atoms.info``; else, or unconditioned, 0 and 1.

    Raises:
        DataError: a value that is no whole number, or beyond what the model knows.
    """
    if not hypers.system_conditioning:
        return 0, 1
    max_charge, max_spin = hypers.max_charge, hypers.max_spin_multiplicity
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


def unread_charge_and_spin(atoms: Atoms, hypers: ModelOptions) -> str:
    """Charge and spin in ``atoms.info`` that the model does not read, in words; empty if none."""
    if hypers.system_conditioning or not atoms.info:
        return ""
    charge, _ = usual_integer(atoms.info, DEFAULT_CHARGE_KEYS, 0)
    spin, _ = usual_integer(atoms.info, DEFAULT_SPIN_KEYS, 1)
    if charge == 0 and spin <= 1:
        return ""
    return (
        f"atoms.info has the charge {charge} and the spin multiplicity {max(spin, 1)}, which this "
        "model does not read."
    )


#: Positions, cell and pbc of a neighbour list.
Origin = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Contacts:
    """The extremes of the distances in a structure.

    Attributes:
        closest: the two atoms nearest to each other (the same twice: an atom and its image);
            None where no two are within reach.
        distance: between them, in Å; infinite where there are none.
        alone: atoms without another one within reach.
    """

    closest: tuple[int, int] | None
    distance: float
    alone: frozenset[int]


class MovingAtoms:
    """Makes batches of one structure; what has not changed since the last one is used again.

    The neighbour list is built up to ``cutoff + skin`` and kept for as long as no pair can have
    come within the cutoff that was beyond the margin. Let F take the old cell to the new one, and u
    be what each atom moved apart from that: a pair at distance d is then at least
    ``s d - 2 max|u|`` apart, with s the smallest singular value of F. So MD at constant pressure
    keeps its list too.

    Args:
        cutoff: up to which no edge may be missed, in Å.
        skin: margin of the neighbour list, in Å, 0 or more; 0 builds a list at every move.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        self._cutoff, self._skin = cutoff, skin
        self._pairs: NeighborList | None = None
        #: Positions, cell and pbc that the list was built for.
        self._built_for: tuple[Tensor, Tensor, Tensor]
        #: The list on the device of the batches.
        self._pairs_there: NeighborList | None = None
        self._fixed: tuple[Tensor, ...] = ()
        self._fixed_for: object = None

    def fresh(self) -> MovingAtoms:
        """Another one, which has seen no structure yet."""
        return MovingAtoms(self._cutoff, self._skin)

    def batch(
        self, atoms: Atoms, charge: int, spin: int, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """The structure as the model's input; its edges reach as far as the skin.

        Args:
            atoms: can be computed, see :func:`check_atoms`.
            charge: its total charge.
            spin: its multiplicity.
            device: of the batch.
            dtype: of the batch's floats.
        """
        positions, cell, pbc = _geometry(atoms)
        if self._pairs is None or not self._holds(positions, cell, pbc):
            self._build(positions, cell, pbc)
        if self._pairs_there is None:
            assert self._pairs is not None
            self._pairs_there = NeighborList(*(tensor.to(device) for tensor in self._pairs))
        pairs = self._pairs_there
        both = torch.cat([positions, cell]).to(device, non_blocking=True)
        positions, cell = both[:-3], both[-3:]
        # Differences of positions are taken in double precision, whatever the model's.
        vectors = edge_vectors(positions, cell, pairs)
        numbers, structure_index, charges, spins = self._kept(atoms, charge, spin, device)
        return Batch(
            numbers=numbers,
            positions=positions.to(dtype),
            edge_vectors=vectors.to(dtype),
            centers=pairs.centers,
            neighbors=pairs.neighbors,
            reverse=pairs.reverse,
            structure_index=structure_index,
            cells=cell.to(dtype).unsqueeze(0),
            charges=charges,
            spins=spins,
        )

    def _kept(
        self, atoms: Atoms, charge: int, spin: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """The parts of a batch that stay as they are while atoms and cell move."""
        kept_for = charge, spin, device, atoms.numbers.tobytes()
        if kept_for != self._fixed_for:
            numbers = torch.tensor(atoms.numbers, dtype=torch.int64, device=device)
            conditions = (torch.tensor([number], device=device) for number in (charge, spin))
            self._fixed = numbers, torch.zeros_like(numbers), *conditions
            self._fixed_for = kept_for
        return self._fixed

    def contacts(self, atoms: Atoms) -> Contacts | None:
        """Contacts of the last computed structure; None before the first."""
        if self._pairs is None:
            return None
        positions, cell, _ = _geometry(atoms)
        lengths = torch.linalg.vector_norm(edge_vectors(positions, cell, self._pairs), dim=1)
        reached = set(self._pairs.centers[lengths < self._cutoff].tolist())
        alone = frozenset(range(len(positions))) - reached
        if not reached:
            return Contacts(None, float("inf"), alone)
        index = int(lengths.argmin())
        closest = int(self._pairs.centers[index]), int(self._pairs.neighbors[index])
        return Contacts(closest, float(lengths[index]), alone)

    @property
    def origin(self) -> Origin | None:
        """Geometry of the current neighbour list; None before the first.

        The order of the pairs, and with it the last bit of every sum over them, depends on it.
        """
        if self._pairs is None:
            return None
        positions, cell, pbc = (tensor.numpy().copy() for tensor in self._built_for)
        return positions, cell, pbc

    def rebuild(self, origin: Origin) -> None:
        """Rebuild the list of an :attr:`origin`, for an exact restart."""
        self._build(*(torch.from_numpy(np.array(array)) for array in origin))

    def _build(self, positions: Tensor, cell: Tensor, pbc: Tensor) -> None:
        self._pairs = neighbor_list(positions, cell, pbc, self._cutoff + self._skin)
        self._pairs_there = None
        self._built_for = positions, cell, pbc

    def _holds(self, positions: Tensor, cell: Tensor, pbc: Tensor) -> bool:
        """Whether the current list has every pair within the cutoff."""
        old_positions, old_cell, old_pbc = self._built_for
        if positions.shape != old_positions.shape or not torch.equal(pbc, old_pbc):
            return False
        expected, shrinkage = old_positions, 1.0
        if not torch.equal(cell, old_cell):
            if not bool(pbc.all()):
                return False
            deformation = torch.linalg.solve(old_cell, cell)
            expected = old_positions @ deformation
            shrinkage = float(torch.linalg.svdvals(deformation).min())
        moved = positions - expected
        moved = moved - moved.mean(dim=0)  # only relative moves count
        furthest = float(torch.linalg.vector_norm(moved, dim=1).max())
        return shrinkage * (self._cutoff + self._skin) - 2.0 * furthest >= self._cutoff


def _geometry(atoms: Atoms) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, cell (zero where not periodic) and pbc of a structure, each a copy."""
    pbc = np.array(atoms.pbc, dtype=bool)
    cell = np.where(pbc[:, None], np.asarray(atoms.cell.array, dtype=np.float64), 0.0)
    positions = np.array(atoms.positions, dtype=np.float64)
    return torch.from_numpy(positions), torch.from_numpy(cell), torch.from_numpy(pbc)
