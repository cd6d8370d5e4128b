"""The neighbourhoods of a batch: which edges count, how they pair up, how attention sees them.

Tokens live in one flat array: first a centre token per atom, then a token per edge. Linear
layers, norms and activations work on that array and never touch padding, and so does the fused
attention. Attention by plain torch operations needs a rectangle of [n_atoms, 1 + most neighbours]
slots.

Not postponed annotations: TorchScript reads those of a NamedTuple as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Neighborhood", "Rectangle", "keep_edges", "make_layout"]


class Rectangle(NamedTuple):
    """Where each token sits in the padded rectangle that attention works on.

    Attributes:
        token_of_slot: [n_atoms * width], index of the flat token in each slot (0 in empty ones).
        slot_of_token: [n_atoms + n_edges], index of the slot that holds each flat token.
        empty: [n_empty], the slots that hold no token.
        width: slots an atom has, 1 + the largest number of neighbours.
    """

    token_of_slot: Tensor
    slot_of_token: Tensor
    empty: Tensor
    width: int


class Layout(NamedTuple):
    """Which tokens belong to which atom.

    Attributes:
        num_atoms: number of atoms; atoms without edges are allowed.
        starts: [n_atoms + 1] int64, first edge of each atom and, last, the number of edges.
        rectangle: for attention by plain torch operations; None where nothing needs it.
    """

    num_atoms: int
    starts: Tensor
    rectangle: Rectangle | None


class Neighborhood(NamedTuple):
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


def make_layout(centers: Tensor, num_atoms: int, rectangle: bool) -> Layout:
    """The tokens of each atom.

    Args:
        centers: [n_edges] int64, the centre atom of each edge, sorted.
        num_atoms: number of atoms.
        rectangle: whether attention needs it.
    """
    atoms = torch.arange(num_atoms + 1, device=centers.device)
    starts = torch.searchsorted(centers.contiguous(), atoms)
    return Layout(num_atoms, starts, _rectangle(centers, starts) if rectangle else None)


def _rectangle(centers: Tensor, starts: Tensor) -> Rectangle:
    num_atoms, num_edges = starts.size(0) - 1, centers.size(0)
    device = centers.device
    width = 1
    if num_edges > 0:
        width += int(starts.diff().max())
    edges = torch.arange(num_edges, device=device)
    atoms = torch.arange(num_atoms, device=device)
    edge_slots = centers * width + 1 + edges - starts[centers]
    slot_of_token = torch.cat([atoms * width, edge_slots])
    token_of_slot = torch.full((num_atoms * width,), -1, dtype=torch.int64, device=device)
    token_of_slot[slot_of_token] = torch.arange(num_atoms + num_edges, device=device)
    empty = torch.nonzero(token_of_slot < 0).squeeze(-1)
    return Rectangle(token_of_slot.clamp_min(0), slot_of_token, empty, width)


def keep_edges(mask: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the edges to keep and their renumbered reverse edges."""
    kept = torch.nonzero(mask).squeeze(-1)
    new_index = torch.cumsum(mask, 0) - 1
    return kept, new_index[reverse[kept]]
