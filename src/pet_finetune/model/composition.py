"""Per-species baselines: the part of an energy that counting atoms explains.

Kept in float64 whatever the network's precision, because total energies of thousands of eV
must not eat the meV that matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pet_finetune.nn.buffers import FixedBuffers

from .species_rows import species_table

_ITERATIONS = 6


class Composition(FixedBuffers):
    """Values per species for each target: energies in eV, others in the target's unit.

    Args:
        species: atomic numbers the model knows, ascending.
    """

    species_index: Tensor

    def __init__(self, species: Sequence[int]) -> None:
        super().__init__()
        self.num_species = len(species)
        self.register_buffer("species_index", species_table(species), persistent=False)

    def rearrange_species(self, species: Sequence[int], sources: Sequence[int | None]) -> None:
        """Keep baselines of other species, in place.

        Args:
            species: atomic numbers, ascending.
            sources: for each of them the entry it takes over today; None for the mean of all.
        """
        for name, values in list(self._buffers.items()):
            if name.startswith("weights_") and values is not None:
                picked = [values.mean(0) if s is None else values[s] for s in sources]
                self.register_buffer(name, torch.stack(picked))
        self.num_species = len(species)
        self.species_index = species_table(species).to(self.species_index.device)

    def get(self, target: str) -> Tensor:
        """The baselines of a target, [n_species] float64; zeros when none were set.

        Targets with several values have [n_species, n_values].
        """
        weights = self._buffers.get(f"weights_{target}")
        if weights is None:
            return torch.zeros(
                self.num_species, dtype=torch.float64, device=self.species_index.device
            )
        return weights

    def set(self, target: str, weights: Tensor) -> None:
        """Replace the baselines of a target by [n_species] values, or [n_species, n_values]."""
        if weights.dim() not in (1, 2) or len(weights) != self.num_species:
            raise ValueError(f"expected {self.num_species} baselines, got {tuple(weights.shape)}")
        weights = weights.detach().to(torch.float64).to(self.species_index.device).clone()
        self.register_buffer(f"weights_{target}", weights)

    def forward(self, numbers: Tensor, target: str) -> Tensor:
        """Baseline of each atom, [n_atoms] or [n_atoms, n_values] float64."""
        return self.get(target)[self.species_index[numbers]]


def fit_composition(
    counts: Tensor, energies: Tensor, ridge: float | Tensor, atoms: Tensor | None = None
) -> Tensor:
    """Baselines per species that explain the energies best, per atom.

    Least squares on energies per atom, regularised by Tikhonov iteration: each pass fits what
    the last left over with the same small ridge. Directions that the data determine converge
    to the plain least-squares answer; directions that they do not (a set with one composition
    only) stay near zero, where the plain problem has no unique answer.

    Args:
        counts: [n_structures, n_species] atoms of each species.
        energies: [n_structures] what is to be explained, eV: the labels, or the labels less the
            predictions of a model whose baselines are to be shifted.
        ridge: strength relative to the mean squared fraction of a species; one number, or
            [n_species] of them.
        atoms: [n_structures] atoms of each structure, where ``counts`` leaves species out.

    Returns:
        [n_species] float64, eV; zero for species that do not occur.
    """
    atoms = (counts.sum(1) if atoms is None else atoms).to(torch.float64)
    fractions = counts.to(torch.float64) / atoms.unsqueeze(1)
    wanted = energies.to(torch.float64) / atoms
    gram = fractions.T @ fractions
    # A trace of regularisation always: species that do not occur make the matrix singular.
    strengths = torch.as_tensor(ridge, dtype=torch.float64).clamp_min(1e-12).expand(len(gram))
    typical = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(gram + torch.diag(strengths * typical))
    weights = torch.zeros(gram.shape[0], dtype=torch.float64)
    for _ in range(_ITERATIONS):
        left = wanted - fractions @ weights
        step = torch.cholesky_solve((fractions.T @ left).unsqueeze(1), factor).squeeze(1)
        weights = weights + step
    return torch.where(counts.sum(0) > 0, weights, 0.0)


class Scale(FixedBuffers):
    """One factor per target between the network's outputs and the target's unit.

    Beside it a target may have relative factors for each species and value, which metatrain's
    models of properties have.
    """

    def get(self, target: str) -> Tensor:
        """The factor of a target, a float64 scalar; 1 when none was set."""
        factor = self._buffers.get(f"factor_{target}")
        return torch.ones((), dtype=torch.float64) if factor is None else factor

    def set(self, target: str, factor: float | Tensor) -> None:
        """Replace the factor of a target."""
        device = factor.device if isinstance(factor, Tensor) else self.get(target).device
        value = torch.as_tensor(factor, dtype=torch.float64, device=device)
        value = value.detach().reshape(()).clone()
        self.register_buffer(f"factor_{target}", value)

    def relative(self, target: str) -> Tensor | None:
        """Factors beside that of :meth:`get`, [n_species, num_subtargets] float64, or None."""
        return self._buffers.get(f"relative_{target}")

    def set_relative(self, target: str, factors: Tensor | None) -> None:
        """Replace the relative factors of a target."""
        self._buffers.pop(f"relative_{target}", None)
        if factors is not None:
            value = factors.detach().to(torch.float64).clone()
            self.register_buffer(f"relative_{target}", value)

    def rearrange_species(self, sources: Sequence[int | None]) -> None:
        """Take relative factors over from other species, as ``Composition`` does baselines."""
        for name, values in list(self._buffers.items()):
            if name.startswith("relative_") and values is not None:
                picked = [values.mean(0) if s is None else values[s] for s in sources]
                self.register_buffer(name, torch.stack(picked))
