"""What a potential says of energies, and the derivatives that make forces and stresses of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pet_finetune.backends.reference import permute_rows
from pet_finetune.graph import Batch


@dataclass(frozen=True)
class Prediction:
    """What a potential says of a batch.

    Attributes:
        energy: [n_structures] float64, eV.
        atom_energies: [n_atoms] float64, eV; they sum to ``energy``.
        forces: [n_atoms, 3], eV/Angstrom, or None.
        stress: [n_structures, 3, 3], eV/Angstrom^3, symmetric, zero without a 3D cell; or None.
    """

    energy: Tensor
    atom_energies: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None


def forces_of(batch: Batch, gradient: Tensor) -> Tensor:
    """Forces from the energy's gradient on the edge vectors r_j - r_i, [n_atoms, 3]."""
    pulls = gradient - permute_rows(gradient, batch.reverse, batch.reverse)
    return gradient.new_zeros(batch.num_atoms, 3).index_add(0, batch.centers, pulls)


def stress_of(batch: Batch, gradient: Tensor) -> Tensor:
    """Symmetric stress, [n_structures, 3, 3]; zero where no volume is defined."""
    outer = batch.edge_vectors.detach().unsqueeze(-1) * gradient.unsqueeze(-2)
    virial = gradient.new_zeros(batch.num_structures, 3, 3).index_add(
        0, batch.structure_index[batch.centers], outer
    )
    volumes = batch.volumes.view(-1, 1, 1)
    inverse = torch.where(volumes > 0, 1.0 / volumes.clamp_min(1e-30), 0.0)
    return 0.5 * (virial + virial.transpose(1, 2)) * inverse
