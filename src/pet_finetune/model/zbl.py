"""Ziegler-Biersack-Littmark screened nuclear repulsion, switched off at bonding distance.

The universal potential of Ziegler, Biersack and Littmark (1985) with the polynomial switch of
LAMMPS' ``pair_style zbl`` (https://docs.lammps.org/pair_zbl.html), inner radius 0 and outer
radius the sum of the covalent radii.
"""

# No postponed annotations: an export scripts this module, and torch.jit reads types, not strings.
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .species_rows import species_table

#: Covalent radii in Å by atomic number from 0 (Cordero et al., Dalton Trans. 2008, 2832; as in
#: ``ase.data``), 0.2 where there is none. Here because the network does not import ASE.
COVALENT_RADII = (
    0.2, 0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21, 1.11, 1.07,
    1.05, 1.02, 1.06, 2.03, 1.76, 1.7, 1.6, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22,
    1.2, 1.19, 1.2, 1.2, 1.16, 2.2, 1.95, 1.9, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45,
    1.44, 1.42, 1.39, 1.39, 1.38, 1.39, 1.4, 2.44, 2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98,
    1.96, 1.94, 1.92, 1.92, 1.89, 1.9, 1.87, 1.87, 1.75, 1.7, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36,
    1.32, 1.45, 1.46, 1.48, 1.4, 1.5, 1.5, 2.6, 2.21, 2.15, 2.06, 2, 1.96, 1.9, 1.87, 1.8, 1.69,
    2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
)  # fmt: skip

_COULOMB = 14.399645478425668  # e^2 / (4 pi epsilon_0), eV Angstrom
_LENGTH = 0.46850  # Angstrom
_POWER = 0.23
_AMPLITUDES = (0.02817, 0.28022, 0.50986, 0.18175)
_DECAYS = (0.20162, 0.40290, 0.94229, 3.19980)


class ZBL(nn.Module):
    """Pair repulsion for the species of a model.

    Args:
        species: atomic numbers, ascending.
        radii: covalent radii in Angstrom, [n_species].
    """

    covalent_radii: Tensor
    species_index: Tensor

    def __init__(self, species: Sequence[int], radii: Tensor) -> None:
        super().__init__()
        self.register_buffer("species_index", species_table(species), persistent=False)
        self.register_buffer("covalent_radii", radii.to(torch.float64))
        self.coulomb, self.length, self.power = _COULOMB, _LENGTH, _POWER
        self.amplitudes, self.decays = list(_AMPLITUDES), list(_DECAYS)

    def rearranged(self, species: Sequence[int]) -> "ZBL":
        """One for other species; those known today keep their radii."""
        radii = covalent_radii(species).to(self.covalent_radii)
        for index, number in enumerate(species):
            known = int(self.species_index[number]) if number < len(self.species_index) else -1
            if known >= 0:
                radii[index] = self.covalent_radii[known]
        return ZBL(species, radii.cpu()).to(radii)

    @property
    def cutoff(self) -> float:
        """The longest distance at which any pair still repels, Angstrom."""
        return 2.0 * float(self.covalent_radii.max())

    def forward(self, z_i: Tensor, z_j: Tensor, distances: Tensor) -> Tensor:
        """Half the pair energy of each directed edge, eV.

        Args:
            z_i: [n_edges] atomic numbers of the centres.
            z_j: [n_edges] of their neighbours.
            distances: [n_edges], Angstrom.

        Returns:
            [n_edges]; the sum over both directions of a pair is its energy.
        """
        radii = self.covalent_radii
        outer = (radii[self.species_index[z_i]] + radii[self.species_index[z_j]]).to(distances)
        # Single precision in any model: metatrain's rounding of what depends on the elements
        # alone (1e-8 eV) is part of the potential.
        single_i, single_j = z_i.to(torch.float32), z_j.to(torch.float32)
        screening = self.length / (single_i**self.power + single_j**self.power)
        decays = _column(self.decays, distances) / screening
        amplitudes = _column(self.amplitudes, distances)
        strength = (self.coulomb * single_i * single_j).to(distances)
        energy, _, _ = _screened(strength, distances, amplitudes, decays)
        with torch.no_grad():
            at_outer, slope, curvature = _screened(strength, outer, amplitudes, decays)
            cubic = (-3 * slope + outer * curvature) / outer**2
            quartic = (2 * slope - outer * curvature) / outer**3
            constant = -at_outer + outer * slope / 2 - outer**2 * curvature / 12
        switch = cubic / 3 * distances**3 + quartic / 4 * distances**4 + constant
        return torch.where(distances > outer, 0.0, 0.5 * (energy + switch))


def covalent_radii(species: Sequence[int]) -> Tensor:
    """Covalent radii, [n_species] float64, Angstrom."""
    return torch.tensor([COVALENT_RADII[number] for number in species], dtype=torch.float64)


def _column(values: list[float], like: Tensor) -> Tensor:
    """[n_values, 1] in the type and on the device of a tensor."""
    # Not torch.tensor(values): in TorchScript that rounds to float32 on the way.
    return torch.stack([like.new_full((1,), value) for value in values])


def _screened(
    strength: Tensor, r: Tensor, amplitudes: Tensor, decays: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Screened Coulomb energy and its first two derivatives with respect to r."""
    terms = amplitudes * torch.exp(-decays * r)
    phi = terms.sum(0)
    d_phi = -(decays * terms).sum(0)
    d2_phi = (decays**2 * terms).sum(0)
    energy = strength / r * phi
    slope = strength / r * (d_phi - phi / r)
    curvature = strength / r * (d2_phi - 2 / r * d_phi + 2 * phi / r**2)
    return energy, slope, curvature
