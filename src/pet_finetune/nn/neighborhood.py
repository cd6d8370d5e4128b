"""Which edges of a batch count in the network, and how much.

Smooth cutoff functions are 1 inside and 0 at the cutoff, with a taper of a given width. Formulas:
PET paper (arXiv:2305.19302) for the cosine; the bump is the C-infinity step
``(1 + tanh(cot(pi x))) / 2`` that metatrain uses for its current models.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pet_finetune.backends.choice import Accelerated
from pet_finetune.backends.reference import join
from pet_finetune.graph import Batch, Edges, Neighborhood, make_layout, renumbered


def bump_step(x: Tensor) -> Tensor:
    """The bump over the taper, from 1 at ``x = 0`` to 0 at ``x = 1``; TorchScript compiles it."""
    # cot(pi x) as a tangent, a hair inside its open interval, where it is still finite. `hardtanh`
    # is a clamp whose derivative is one operation.
    angle = torch.rsub(x, math.pi / 2, alpha=math.pi)
    most = math.pi * (0.5 - 1e-6)
    return torch.sigmoid(2.0 * torch.tan(nn.functional.hardtanh(angle, -most, most)))


def cosine_step(x: Tensor) -> Tensor:
    """Smooth step with a cosine."""
    return 0.5 * (1.0 + torch.cos(torch.pi * x.clamp(0.0, 1.0)))


def _sum_over_neighbors(values: Tensor, centers: Tensor, num_atoms: int) -> Tensor:
    return values.new_zeros(num_atoms).index_add(0, centers, values)


def _count(
    radii: Tensor, distances: Tensor, centers: Tensor, width: float, largest: float, wanted: float
) -> Tensor:
    """Smoothed neighbour count at the given radii, shape [n_atoms]."""
    steps = bump_step((distances - (radii[centers] - width)) / width)
    inside = _sum_over_neighbors(steps, centers, radii.size(0))
    return inside + wanted * (radii / largest) ** 3


def _slope(
    radii: Tensor, distances: Tensor, centers: Tensor, width: float, largest: float, wanted: float
) -> Tensor:
    """Derivative of :func:`_count` with respect to the radius, in closed form."""
    x = (distances - (radii[centers] - width)) / width
    tapering = (x > 0.0) & (x < 1.0)
    angle = math.pi * x.clamp(1e-6, 1.0 - 1e-6)  # as the bump itself
    sine = torch.sin(angle)
    tanh = torch.tanh(torch.cos(angle) / sine)
    per_edge = (0.5 * math.pi / width) * (1.0 - tanh * tanh) / (sine * sine) * tapering
    inside = _sum_over_neighbors(per_edge, centers, radii.size(0))
    slope = inside + 3.0 * wanted * (radii / largest) ** 2 / largest
    return slope.clamp_min(1e-6)  # it divides


def solve_cutoffs(
    distances: Tensor, centers: Tensor, num_atoms: int, wanted: float, largest: float, width: float
) -> Tensor:
    """Radii at which the smoothed count equals ``wanted``, by safeguarded Newton steps.

    Args:
        distances: [n_edges], Angstrom.
        centers: [n_edges], the atom each edge belongs to.
        num_atoms: number of atoms.
        wanted: wanted number of neighbours.
        largest: largest radius, Angstrom.
        width: taper of the smoothed count, Angstrom.

    Returns:
        [n_atoms] radii in Angstrom, without gradients.
    """
    newton_steps = 10
    with torch.no_grad():
        low = distances.new_zeros(num_atoms)
        high = distances.new_full((num_atoms,), largest)
        radii = 0.5 * high
        for _ in range(newton_steps):
            excess = _count(radii, distances, centers, width, largest, wanted) - wanted
            slope = _slope(radii, distances, centers, width, largest, wanted)
            low = torch.where(excess <= 0, radii, low)
            high = torch.where(excess <= 0, high, radii)
            newton = radii - excess / slope
            bracketed = (newton >= low) & (newton <= high)
            radii = torch.where(bracketed, newton, 0.5 * (low + high))
    return radii


def solver_cutoffs(
    distances: Tensor, centers: Tensor, radii: Tensor, wanted: float, largest: float, width: float
) -> Tensor:
    """Solver cutoffs with gradients, from a last step by the implicit function theorem.

    It is ``r - (n(r) - wanted) / n'(r)`` with ``r`` and ``n'`` held constant.

    Args:
        distances: as for :func:`solve_cutoffs`.
        centers: as there.
        radii: [n_atoms], what it found.
        wanted: as there.
        largest: as there.
        width: as there.

    Returns:
        [n_atoms] radii in Angstrom, differentiable with respect to ``distances``.
    """
    with torch.no_grad():
        slope = _slope(radii, distances, centers, width, largest, wanted)
    excess = _count(radii, distances, centers, width, largest, wanted) - wanted
    stepped = radii - excess / slope
    return stepped.clamp(largest / 16.0, largest)


def grid_cutoffs(
    distances: Tensor, centers: Tensor, num_atoms: int, wanted: float, largest: float, width: float
) -> Tensor:
    """Radii as Gaussian-weighted averages over a grid of probes; arguments of the solver.

    A probe's weight falls off with the distance of its count from ``wanted``, in units of the
    count's own slope along the grid.
    """
    smallest = 0.5  # Angstrom
    probes = torch.arange(
        smallest, largest, width / 4.0, device=distances.device, dtype=distances.dtype
    )
    per_edge = bump_step((distances.unsqueeze(0) - (probes.unsqueeze(1) - width)) / width)
    counts = per_edge.new_zeros(len(probes), num_atoms).index_add(1, centers, per_edge).T
    if counts.numel() == 0:
        return distances.new_zeros(num_atoms)
    uniform = torch.linspace(0, 1, len(probes), device=probes.device, dtype=probes.dtype)
    excess = counts - wanted + wanted * uniform**3
    if len(probes) == 1:
        spread = excess.abs() * 0.5 + 1e-12
    else:
        spread = torch.gradient(excess, dim=-1)[0].abs().clamp_min(1e-12)
    log_weights = -0.5 * (excess / spread) ** 2
    weights = torch.exp(log_weights - log_weights.max())
    return (weights / weights.sum(dim=1, keepdim=True)) @ probes


# Added under the square root so that its derivative stays finite; part of the trained model.
TINY = 1e-15


class Near(NamedTuple):
    """The edges within the largest cutoff.

    Attributes:
        within: [n] int64, which of the batch's they are; None for all of them.
        vectors: [n, 3] Angstrom.
        distances: [n] Angstrom.
        centers: [n] int64.
        neighbors: [n] int64.
        radii: [n_atoms] Angstrom, what the solver of adaptive cutoffs found; None without it.
    """

    within: Tensor | None
    vectors: Tensor
    distances: Tensor
    centers: Tensor
    neighbors: Tensor
    radii: Tensor | None


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
        """The neighbourhoods of a batch, by its edges or, without them, those found here."""
        near, radii = self.near(batch)
        edges = batch.edges
        if edges is None:
            edges = self.choose(batch, near, radii)
        vectors, distances = near.vectors, near.distances
        kept = edges.kept
        if radii is not None and kept is not None:
            vectors, distances = vectors[kept], distances[kept]
            x = (distances - (radii[kept] - self.cutoff_width)) / self.cutoff_width
        else:
            x = (distances - (self.cutoff - self.cutoff_width)) / self.cutoff_width
        return Neighborhood(
            geometry=join([vectors, distances.unsqueeze(-1)], 1),
            factors=bump_step(x) if self.bump else cosine_step(x),
            centers=edges.centers,
            neighbors=edges.neighbors,
            reverse=edges.reverse,
            layout=edges.layout,
        )

    def with_edges(self, batch: Batch) -> Batch:
        """A batch with its edges chosen, for graphs that cannot depend on values.

        On a GPU that spares it some waiting for them, and a traced graph needs it.
        """
        with torch.no_grad():
            near, radii = self.near(batch._replace(edges=None))
            return batch._replace(edges=self.choose(batch, near, radii))

    def near(self, batch: Batch) -> tuple[Near, Tensor | None]:
        """The edges within the largest cutoff, and the adaptive radius of each, [n] Angstrom."""
        within: Tensor | None = None
        edges = batch.edges
        vectors, centers, neighbors = batch.edge_vectors, batch.centers, batch.neighbors
        if edges is not None:
            within = edges.within
        else:
            inside = torch.linalg.vector_norm(vectors, dim=-1) + self.tiny <= self.cutoff
            near = torch.nonzero(inside).squeeze(-1)  # on a GPU one wait, as asking for all() is
            if near.size(0) < centers.size(0):
                within = near
        if within is not None:
            vectors, centers, neighbors = vectors[within], centers[within], neighbors[within]
        else:
            # A tensor of its own, so that gradients are added up in one order either way, and a
            # longer neighbour list changes no bit.
            vectors = vectors.view(-1, 3)
        distances = torch.sqrt(torch.sum(vectors**2, dim=-1) + self.tiny)
        if not self.adaptive:
            return Near(within, vectors, distances, centers, neighbors, None), None
        num_atoms, wanted, width = batch.numbers.size(0), self.wanted, self.adaptive_width
        found: Tensor | None = None
        if edges is not None:
            found = edges.radii
        if self.solver:
            if found is None:
                found = solve_cutoffs(distances, centers, num_atoms, wanted, self.cutoff, width)
            per_atom = solver_cutoffs(distances, centers, found, wanted, self.cutoff, width)
        else:
            per_atom = grid_cutoffs(distances, centers, num_atoms, wanted, self.cutoff, width)
        # Both directions of a pair must agree on being there, hence the mean of their radii.
        of_edges = (per_atom[centers] + per_atom[neighbors]) / 2.0
        return Near(within, vectors, distances, centers, neighbors, found), of_edges

    def choose(self, batch: Batch, near: Near, radii: Tensor | None, margin: float = 0.0) -> Edges:
        """Which of them count, by how long they are.

        Args:
            batch: the structures.
            near: from :meth:`near`.
            radii: from there.
            margin: by how much longer than the adaptive ones they may be, Angstrom.
        """
        reverse, centers, neighbors = batch.reverse, near.centers, near.neighbors
        within = near.within  # TorchScript narrows the types of variables alone
        if within is not None:
            reverse = renumbered(within, reverse)
        kept: Tensor | None = None
        if radii is not None:
            kept = torch.nonzero(near.distances <= radii + margin).squeeze(-1)
            reverse = renumbered(kept, reverse)
            centers, neighbors = centers[kept], neighbors[kept]
        rectangles = True
        if not torch.jit.is_scripting():
            rectangles = not self.backend.fused
        layout = make_layout(centers, batch.numbers.size(0), rectangles)
        return Edges(within, kept, centers, neighbors, reverse, layout, near.radii)


class SteadyEdges:
    """The edges of atoms that move, chosen once for many steps, so that no step reads numbers.

    All edges of the neighbour list go into the network, or those that are up to a margin longer
    than the adaptive cutoffs: what does not count has a factor of zero.

    Args:
        builder: of the network.
        margin: Angstrom.
    """

    def __init__(self, builder: NeighborhoodBuilder, margin: float = 0.3) -> None:
        self._builder, self._margin = builder, margin
        self._all: Edges | None = None
        self._edges: Edges | None = None
        self._left = torch.empty(0)

    @torch.no_grad()
    def choose(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with its edges, and by how much the nearest of the others do not count.

        The number, in Angstrom on the batch's device, is for :meth:`hold`. The batch has the
        tensors of the same neighbour list as long as that is used.
        """
        known = self._all
        if known is None or known.centers is not batch.centers:
            layout = make_layout(batch.centers, batch.num_atoms, rectangles=False)
            known = Edges(None, None, batch.centers, batch.neighbors, batch.reverse, layout, None)
            self._all, self._edges = known, None
        near, radii = self._builder.near(batch._replace(edges=known))
        if self._edges is None:
            self._edges = self._builder.choose(batch, near, radii, self._margin)
            self._left = torch.zeros_like(near.distances)
            if self._edges.kept is not None:
                self._left[self._edges.kept] = torch.inf
        slack = near.distances.new_full((1,), torch.inf)
        if radii is not None:
            slack = torch.cat([slack, near.distances - radii + self._left]).min()
        return batch._replace(edges=self._edges._replace(radii=near.radii)), slack

    def hold(self, slack: float) -> bool:
        """Whether all relevant edges were included, by the number of :meth:`choose`."""
        if not slack > self._margin / 2:
            self._edges = None
        return not slack <= 0.0
