"""Neutral closed-shell molecules, grown from fragments by random substitution, and their shapes."""

from __future__ import annotations

import hashlib

import numpy as np
from ase import Atoms
from fragments import CORES, ELEMENTS, LEFT_OUT, SUBSTITUENTS
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem

__all__ = ["conformer", "force_field", "grow", "part_of", "read_smiles", "to_atoms"]

RDLogger.DisableLog("rdApp.*")
SWAPS = {
    6: (7, 8, 14, 16, 15, 5),
    7: (15,),
    8: (16,),
}  # element of a chain atom: what it may become
PARTS = {"test": 2.5, "validation": 2.5}  # per cent of the molecules


def read_smiles(smiles: str) -> str:
    """Canonical spelling."""
    return str(Chem.MolToSmiles(Chem.MolFromSmiles(smiles)))


EXCLUDED = frozenset(read_smiles(smiles) for smiles in LEFT_OUT)


def part_of(name: str) -> str:
    """Which part of the data everything of this molecule or composition belongs to.

    A function of the name alone, so that more data can be made later without a leak.
    """
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 1000 / 10
    if place < PARTS["test"]:
        return "test"
    return "validation" if place < PARTS["test"] + PARTS["validation"] else "train"


def grow(rng: np.random.Generator, max_heavy: int = 10) -> str:
    """A random molecule as canonical SMILES, neutral and with at most ``max_heavy`` heavy atoms."""
    while True:
        molecule = Chem.MolFromSmiles(str(rng.choice(CORES)))
        for _ in range(int(rng.choice(5, p=(0.1, 0.3, 0.3, 0.2, 0.1)))):
            molecule = substituted(molecule, rng) or molecule
        if rng.random() < 0.25:
            molecule = swapped(molecule, rng) or molecule
        if molecule.GetNumHeavyAtoms() <= max_heavy and acceptable(molecule):
            return str(Chem.MolToSmiles(molecule))


def acceptable(molecule: Chem.Mol) -> bool:
    """Neutral, closed shell, of the elements that the foundation is for, in no benchmark set."""
    with_h = Chem.AddHs(molecule)
    return (
        Chem.GetFormalCharge(molecule) == 0
        and all(atom.GetNumRadicalElectrons() == 0 for atom in molecule.GetAtoms())
        and all(atom.GetSymbol() in ELEMENTS for atom in molecule.GetAtoms())
        and with_h.GetNumAtoms() > 1
        and Chem.MolToSmiles(molecule) not in EXCLUDED
    )


def substituted(molecule: Chem.Mol, rng: np.random.Generator) -> Chem.Mol | None:
    """A hydrogen replaced by a random substituent; None where none can be."""
    free = [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetTotalNumHs() > 0]
    if not free:
        return None
    other = Chem.MolFromSmiles(str(rng.choice(SUBSTITUENTS)))
    both = Chem.RWMol(Chem.CombineMols(molecule, other))
    first, second = int(rng.choice(free)), molecule.GetNumAtoms()
    for index in (first, second):
        atom = both.GetAtomWithIdx(index)
        atom.SetNumExplicitHs(max(atom.GetNumExplicitHs() - 1, 0))
    both.AddBond(first, second, Chem.BondType.SINGLE)
    return sane(both)


def swapped(molecule: Chem.Mol, rng: np.random.Generator) -> Chem.Mol | None:
    """One atom replaced by another element; None where the result is no molecule."""
    candidates = [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetAtomicNum() in SWAPS]
    if not candidates:
        return None
    changed = Chem.RWMol(molecule)
    atom = changed.GetAtomWithIdx(int(rng.choice(candidates)))
    atom.SetAtomicNum(int(rng.choice(SWAPS[atom.GetAtomicNum()])))
    atom.SetNumExplicitHs(0)
    atom.SetNoImplicit(False)
    return sane(changed)


def sane(molecule: Chem.RWMol) -> Chem.Mol | None:
    try:
        Chem.SanitizeMol(molecule)
    except Chem.MolSanitizeException:
        return None
    return molecule.GetMol()


def conformer(smiles: str, rng: np.random.Generator) -> Chem.Mol | None:
    """The molecule with hydrogens and one random conformer; None where none can be embedded."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    seed = int(rng.integers(1, 2**31 - 1))
    if AllChem.EmbedMolecule(molecule, randomSeed=seed, maxAttempts=20) != 0:
        return None
    field = force_field(molecule)
    if field is not None:
        field.Minimize(maxIts=200)
    return molecule


def force_field(molecule: Chem.Mol):
    """MMFF94 where it knows all atoms, else UFF, else None."""
    if AllChem.MMFFHasAllMoleculeParams(molecule):
        return AllChem.MMFFGetMoleculeForceField(
            molecule, AllChem.MMFFGetMoleculeProperties(molecule)
        )
    if AllChem.UFFHasAllMoleculeParams(molecule):
        return AllChem.UFFGetMoleculeForceField(molecule)
    return None


def to_atoms(molecule: Chem.Mol) -> Atoms:
    """Elements and positions (Angstrom) of the molecule's conformer."""
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Atoms(numbers, molecule.GetConformer().GetPositions())
