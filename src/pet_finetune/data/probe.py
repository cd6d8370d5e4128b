"""The probe set that ships: small structures over many elements, without labels.

Molecules, neutral clusters of two or three, and simple crystals, all slightly distorted; made by
``scripts/probe/make.py``. A foundation's own predictions on those of them whose elements it knows
say what it knew before fine-tuning.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .files import read_frames
from .species import of_species
from .structure import Structure, atoms_to_structure

__all__ = ["PROBE", "probe_structures"]

#: How options and messages call the set.
PROBE = "probe"
_FILE = Path(__file__).with_name("probe.xyz")


def probe_structures(species: Collection[int]) -> list[Structure]:
    """The structures of the probe set that hold no other elements than these; may be empty."""
    frames = read_frames(_FILE)
    structures = [atoms_to_structure(atoms, i, source=PROBE) for i, atoms in enumerate(frames)]
    return of_species(structures, species)
