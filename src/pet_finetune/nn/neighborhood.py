"""The neighbourhoods of a batch: which edges count, how they pair up, how attention sees them.

Tokens live in one flat array: first a centre token per atom, then a token per edge. Linear
layers, norms and activations work on that array and never touch padding, and so does the fused
attention. Attention by plain torch operations needs a rectangle of [n_atoms, 1 + most neighbours]
slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .adaptive import ADAPTIVE_METHODS
from .cutoff import CUTOFF_FUNCTIONS
from .gather import pad_rows, permute_rows, unpad_rows

# Added under the square root so that its derivative stays finite; part of the trained model.
TINY = 1e-15


@dataclass(frozen=True)
class Slots:
    """Where each token sits in the padded rectangle that attention works on.

    Attributes:
        token_of_slot: [n_atoms * width], index of the flat token in each slot (0 in empty ones).
        slot_of_token: [n_atoms + n_edges], index of the slot that holds each flat token.
        empty: [n_empty], the slots that hold no token; None when there is none such.
        width: slots an atom has, 1 + the largest number of neighbours.
    """

    token_of_slot: Tensor
    slot_of_token: Tensor
    empty: Tensor | None
    width: int

    def pad(self, tokens: Tensor) -> Tensor:
        """[n_atoms + n_edges, ...] to [n_atoms, width, ...], zeros in empty slots."""
        padded = pad_rows(tokens, self.token_of_slot, self.slot_of_token, self.empty)
        return padded.view(-1, self.width, *tokens.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[n_atoms, width, ...] to [n_atoms + n_edges, ...]; empty slots are dropped."""
        rows = padded.flatten(0, 1)
        return unpad_rows(rows, self.token_of_slot, self.slot_of_token, self.empty)


@dataclass(frozen=True)
class Layout:
    """Which tokens belong to which atom; made once a forward, in the form that is asked for.

    Attributes:
        centers: [n_edges] int64, the centre atom of each edge, sorted.
        num_atoms: number of atoms; atoms without edges are allowed.
    """

    centers: Tensor
    num_atoms: int

    @cached_property
    def counts(self) -> Tensor:
        """Edges of each atom, [n_atoms] int64."""
        return torch.bincount(self.centers, minlength=self.num_atoms)

    @cached_property
    def starts(self) -> Tensor:
        """First edge of each atom and, last, the number of edges; [n_atoms + 1] int64."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @cached_property
    def slots(self) -> Slots:
        """The padded rectangle."""
        num_atoms, num_edges = self.num_atoms, len(self.centers)
        device = self.centers.device
        width = 1 + (int(self.counts.max()) if num_atoms else 0)
        edges = torch.arange(num_edges, device=device)
        atoms = torch.arange(num_atoms, device=device)
        edge_slots = self.centers * width + 1 + edges - self.starts[self.centers]
        slot_of_token = torch.cat([atoms * width, edge_slots])
        token_of_slot = torch.zeros(num_atoms * width, dtype=torch.int64, device=device)
        token_of_slot[slot_of_token] = torch.arange(num_atoms + num_edges, device=device)
        empty = None
        if num_atoms * width > num_atoms + num_edges:
            in_use = torch.zeros(num_atoms * width, dtype=torch.bool, device=device)
            in_use[slot_of_token] = True
            empty = torch.nonzero(~in_use).squeeze(-1)
        return Slots(token_of_slot, slot_of_token, empty, width)


@dataclass(frozen=True)
class Neighborhood:
    """Edges within the cutoff and what the network needs to know of them.

    Attributes:
        vectors: [n_edges, 3], from centre to neighbour, Angstrom; carries the gradient.
        distances: [n_edges], Angstrom.
        factors: [n_edges], cutoff factors between 0 and 1.
        centers, neighbors, reverse: [n_edges], centre atom, neighbour atom, and the index of the
            edge that runs the other way. Sorted by centre.
        layout: the tokens of each atom.
    """

    vectors: Tensor
    distances: Tensor
    factors: Tensor
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    layout: Layout

    def reversed(self, edge_tokens: Tensor) -> Tensor:
        """The tokens of the edges j->i in the order of the edges i->j, [n_edges, d]."""
        return permute_rows(edge_tokens, self.reverse, self.reverse)


def keep_edges(mask: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the edges to keep and their renumbered reverse edges."""
    kept = torch.nonzero(mask).squeeze(-1)
    new_index = torch.cumsum(mask, 0) - 1
    return kept, new_index[reverse[kept]]


def build_neighborhood(
    vectors: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    reverse: Tensor,
    num_atoms: int,
    *,
    cutoff: float,
    cutoff_function: str,
    cutoff_width: float,
    num_neighbors_adaptive: float | None,
    adaptive_method: str,
    adaptive_width: float,
) -> Neighborhood:
    """Select the edges within the (adaptive) cutoff and weigh them.

    Args:
        vectors: [n_edges, 3], Angstrom; edges longer than the cutoff are dropped.
        centers, neighbors, reverse: [n_edges] int64, sorted by centre; every edge's reverse
            is in the list.
        num_atoms: number of atoms.
        cutoff, cutoff_width, adaptive_width: Angstrom.
        cutoff_function: ``Bump`` or ``Cosine``.
        num_neighbors_adaptive: wanted neighbours per atom; None for one cutoff for all.
        adaptive_method: ``solver`` or ``grid``.
    """
    distances = torch.linalg.vector_norm(vectors, dim=-1) + TINY
    within = distances <= cutoff
    if not bool(within.all()):
        kept, reverse = keep_edges(within, reverse)
        vectors, distances = vectors[kept], distances[kept]
        centers, neighbors = centers[kept], neighbors[kept]
    radii: Tensor | float = cutoff
    if num_neighbors_adaptive is not None:
        per_atom = ADAPTIVE_METHODS[adaptive_method](
            distances, centers, num_atoms, num_neighbors_adaptive, cutoff, adaptive_width
        )
        # Both directions of a pair must agree on being there, hence the mean of their radii.
        radii = (per_atom[centers] + per_atom[neighbors]) / 2.0
        kept, reverse = keep_edges(distances <= radii, reverse)
        vectors, distances, radii = vectors[kept], distances[kept], radii[kept]
        centers, neighbors = centers[kept], neighbors[kept]
    factors = CUTOFF_FUNCTIONS[cutoff_function](distances, radii, cutoff_width)
    return Neighborhood(
        vectors=vectors,
        distances=torch.sqrt(torch.sum(vectors**2, dim=-1) + TINY),
        factors=factors,
        centers=centers,
        neighbors=neighbors,
        reverse=reverse,
        layout=Layout(centers, num_atoms),
    )
