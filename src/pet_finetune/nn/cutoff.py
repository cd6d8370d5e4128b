"""Smooth cutoff functions: 1 inside, 0 at the cutoff, with a taper of a given width.

Formulas: PET paper (arXiv:2305.19302) for the cosine; the bump is the C-infinity step
``(1 + tanh(cot(pi x))) / 2`` that metatrain uses for its current models.
"""

import math

import torch
from torch import Tensor


def bump_step(x: Tensor) -> Tensor:
    """The bump over the taper, from 1 at ``x = 0`` to 0 at ``x = 1``; TorchScript compiles it."""
    # Evaluated a hair inside its open interval, where cot() is still finite.
    x = x.clamp(1e-6, 1.0 - 1e-6)
    return 0.5 * (1.0 + torch.tanh(1.0 / torch.tan(torch.pi * x)))


def cosine_step(x: Tensor) -> Tensor:
    """The same of the cosine."""
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
    """The same with gradients, which a last step through the implicit function theorem attaches.

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
