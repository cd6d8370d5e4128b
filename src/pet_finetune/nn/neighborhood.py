"""Which edges of a batch count in the network, and how much."""

import torch
from torch import Tensor, nn

from pet_finetune.backends import Accelerated
from pet_finetune.graph import Batch, Neighborhood, keep_edges, make_layout

from .adaptive import grid_cutoffs, solver_cutoffs
from .cutoff import bump_step, cosine_step

# Added under the square root so that its derivative stays finite; part of the trained model.
TINY = 1e-15


class NeighborhoodBuilder(Accelerated, nn.Module):
    """Selects the edges within the (adaptive) cutoff and weighs them; it has no parameters.

    Args:
        cutoff, cutoff_width, adaptive_width: Angstrom.
        cutoff_function: ``Bump`` or ``Cosine``.
        num_neighbors_adaptive: wanted neighbours per atom; None for one cutoff for all.
        adaptive_method: ``solver`` or ``grid``.
    """

    def __init__(
        self,
        *,
        cutoff: float,
        cutoff_function: str,
        cutoff_width: float,
        num_neighbors_adaptive: float | None,
        adaptive_method: str,
        adaptive_width: float,
    ) -> None:
        super().__init__()
        self.cutoff, self.cutoff_width = cutoff, cutoff_width
        self.bump = cutoff_function == "Bump"
        self.adaptive = num_neighbors_adaptive is not None
        self.wanted = float(num_neighbors_adaptive or 0.0)
        self.solver = adaptive_method == "solver"
        self.adaptive_width = adaptive_width
        self.tiny = TINY

    def forward(self, batch: Batch) -> Neighborhood:
        """The neighbourhoods of a batch; longer edges are dropped."""
        vectors, reverse = batch.edge_vectors, batch.reverse
        centers, neighbors = batch.centers, batch.neighbors
        distances = torch.linalg.vector_norm(vectors, dim=-1) + self.tiny
        within = distances <= self.cutoff
        if not bool(within.all()):
            kept, reverse = keep_edges(within, reverse)
            vectors, distances = vectors[kept], distances[kept]
            centers, neighbors = centers[kept], neighbors[kept]
        num_atoms = batch.numbers.size(0)
        if self.adaptive:
            per_atom = self.radii(distances, centers, num_atoms)
            # Both directions of a pair must agree on being there, hence the mean of their radii.
            radii = (per_atom[centers] + per_atom[neighbors]) / 2.0
            kept, reverse = keep_edges(distances <= radii, reverse)
            vectors, distances, radii = vectors[kept], distances[kept], radii[kept]
            centers, neighbors = centers[kept], neighbors[kept]
            x = (distances - (radii - self.cutoff_width)) / self.cutoff_width
        else:
            x = (distances - (self.cutoff - self.cutoff_width)) / self.cutoff_width
        rectangle = True
        if not torch.jit.is_scripting():
            rectangle = not self.backend.fused
        return Neighborhood(
            vectors=vectors,
            distances=torch.sqrt(torch.sum(vectors**2, dim=-1) + self.tiny),
            factors=bump_step(x) if self.bump else cosine_step(x),
            centers=centers,
            neighbors=neighbors,
            reverse=reverse,
            layout=make_layout(centers, num_atoms, rectangle),
        )

    def radii(self, distances: Tensor, centers: Tensor, num_atoms: int) -> Tensor:
        """The adaptive radius of each atom, [n_atoms], Angstrom."""
        wanted, width = self.wanted, self.adaptive_width
        if self.solver:
            return solver_cutoffs(distances, centers, num_atoms, wanted, self.cutoff, width)
        return grid_cutoffs(distances, centers, num_atoms, wanted, self.cutoff, width)
