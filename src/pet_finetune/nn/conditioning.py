"""Total charge and spin multiplicity as features of every atom of a structure."""

import torch
from torch import Tensor, nn

from .rowwise import SiLU


class SystemConditioning(nn.Module):
    """Embeds charge and spin multiplicity; starts as a no-op because its last layer is zero."""

    def __init__(self, width: int, max_charge: int, max_spin_multiplicity: int) -> None:
        super().__init__()
        self.max_charge = max_charge
        self.max_spin_multiplicity = max_spin_multiplicity
        self.charge_embedding = nn.Embedding(2 * max_charge + 1, width)
        self.spin_multiplicity_embedding = nn.Embedding(max_spin_multiplicity, width)
        gate = nn.Linear(width, width)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        self.project = nn.Sequential(nn.Linear(2 * width, width), SiLU(), gate)

    def forward(self, charges: Tensor, spins: Tensor, structure_index: Tensor) -> Tensor:
        """Per-atom features [n_atoms, width] from per-structure integers.

        Args:
            charges: [n_structures] int64, within plus or minus ``max_charge``.
            spins: [n_structures] int64, 2S + 1, from 1 to ``max_spin_multiplicity``.
            structure_index: [n_atoms].
        """
        charge = self.charge_embedding(charges + self.max_charge)
        spin = self.spin_multiplicity_embedding(spins - 1)
        features: Tensor = self.project(torch.cat([charge, spin], dim=-1))
        return features[structure_index]
