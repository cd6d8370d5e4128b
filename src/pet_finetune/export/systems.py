"""From an engine's systems and their neighbour lists to the tensors of a model."""

from typing import NamedTuple

import torch
from metatensor.torch import Labels
from metatomic.torch import NeighborListOptions, System
from torch import Tensor

from pet_finetune.graph import renumbered


class Flat(NamedTuple):
    """Several systems as one, as in :class:`~pet_finetune.graph.Batch`.

    Attributes:
        numbers: [n_atoms] int64, atomic numbers.
        positions: [n_atoms, 3], Angstrom; with the engine's gradients, as vectors and cells.
        vectors: [n_edges, 3], Angstrom.
        centers, neighbors, reverse: [n_edges] int64, sorted by centre.
        samples: [n_atoms, 2] int64: system of each atom, and its place there.
        sizes: [n_structures] int64, atoms of each.
        cells: [n_structures, 3, 3].
    """

    numbers: Tensor
    positions: Tensor
    vectors: Tensor
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    samples: Tensor
    sizes: Tensor
    cells: Tensor


def flatten(systems: list[System], neighbors: NeighborListOptions, cutoff: float) -> Flat:
    """Join systems; edges beyond the cutoff, which an engine may keep in its lists, are left out.

    Args:
        systems: at least one.
        neighbors: the list that was asked for.
        cutoff: Angstrom.
    """
    numbers: list[Tensor] = []
    positions: list[Tensor] = []
    cells: list[Tensor] = []
    vectors: list[Tensor] = []
    pairs: list[Tensor] = []
    sizes: list[int] = []
    num_atoms = 0
    for system in systems:
        block = system.get_neighbor_list(neighbors)
        # Rows: first atom, second atom, three cell shifts.
        samples = block.samples.values.to(torch.int64)
        pairs.append(torch.cat([samples[:, :2] + num_atoms, samples[:, 2:]], dim=1))
        vectors.append(block.values.reshape(-1, 3))
        numbers.append(system.types)
        positions.append(system.positions)
        cells.append(system.cell)
        sizes.append(len(system))
        num_atoms += len(system)
    all_pairs, all_vectors = torch.cat(pairs), torch.cat(vectors)
    distances = torch.linalg.vector_norm(all_vectors.detach(), dim=-1)
    near = torch.nonzero(distances <= cutoff).squeeze(-1)
    all_pairs = all_pairs[near]
    order, reverse = pair_up(all_pairs, num_atoms)
    all_pairs = all_pairs[order]
    device = all_pairs.device
    size = torch.tensor(sizes, device=device)
    structure_index = torch.arange(len(systems), device=device).repeat_interleave(size)
    first = size.cumsum(0) - size
    place = torch.arange(num_atoms, device=device) - first[structure_index]
    return Flat(
        torch.cat(numbers).to(torch.int64),
        torch.cat(positions),
        all_vectors[near[order]],
        all_pairs[:, 0],
        all_pairs[:, 1],
        reverse,
        torch.stack([structure_index, place], dim=1),
        size,
        torch.stack(cells),
    )


def pair_up(pairs: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Sort directed pairs and find the opposite of each.

    A pair without its opposite is left out. There is one only where a distance equals the cutoff
    to the last digit and an engine decided on the two directions apart; it weighs nothing there.

    Args:
        pairs: [n, 5] int64: centre, neighbour, cell shift of the neighbour.
        num_atoms: of all systems together.

    Returns:
        The pairs to take, in order of their centres, and for each of those the place of its
        opposite among them; both [n_edges].
    """
    if pairs.size(0) == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=pairs.device)
        return nothing, nothing
    centers, neighbors, shifts = pairs[:, 0], pairs[:, 1], pairs[:, 2:]
    reach = shifts.abs().max()
    keys, order = sort_keys(centers, neighbors, shifts, reach, num_atoms).sort()
    opposite = sort_keys(neighbors, centers, -shifts, reach, num_atoms)[order]
    places = torch.searchsorted(keys, opposite).clamp_max(len(keys) - 1)
    paired = keys[places] == opposite
    if bool(paired.all()):
        return order, places
    kept = torch.nonzero(paired).squeeze(-1)
    reverse = renumbered(kept, places)
    return order[kept], reverse


def sort_keys(
    centers: Tensor, neighbors: Tensor, shifts: Tensor, reach: Tensor, num_atoms: int
) -> Tensor:
    """One integer for each pair that sorts as centre, neighbour and shift do, [n] int64."""
    key = centers * num_atoms + neighbors
    for axis in range(3):
        key = key * (2 * reach + 1) + (shifts[:, axis] + reach)
    return key


def selected_rows(selected: Labels, sizes: Tensor) -> Tensor:
    """Which atoms of the joined systems are selected, [n_selected] int64, in their order.

    Args:
        selected: with the columns ``system`` and ``atom``.
        sizes: [n_structures], atoms of each system.
    """
    first = sizes.cumsum(0) - sizes
    return first[selected.column("system").to(torch.int64)] + selected.column("atom")


def integer_input(systems: list[System], name: str, low: int, high: int, missing: int) -> Tensor:
    """A whole number of each system, [n_structures] int64, that the engine hands over.

    Args:
        systems: with or without this input.
        name: of the input.
        low: the smallest value that the model knows.
        high: the largest.
        missing: what systems without it are taken to have.
    """
    values = torch.full((len(systems),), missing, dtype=torch.int64, device=systems[0].device)
    for index, system in enumerate(systems):
        if name in system.known_data():
            given = float(system.get_data(name).block().values.reshape(()))
            if given != round(given) or given < low or given > high:
                raise ValueError(
                    f"the {name} of system {index} is {given}; "
                    f"this model knows whole numbers from {low} to {high}"
                )
            values[index] = round(given)
    return values
