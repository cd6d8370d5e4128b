"""Which chemical elements a set of structures holds, and whether a model knows them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from ase.data import chemical_symbols

from pet_finetune.errors import SpeciesError

from .on_disk import OnDisk
from .structure import Structure

__all__ = ["check_species", "find_species", "of_species"]

_FRAMES_SHOWN = 5


def find_species(structures: Sequence[Structure]) -> tuple[int, ...]:
    """Atomic numbers that occur, ascending."""
    if isinstance(structures, OnDisk):
        return structures.species
    return tuple(sorted({z for s in structures for z in np.unique(s.numbers.numpy()).tolist()}))


def of_species(structures: Sequence[Structure], species: Collection[int]) -> list[Structure]:
    """Those structures that hold no other elements than these."""
    known = torch.tensor(sorted(species))
    return [s for s in structures if bool(torch.isin(s.numbers, known).all())]


def check_species(
    structures: Sequence[Structure], species: Collection[int], advice: str = ""
) -> None:
    """Make sure that a model knows all elements.

    Args:
        structures: what is to be predicted or trained on.
        species: atomic numbers the model knows.
        advice: what else can be done about it, for the end of the message.

    Raises:
        SpeciesError: names each unknown element, how many atoms and structures have it and the
            first frames.
    """
    known = set(species)
    if isinstance(structures, OnDisk):
        structures = structures.with_species(set(structures.species) - known)
    atoms: dict[int, int] = {}
    frames: dict[int, list[str]] = {}
    for structure in structures:
        elements, counts = np.unique(structure.numbers.numpy(), return_counts=True)
        for number, count in zip(elements.tolist(), counts.tolist(), strict=True):
            if number not in known:
                atoms[number] = atoms.get(number, 0) + count
                frames.setdefault(number, []).append(structure.where)
    if not atoms:
        return
    lines = []
    for number in sorted(atoms):
        shown = "; ".join(frames[number][:_FRAMES_SHOWN])
        more = len(frames[number]) - _FRAMES_SHOWN
        lines.append(
            f"  {chemical_symbols[number]} (Z={number}): {atoms[number]} atoms in "
            f"{len(frames[number])} structures: {shown}" + (f" and {more} more" if more > 0 else "")
        )
    symbols = " ".join(chemical_symbols[number] for number in sorted(known))
    raise SpeciesError(
        "The structures hold elements that the model does not know:\n"
        + "\n".join(lines)
        + f"\nThe model knows: {symbols}. Remove these structures or start from a model that "
        f"covers them.{advice and ' '}{advice}"
    )
