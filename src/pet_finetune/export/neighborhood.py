"""The edges of a batch in the part of Python that TorchScript compiles; see :mod:`.network`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pet_finetune.config import ModelOptions
from pet_finetune.nn.adaptive import grid_cutoffs, solver_cutoffs
from pet_finetune.nn.cutoff import bump_step, cosine_step
from pet_finetune.nn.neighborhood import keep_edges


class Hood(NamedTuple):
    """The edges that count, as in :class:`~pet_finetune.nn.neighborhood.Neighborhood`.

    Attributes:
        vectors: [n_edges, 3].
        distances: [n_edges].
        factors: [n_edges].
        centers, neighbors, reverse: [n_edges].
        slots: [n_atoms + n_edges], the slot of each token in a rectangle of [n_atoms, width].
        width: slots an atom has.
        num_atoms: rows of the rectangle.
    """

    vectors: Tensor
    distances: Tensor
    factors: Tensor
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    slots: Tensor
    width: int
    num_atoms: int


def token_slots(centers: Tensor, num_atoms: int) -> tuple[Tensor, int]:
    """The slots of centre and edge tokens and the width of their rectangle; see :class:`Hood`."""
    counts = torch.bincount(centers, minlength=num_atoms)
    width = 1
    if centers.numel() > 0:
        width += int(counts.max())
    starts = counts.cumsum(0) - counts
    edges = torch.arange(centers.size(0), device=centers.device)
    atoms = torch.arange(num_atoms, device=centers.device)
    edge_slots = centers * width + 1 + edges - starts[centers]
    return torch.cat([atoms * width, edge_slots]), width


def placed(rows: Tensor, places: Tensor, room: Tensor) -> Tensor:
    """Each row at its place among those of ``room``; unlike a gather's, its gradient is fast."""
    return room.index_copy(0, places, rows)


def key_bias(hood: Hood) -> Tensor:
    """What is added to the scores, [n_atoms, 1, 1, width]: minus infinity in empty slots."""
    logarithms = torch.log(hood.factors.clamp_min(1e-15))
    weights = torch.cat([logarithms.new_zeros(hood.num_atoms), logarithms])
    room = weights.new_full((hood.num_atoms * hood.width,), -torch.inf)
    return placed(weights, hood.slots, room).view(hood.num_atoms, 1, 1, hood.width)


class PlainNeighborhood(nn.Module):
    """:func:`~pet_finetune.nn.neighborhood.build_neighborhood` with the options of a model."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.cutoff, self.cutoff_width = options.cutoff, options.cutoff_width
        self.bump = options.cutoff_function == "Bump"
        self.adaptive = options.num_neighbors_adaptive is not None
        self.wanted = float(options.num_neighbors_adaptive or 0.0)
        self.solver = options.adaptive_cutoff_method == "solver"
        self.adaptive_width = options.cutoff_width_adaptive

    def forward(
        self, vectors: Tensor, centers: Tensor, neighbors: Tensor, reverse: Tensor, num_atoms: int
    ) -> Hood:
        """Select edges, sorted by centre and each with its reverse, and weigh them."""
        distances = torch.linalg.vector_norm(vectors, dim=-1) + 1e-15
        kept, reverse = keep_edges(distances <= self.cutoff, reverse)
        vectors, distances = vectors[kept], distances[kept]
        centers, neighbors = centers[kept], neighbors[kept]
        radii = torch.full_like(distances, self.cutoff)
        if self.adaptive:
            per_atom = self.adaptive_radii(distances, centers, num_atoms)
            radii = (per_atom[centers] + per_atom[neighbors]) / 2.0
            kept, reverse = keep_edges(distances <= radii, reverse)
            vectors, distances, radii = vectors[kept], distances[kept], radii[kept]
            centers, neighbors = centers[kept], neighbors[kept]
        x = (distances - (radii - self.cutoff_width)) / self.cutoff_width
        factors = bump_step(x) if self.bump else cosine_step(x)
        slots, width = token_slots(centers, num_atoms)
        return Hood(
            vectors,
            torch.sqrt(torch.sum(vectors**2, dim=-1) + 1e-15),
            factors,
            centers,
            neighbors,
            reverse,
            slots,
            width,
            num_atoms,
        )

    def adaptive_radii(self, distances: Tensor, centers: Tensor, num_atoms: int) -> Tensor:
        """The radius of each atom, [n_atoms], Angstrom."""
        wanted, width = self.wanted, self.adaptive_width
        if self.solver:
            return solver_cutoffs(distances, centers, num_atoms, wanted, self.cutoff, width)
        return grid_cutoffs(distances, centers, num_atoms, wanted, self.cutoff, width)
