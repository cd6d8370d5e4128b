"""Batches of structures as graphs, and the neighbourhoods that the network sees of them.

Tokens live in one flat array: first a centre token per atom, then a token per edge. Linear
layers, norms and activations work on that array and never touch padding, and so does the fused
attention. Attention by plain torch operations needs padded rectangles.

:class:`Edges` holds all whose size depends on where the atoms are. It is made beside the network,
so that what is left of the network is a function of tensors that tracing can follow.

Not postponed annotations: TorchScript reads those of a NamedTuple as they are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Rectangles(NamedTuple):
    """Place of each token in the padded rectangles of attention.

    A rectangle has a row for each of its atoms and a column for each token of the one with most.
    Atoms with many neighbours have one of their own, so that few slots are empty.

    Attributes:
        slots: of each rectangle [atoms, width] int64: flat tokens; in empty slots the own centre.
        slot_of_token: [n_atoms + n_edges] int64, where each flat token is among the slots of all
            rectangles, one behind the other.
        token_of_slot: [n_slots] int64, all of ``slots``.
        empty: [n_slots] bool, whether a slot holds no token.
    """

    slots: list[Tensor]
    slot_of_token: Tensor
    token_of_slot: Tensor
    empty: Tensor


class Layout(NamedTuple):
    """Which tokens belong to which atom.

    Attributes:
        starts: [n_atoms + 1] int64, first edge of each atom (some have none), and number of edges.
        rectangles: for attention by plain torch operations; None where nothing needs them.
    """

    starts: Tensor
    rectangles: Rectangles | None


class Edges(NamedTuple):
    """Which edges of a batch a network sees. Nothing of it has a gradient.

    Attributes:
        within: [n_within] int64, the edges of the batch within the largest cutoff; None for all.
        kept: [n_edges] int64, which of those are within the adaptive cutoffs of their atoms; None
            where cutoffs are not adaptive.
        centers: [n_edges] int64, the centre of each edge that is left, ascending.
        neighbors: [n_edges] int64, the neighbour of each.
        reverse: [n_edges] int64, the index of the edge that runs the other way.
        layout: the tokens of each atom.
        radii: [n_atoms] Angstrom, adaptive cutoffs as their solver found them; None without it.
    """

    within: Tensor | None
    kept: Tensor | None
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    layout: Layout
    radii: Tensor | None


class Neighborhood(NamedTuple):
    """Edges within the cutoff, with the quantities that the network needs.

    Attributes:
        geometry: [n_edges, 4], from centre to neighbour, and how far, Angstrom; has the gradient.
        factors: [n_edges], cutoff factors between 0 and 1.
        centers, neighbors, reverse: [n_edges], centre atom, neighbour atom, and the index of the
            edge that runs the other way. Sorted by centre.
        layout: the tokens of each atom.
    """

    geometry: Tensor
    factors: Tensor
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    layout: Layout


def make_layout(centers: Tensor, num_atoms: int, rectangles: bool) -> Layout:
    """The tokens of each atom.

    Args:
        centers: [n_edges] int64, the centre atom of each edge, sorted.
        num_atoms: number of atoms.
        rectangles: whether attention needs them.
    """
    atoms = torch.arange(num_atoms + 1, device=centers.device)
    starts = torch.searchsorted(centers.contiguous(), atoms)
    return Layout(starts, _rectangles(centers, starts) if rectangles else None)


def _rectangles(centers: Tensor, starts: Tensor) -> Rectangles:
    num_atoms, device = starts.size(0) - 1, starts.device
    counts, order = starts.diff().sort(stable=True)
    slots: list[Tensor] = []
    firsts: list[Tensor] = []
    empty: list[Tensor] = []
    begin, before = 0, 0
    for end, width in _cuts(counts, num_atoms + centers.size(0)):
        atoms, columns = order[begin:end].unsqueeze(1), torch.arange(width, device=device)
        missing = columns > counts[begin:end].unsqueeze(1)
        tokens = starts[atoms] + columns + (num_atoms - 1)
        slots.append(torch.where(missing | (columns == 0), atoms, tokens))
        empty.append(missing.flatten())
        firsts.append(before + width * torch.arange(end - begin, device=device))
        before += width * (end - begin)
        begin = end
    first = torch.empty_like(order).index_copy(0, order, torch.cat(firsts))
    edges = torch.arange(centers.size(0), device=device)
    slot_of_token = torch.cat([first, first[centers] + 1 + edges - starts[centers]])
    token_of_slot = torch.cat([tokens.flatten() for tokens in slots])
    return Rectangles(slots, slot_of_token, token_of_slot, torch.cat(empty))


def _cuts(counts: Tensor, num_tokens: int) -> list[tuple[int, int]]:
    """End and width of each rectangle of atoms, in ascending order of neighbours.

    One, two, four or eight rectangles, as few as leave hardly a slot empty. Each has two atoms:
    a compiled graph would take a size of one for a constant.
    """
    num_atoms = counts.size(0)
    if num_atoms == 0:
        return [(0, 1)]
    # Few places, for reading numbers from a GPU takes time: sixteenths, ever finer to the end.
    parts, left = [part * num_atoms // 16 for part in range(1, 15)], num_atoms // 16
    while left > 1:
        parts.append(num_atoms - left)
        left = left // 2
    ends: list[int] = []
    for part in parts:
        if 0 < part // 2 * 2 <= num_atoms - 2:
            ends.append(part // 2 * 2)
    ends.append(num_atoms)
    places = torch.tensor(ends, device=counts.device)
    widths: list[int] = (1 + counts[places - 1]).tolist()
    chosen = [len(ends) - 1]
    least = _num_slots(chosen, ends, widths)
    while len(chosen) < 8:
        spare, count = least - num_tokens, len(chosen)
        if spare <= 0.15 * num_tokens or spare < 1024:  # more launches would cost more than those
            break
        for _ in range(count):
            best = chosen
            for new in range(len(ends)):
                cut = sorted(chosen + [new])
                if _num_slots(cut, ends, widths) < least:
                    best, least = cut, _num_slots(cut, ends, widths)
            chosen = best
        if len(chosen) == count:
            break
    return [(ends[i], widths[i] if len(chosen) == 1 else max(2, widths[i])) for i in chosen]


def _num_slots(chosen: list[int], ends: list[int], widths: list[int]) -> int:
    slots, begin = 0, 0
    for i in chosen:
        slots += (ends[i] - begin) * widths[i]
        begin = ends[i]
    return slots


def renumbered(kept: Tensor, reverse: Tensor) -> Tensor:
    """The reverse of each of some edges among themselves, [n_kept].

    ``kept`` is ascending and has with each edge its reverse.
    """
    place = torch.empty_like(reverse)
    place[kept] = torch.arange(kept.size(0), device=kept.device)
    return place[reverse[kept]]


class Batch(NamedTuple):
    """``b`` structures with ``n`` atoms and ``e`` directed edges in all; lengths in Å.

    Edges may be longer than the model's cutoff (a skin); the model filters them. Atoms and edges
    of one structure are contiguous, in the order of the structures.

    Attributes:
        numbers: [n] int64, atomic numbers.
        positions: [n, 3], of the atoms; long-range features alone read them.
        edge_vectors: [e, 3], from centre to neighbour.
        centers: [e] int64, the central atom of each edge, ascending.
        neighbors: [e] int64, the neighbouring atom of each edge.
        reverse: [e] int64, the opposite edge of each edge.
        structure_index: [n] int64, the structure of each atom, ascending.
        cells: [b, 3, 3], cell vectors as rows; zero rows where not periodic.
        charges: [b] int64, total charges.
        spins: [b] int64, spin multiplicities 2S+1.
        edges: which of the edges a network sees, where that was found beforehand. It holds for the
            network it was made for, and for these lengths of the edges.
    """

    numbers: Tensor
    positions: Tensor
    edge_vectors: Tensor
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    structure_index: Tensor
    cells: Tensor
    charges: Tensor
    spins: Tensor
    edges: Edges | None = None

    @property
    def num_atoms(self) -> int:
        """Number of atoms ``n``."""
        return self.numbers.shape[0]

    @property
    def num_structures(self) -> int:
        """Number of structures ``b``."""
        return self.cells.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of directed edges ``e``."""
        return self.centers.shape[0]

    @property
    def atoms_per_structure(self) -> Tensor:
        """Number of atoms of each structure, [b] int64."""
        # Not `bincount`: on a GPU it makes the CPU wait for everything queued before it.
        counts = self.structure_index.new_zeros(self.num_structures)
        return counts.index_add_(0, self.structure_index, torch.ones_like(self.structure_index))

    @property
    def volumes(self) -> Tensor:
        """Cell volumes in Å³, [b]; 0 where not periodic in all three directions."""
        first, second, third = self.cells.unbind(1)  # not det(), which takes a dozen operations
        return (torch.linalg.cross(first, second) * third).sum(-1).abs()

    def first(self, count: int) -> "Batch":
        """The first structures alone."""
        atoms = int((self.structure_index < count).sum())
        edges = int((self.centers < atoms).sum())
        return Batch(
            numbers=self.numbers[:atoms],
            positions=self.positions[:atoms],
            edge_vectors=self.edge_vectors[:edges],
            centers=self.centers[:edges],
            neighbors=self.neighbors[:edges],
            reverse=self.reverse[:edges],
            structure_index=self.structure_index[:atoms],
            cells=self.cells[:count],
            charges=self.charges[:count],
            spins=self.spins[:count],
        )

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> "Batch":
        """Move to a device and cast the floats; integers keep their type."""

        def move(tensor: Tensor) -> Tensor:
            cast = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=cast, non_blocking=non_blocking)

        return self.map(move)

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies without the CPU waiting."""
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor replaced by what a function makes of it."""
        mapped: Batch = tree_map_only(Tensor, function, self)
        return mapped


