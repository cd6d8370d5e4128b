"""Geometries away from the minimum, each worth one single point: no dynamics needed."""

from __future__ import annotations

import networkx as nx
import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii, vdw_radii
from molecules import force_field, to_atoms
from rdkit import Chem
from rdkit.Chem import rdMolTransforms

__all__ = ["beside", "boxed", "rattled", "stretched", "thermal", "rotated"]

KCAL = units.kcal / units.mol
SOFTEST = 0.3  # eV/A^2 of a normal mode: softer ones are not harmonic at these temperatures
VDW = {5: 1.92, 53: 1.98}  # radii (Alvarez 2013, Mantina 2009) that ASE's table may lack


def rattled(atoms: Atoms, reach: float, rng: np.random.Generator) -> Atoms:
    """Every coordinate moved by a random amount, of ``reach`` times 0.02 to 0.15 A in the mean."""
    moved = atoms.copy()
    moved.positions += reach * rng.uniform(0.02, 0.15) * rng.normal(size=moved.positions.shape)
    return moved


def rotated(molecule: Chem.Mol, rng: np.random.Generator) -> Chem.Mol:
    """All rotatable bonds rotated by random angles."""
    copy = Chem.Mol(molecule)
    shape = copy.GetConformer()
    pattern = Chem.MolFromSmarts("[*;!D1]-&!@[*;!D1]")
    for i, j in copy.GetSubstructMatches(pattern):
        ends = [beyond(copy.GetAtomWithIdx(i), j), beyond(copy.GetAtomWithIdx(j), i)]
        if None not in ends:
            angle = float(rng.uniform(-180, 180))
            rdMolTransforms.SetDihedralDeg(shape, ends[0], i, j, ends[1], angle)
    return copy


def beyond(atom: Chem.Atom, other: int) -> int | None:
    """A neighbour of the atom that is not ``other``."""
    return next((a.GetIdx() for a in atom.GetNeighbors() if a.GetIdx() != other), None)


def thermal(
    molecule: Chem.Mol, temperature: float, reach: float, rng: np.random.Generator
) -> Atoms | None:
    """Normal modes of the force field excited at a temperature (K), classically, times ``reach``.

    A displacement of sqrt(kT / k_i) times a normal deviate along each mode of the Hessian, which
    comes from finite differences of the analytic gradient. None where no force field knows the
    molecule.
    """
    field = force_field(molecule)
    if field is None:
        return None
    atoms = to_atoms(molecule)
    start, step = atoms.positions.ravel(), 1e-3
    hessian = np.empty((start.size, start.size))
    for k in range(start.size):
        ahead, behind = start.copy(), start.copy()
        ahead[k] += step
        behind[k] -= step
        hessian[k] = np.subtract(field.CalcGrad(ahead.tolist()), field.CalcGrad(behind.tolist()))
    hessian *= KCAL / (2 * step)
    stiffness, modes = np.linalg.eigh((hessian + hessian.T) / 2)
    width = reach * np.sqrt(units.kB * temperature / np.maximum(stiffness, SOFTEST))
    width[stiffness < 1e-3] = 0.0  # translations, rotations and whatever is no minimum
    atoms.positions += (modes @ (width * rng.normal(size=width.size))).reshape(-1, 3)
    return atoms


def stretched(molecule: Chem.Mol, reach: float, rng: np.random.Generator) -> Atoms:
    """One bond pulled or pressed to 0.7 to 2.2 times its length, the rest rattled a little.

    Both changes are multiplied with ``reach``.
    Outside of rings all that hangs on one end moves along; in rings only the two atoms do.
    """
    atoms = to_atoms(molecule)
    bonds = nx.Graph((b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds())
    i, j = list(bonds.edges)[int(rng.integers(bonds.number_of_edges()))]
    bonds.remove_edge(i, j)
    side = nx.node_connected_component(bonds, j)
    moving = [j] if i in side else sorted(side)
    bond = atoms.positions[j] - atoms.positions[i]
    factor = float(rng.choice([rng.uniform(0.7, 1.0), rng.uniform(1.0, 2.2)]))
    atoms.positions[moving] += reach * (factor - 1) * bond
    atoms.positions += reach * 0.03 * rng.normal(size=atoms.positions.shape)
    return atoms


def radii(atoms: Atoms) -> np.ndarray:
    """Van der Waals radii, Angstrom."""
    table = [VDW.get(z, vdw_radii[z]) for z in atoms.numbers]
    return np.where(np.isnan(table), covalent_radii[atoms.numbers] + 0.8, table)


def at_random(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Turned about its centre, which comes to the origin."""
    copy = atoms.copy()
    copy.positions -= copy.positions.mean(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    copy.positions = copy.positions @ rotation
    return copy


def beside(parts: list[Atoms], closeness: float, rng: np.random.Generator) -> Atoms:
    """Molecules brought together from random sides.

    Each stops where its closest atom is ``closeness`` times the sum of the van der Waals radii
    away: 1 is a contact, 0.6 a collision.
    """
    cluster = at_random(parts[0], rng)
    for part in parts[1:]:
        other = at_random(part, rng)
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        reach = closeness * (radii(cluster)[:, None] + radii(other)[None])
        for away in np.arange(0.0, 30.0, 0.1):
            gaps = other.positions[None] + away * direction - cluster.positions[:, None]
            if (np.linalg.norm(gaps, axis=-1) > reach).all():
                break
        other.positions += away * direction
        cluster += other
    return cluster


def boxed(parts: list[Atoms], packing: float, rng: np.random.Generator) -> Atoms | None:
    """Molecules in a periodic cell that is a bit skewed, placed at random without collisions.

    ``packing`` is the part of the volume that their van der Waals spheres, taken apart, fill; about
    1 in liquids, since bonded spheres overlap. None where they do not fit in 400 attempts.
    """
    spheres = sum(float((4 / 3 * np.pi * radii(part) ** 3).sum()) for part in parts)
    shape = np.eye(3) * rng.uniform(0.85, 1.15, size=3) + 0.08 * rng.normal(size=(3, 3))
    cell = shape * (spheres / packing / abs(np.linalg.det(shape))) ** (1 / 3)
    box = Atoms(cell=cell, pbc=True)
    for part in sorted(parts, key=len, reverse=True):
        for _ in range(400):
            other = at_random(part, rng)
            other.positions += rng.random(3) @ cell
            trial = box + other
            if apart(trial, len(box), 0.68):
                box = trial
                break
        else:
            return None
    return box


def apart(box: Atoms, first_new: int, closeness: float) -> bool:
    """Whether the new atoms keep ``closeness`` times the van der Waals contact from all others.

    The new molecule's own images count too.
    """
    new = np.arange(first_new, len(box))
    sizes = radii(box)
    shifts = np.array(list(np.ndindex(3, 3, 3))) - 1
    for shift in shifts:
        gaps = box.positions[None] + shift @ box.cell.array - box.positions[new][:, None]
        close = np.linalg.norm(gaps, axis=-1) < closeness * (sizes[new][:, None] + sizes[None])
        if not shift.any():
            close[:, new] = False
        if close.any():
            return False
    return True
