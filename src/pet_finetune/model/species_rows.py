"""Tables with a row for each species, made for other species."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pet_finetune.errors import PetFinetuneError


def species_table(species: Sequence[int]) -> Tensor:
    """Position of each atomic number among ``species``, [max(species) + 1]; -1 where absent."""
    table = torch.full((max(species) + 1,), -1)
    table[list(species)] = torch.arange(len(species))
    return table


def with_more(species: Sequence[int], new: Sequence[int], like: Mapping[int, int]) -> list[int]:
    """The species with new ones, ascending.

    Args:
        species: known ones.
        new: others.
        like: for some of the new, the known one to start with.

    Raises:
        PetFinetuneError: one is known already, or the one to start from is not.
    """
    known = [number for number in new if number in species]
    lacking = [number for number in like.values() if number not in species]
    if known or lacking:
        what = f"has the species {known} already" if known else f"lacks the species {lacking}"
        raise PetFinetuneError(f"The model {what}; its species are {tuple(species)}.")
    return sorted((*species, *new))


def without(species: Sequence[int], numbers: Iterable[int]) -> list[int]:
    """The species that are left without some of them.

    Raises:
        PetFinetuneError: one is not there, or none would be left.
    """
    gone = set(numbers)
    left = [number for number in species if number not in gone]
    if not gone <= set(species) or not left:
        raise PetFinetuneError(f"Of the species {tuple(species)}, {sorted(gone)} cannot go.")
    return left


def sources_of(old: Sequence[int], new: Sequence[int], like: Mapping[int, int]) -> list[int | None]:
    """For each of the new species the row of the old table that it takes over, or None."""
    rows = {number: row for row, number in enumerate(old)}
    return [rows.get(number, rows.get(like.get(number, 0))) for number in new]


def pick_rows(table: Tensor, sources: Sequence[int | None]) -> Tensor:
    """Rows of a table in another order, some of them twice, others new.

    Args:
        table: [n_species, width].
        sources: for each row of the result the one it copies, or None for a random one: normal,
            with the mean and the spread that each column has in the table.

    Returns:
        [len(sources), width].
    """
    mean, spread = table.mean(0), table.std(0, correction=0)
    rows = []
    for source in sources:
        if source is None:
            noise = torch.randn(table.shape[1]).to(table)  # drawn on the CPU: the same anywhere
            rows.append(mean + spread * noise)
        else:
            rows.append(table[source])
    return torch.stack(rows)