def join_graphs(graphs: Sequence[Batch]) -> Batch:
    """Several batches as one, with int64 indices: concatenation and offsets, nothing else."""
    sizes = torch.tensor([[g.num_atoms, g.num_edges, g.num_structures] for g in graphs])
    before = (sizes.cumsum(0) - sizes).tolist()
    pairs = list(zip(graphs, before, strict=True))

    def shifted(name: str, column: int) -> Tensor:
        return torch.cat([getattr(g, name).to(torch.int64) + shift[column] for g, shift in pairs])

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(graph, name) for graph in graphs])

    return Batch(
        numbers=joined("numbers"),
        positions=joined("positions"),
        edge_vectors=joined("edge_vectors"),
        centers=shifted("centers", 0),
        neighbors=shifted("neighbors", 0),
        reverse=shifted("reverse", 1),
        structure_index=shifted("structure_index", 2),
        cells=joined("cells"),
        charges=joined("charges"),
        spins=joined("spins"),
    )


def repeat_batch(batch: Batch, count: int) -> Batch:
    """The structures of a batch several times over: all of them in each turn."""
    return join_graphs([batch] * count)


def rotate_graphs(batch: Batch, rotations: Tensor) -> Batch:
    """Rotate each structure (``R v``, R [b, 3, 3]); the edges that a network sees stay the same."""
    transposed = rotations.to(batch.cells.dtype).transpose(1, 2)
    # Centres ascend, so the edges of a structure end where its last atom's edges end.
    ends = torch.searchsorted(batch.centers, batch.atoms_per_structure.cumsum(0))
    edges = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return batch._replace(
        positions=rotate_rows(batch.positions, transposed, batch.atoms_per_structure.tolist()),
        edge_vectors=rotate_rows(batch.edge_vectors, transposed, edges),
        cells=batch.cells @ transposed,
    )


def rotate_rows(vectors: Tensor, transposed: Tensor, counts: list[int]) -> Tensor:
    """Multiply runs of row vectors by one matrix each.

    Several times faster on a CPU than gathering a matrix for every vector.

    Args:
        vectors: [m, 3], the runs of all structures one after another.
        transposed: [b, 3, 3].
        counts: length of each structure's run; they add up to ``m``.

    Returns:
        [m, 3].
    """
    runs = zip(torch.split(vectors, counts), transposed.to(vectors.dtype), strict=True)
    return torch.cat([run @ matrix for run, matrix in runs])
