"""The neighbourhoods of a batch: which edges count, how they pair up, how attention sees them.

Tokens live in one flat array: first a centre token per atom, then a token per edge. Linear
layers, norms and activations work on that array and never touch padding, and so does the fused
attention. Attention by plain torch operations needs a rectangle of [n_atoms, 1 + most neighbours]
slots.

:class:`Edges` holds all whose size depends on where the atoms are. It is made beside the network,
so that what is left of the network is a function of tensors that tracing can follow.

Not postponed annotations: TorchScript reads those of a NamedTuple as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Edges", "Layout", "Neighborhood", "Rectangle", "make_layout", "renumbered"]


class Rectangle(NamedTuple):
    """Where each token sits in the padded rectangle that attention works on.

    Its width is 1 + the largest number of neighbours.

    Attributes:
        token_of_slot: [n_atoms, width], index of the flat token in each slot (0 in empty ones).
        slot_of_token: [n_atoms + n_edges], index of the slot that holds each flat token.
        empty: [n_atoms * width] bool, whether a slot holds no token.
    """

    token_of_slot: Tensor
    slot_of_token: Tensor
    empty: Tensor


class Layout(NamedTuple):
    """Which tokens belong to which atom.

    Attributes:
        starts: [n_atoms + 1] int64, first edge of each atom and, last, the number of edges; atoms
            without edges are allowed.
        rectangle: for attention by plain torch operations; None where nothing needs it.
    """

    starts: Tensor
    rectangle: Rectangle | None


class Edges(NamedTuple):
    """Which edges of a batch a network sees. Nothing of it has a gradient.

    Attributes:
        within: [n_within] int64, the edges of the batch that are within the largest cutoff; None
            where all are.
        kept: [n_edges] int64, which of those are within the adaptive cutoffs of their atoms; None
            where cutoffs are not adaptive.
        centers: [n_edges] int64, the centre of each edge that is left, ascending.
        neighbors: [n_edges] int64, the neighbour of each.
        reverse: [n_edges] int64, the index of the edge that runs the other way.
        layout: the tokens of each atom.
    """

    within: Tensor | None
    kept: Tensor | None
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    layout: Layout


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
    return Layout(starts, _rectangle(centers, starts) if rectangle else None)


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
    slots = token_of_slot.clamp_min(0).view(num_atoms, width)
    return Rectangle(slots, slot_of_token, token_of_slot < 0)


def renumbered(kept: Tensor, reverse: Tensor) -> Tensor:
    """The reverse of each of some edges among themselves, [n_kept].

    Args:
        kept: [n_kept] int64, ascending; with each edge its reverse.
        reverse: [n] int64, of all edges.
    """
    place = torch.empty_like(reverse)
    place[kept] = torch.arange(kept.size(0), device=kept.device)
    return place[reverse[kept]]
