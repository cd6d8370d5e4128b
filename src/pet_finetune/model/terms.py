"""Terms added to the network: baselines, scales, short-range repulsion.

Baselines of species are the part of an energy that counting atoms explains. They are kept in
float64 whatever the network's precision, because total energies of thousands of eV must not eat the
meV that matter. The repulsion is the universal potential of Ziegler, Biersack and Littmark (1985)
with the polynomial switch of LAMMPS' ``pair_style zbl`` (https://docs.lammps.org/pair_zbl.html),
inner radius 0 and outer radius the sum of the covalent radii.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pet_finetune.errors import PetFinetuneError
from pet_finetune.nn.quantized import FixedBuffers


def species_table(species: Sequence[int]) -> Tensor:
    """Position of each atomic number among ``species``, [max(species) + 1]; -1 where absent."""
    table = torch.full((max(species) + 1,), -1)
    table[list(species)] = torch.arange(len(species))
    return table


def with_more(species: Sequence[int], new: Sequence[int], like: Mapping[int, int]) -> list[int]:
    """The species with new ones, ascending.

    Args:
        species: known ones.
        new: others.
        like: for some of the new, the known one to start with.

    Raises:
        PetFinetuneError: one is known already, or the one to start from is not.
    """
    known = [number for number in new if number in species]
    lacking = [number for number in like.values() if number not in species]
    if known or lacking:
        what = f"has the species {known} already" if known else f"lacks the species {lacking}"
        raise PetFinetuneError(f"The model {what}; its species are {tuple(species)}.")
    return sorted((*species, *new))


def without(species: Sequence[int], numbers: Iterable[int]) -> list[int]:
    """The species that are left without some of them.

    Raises:
        PetFinetuneError: one is not there, or none would be left.
    """
    gone = set(numbers)
    left = [number for number in species if number not in gone]
    if not gone <= set(species) or not left:
        raise PetFinetuneError(f"Of the species {tuple(species)}, {sorted(gone)} cannot go.")
    return left


def sources_of(old: Sequence[int], new: Sequence[int], like: Mapping[int, int]) -> list[int | None]:
    """For each of the new species the row of the old table that it takes over, or None."""
    rows = {number: row for row, number in enumerate(old)}
    return [rows.get(number, rows.get(like.get(number, 0))) for number in new]


def pick_rows(table: Tensor, sources: Sequence[int | None]) -> Tensor:
    """Rows of a table, [n_species, width], in another order, some of them twice, others new.

    ``sources`` are the rows copied, or None for a random one: normal, with the mean and the spread
    that each column has in the table.
    """
    mean, spread = table.mean(0), table.std(0, correction=0)
    rows = []
    for source in sources:
        if source is None:
            noise = torch.randn(table.shape[1]).to(table)  # drawn on the CPU: the same anywhere
            rows.append(mean + spread * noise)
        else:
            rows.append(table[source])
    return torch.stack(rows)


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
        """Keep baselines of other species, ascending, in place.

        ``sources`` are the entries they take over today; None is the mean of all.
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
        """Factors relative to :meth:`get`, [n_species, num_subtargets] float64, or None."""
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
        """Copy for other species; known species keep their radii."""
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
