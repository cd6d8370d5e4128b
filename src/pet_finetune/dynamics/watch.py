"""Seeing in time that a simulation has gone wrong, and saying how."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from pet_finetune.data.contacts import Contacts

from .measure import Measurement

__all__ = ["CLOSEST", "Watch", "atom_name"]

#: Angstrom; no two nuclei come nearer in any matter a potential knows (the bond of H2 is 0.74).
CLOSEST = 0.4


@dataclass(frozen=True)
class Watch:
    """The limits of a simulation.

    Attributes:
        max_temperature: K.
        target: temperature that was asked for, K.
        alone: atoms that had no other within the model's reach from the start.
        contacts: the extremes of the distances of the structure computed last.
    """

    max_temperature: float
    target: float
    alone: frozenset[int]
    contacts: Callable[[], Contacts]

    def problem(self, row: Measurement, atoms: Atoms) -> str | None:
        """What is wrong with a step, with the atoms concerned; None where nothing is."""
        if not math.isfinite(row.potential):
            return f"the energy is {row.potential}, not a finite number"
        forces = atoms.get_forces()
        broken = np.flatnonzero(~np.isfinite(forces).all(axis=1))
        if len(broken):
            return f"the forces on {len(broken)} atoms are not finite, first {_at(atoms, broken)}"
        contacts = self.contacts()
        if contacts.distance < CLOSEST:
            assert contacts.closest is not None
            first, second = (atom_name(atoms, index) for index in contacts.closest)
            return (
                f"{first} and {second} are {contacts.distance:.2f} A apart, closer than any "
                f"two atoms can be ({CLOSEST} A)"
            )
        lost = sorted(contacts.alone - self.alone)
        if lost:
            return (
                f"{atom_name(atoms, lost[0])} has flown away: no other atom is within the model's "
                "cutoff of it" + (f" ({len(lost)} atoms in all)" if len(lost) > 1 else "")
            )
        if not row.temperature <= self.max_temperature:
            speeds = np.linalg.norm(atoms.get_velocities(), axis=1)
            return (
                f"the temperature is {row.temperature:,.0f} K, {self.target:g} K was asked for and "
                f"{self.max_temperature:,.0f} K is the limit (--max-temperature); the fastest is "
                f"{atom_name(atoms, int(speeds.argmax()))}"
            )
        return None


def atom_name(atoms: Atoms, index: int) -> str:
    """Such as ``atom 5 (H)``, counted from 0."""
    return f"atom {index} ({atoms[index].symbol})"


def _at(atoms: Atoms, indices: np.ndarray) -> str:
    return atom_name(atoms, int(indices[0]))
