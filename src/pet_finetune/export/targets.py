"""The outputs of an exported model: which there are, and what it makes of their targets."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from torch import Tensor, nn

from pet_finetune.keys import DIRECT_FORCES, DIRECT_STRESS, base_name, output_name
from pet_finetune.model.potential import Potential


def choose_outputs(
    potential: Potential, energy: str | None, only: Collection[str] | None = None
) -> dict[str, str]:
    """The outputs of a model, each with the target that it is.

    Engines ask for ``energy`` unless they are told of a variant. That name goes to the energy
    chosen, whatever the target is called, and those of its direct forces and stress go with it.

    Args:
        potential: the model.
        energy: the target that is to be ``energy``; None for none beside the one of that name.
        only: targets to take; None for all.
    """
    taken = [spec for spec in potential.targets.values() if only is None or spec.name in only]
    outputs = {output_name(spec): spec.name for spec in taken}
    if energy is None:
        return outputs
    chosen = output_name(potential.target(energy))
    variant = chosen.removeprefix(base_name(chosen))
    partners = (DIRECT_FORCES[0], *DIRECT_STRESS)
    plain = {base: outputs[base + variant] for base in partners if base + variant in outputs}
    if energy == outputs.get("energy"):
        return outputs
    return {**outputs, **plain, "energy": energy}


def uncertainty_outputs(
    potentials: Sequence[Potential], outputs: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Names of the outputs for uncertainties and ensembles, by energy.

    Several potentials are a committee; one has what its last layers give.
    """
    spreads: dict[str, str] = {}
    ensembles: dict[str, str] = {}
    first = potentials[0]
    for output, target in outputs.items():
        layer = first.uncertainty_of(target)
        base, slash, variant = output.partition("/")
        if len(potentials) > 1 or (layer is not None and first.target(target).is_energy):
            spreads[output] = f"{base}_uncertainty{slash}{variant}"
            if layer is None or layer.num_members:
                ensembles[output] = f"{base}_ensemble{slash}{variant}"
    return spreads, ensembles


class Wanted(NamedTuple):
    """Rows, samples and systems for which outputs are requested.

    Attributes:
        rows: [n] atoms of the joined systems.
        samples: [n, 2]: the system of each, and its place there.
        systems: [n_systems], ascending.
        cells: of all systems, [n_structures, 3, 3], Angstrom, in the type of the results.
    """

    rows: Tensor
    samples: Tensor
    systems: Tensor
    cells: Tensor


class PlainTarget(nn.Module):
    """The scale and the baselines of one target.

    Args:
        potential: without adapters; its parts are shared.
        target: which one.
        output: metatomic's name for it.
    """

    species_index: Tensor
    scales: Tensor
    baselines: Tensor

    def __init__(self, potential: Potential, target: str, output: str) -> None:
        super().__init__()
        spec = potential.target(target)
        # Of standard quantities it is asked for: their name without domain and variant.
        self.property = output.split("/")[0].split("::")[-1]
        self.rank, self.per_volume = spec.rank, spec.per_volume
        self.shape = [3] * spec.rank + [spec.num_subtargets]
        self.repelled = spec.quantity == "energy" and spec.shape == ()
        relative = potential.scale.relative(target)
        ones = torch.ones(len(potential.species), 1, dtype=torch.float64)
        baselines = potential.composition.get(target).view(len(potential.species), -1)
        self.register_buffer("species_index", potential.composition.species_index)
        # [n_species, num_subtargets], or one column for all of them.
        self.register_buffer(
            "scales", potential.scale.get(target) * (ones if relative is None else relative)
        )
        self.register_buffer("baselines", baselines)

    def scaled(self, raw: Tensor, numbers: Tensor, repulsion: Tensor | None) -> Tensor:
        """The value of each atom, [n_atoms, ..., num_subtargets], scalars in float64."""
        species = self.species_index[numbers]
        scales = self.scales[species].to(raw.dtype)
        values = raw.view([-1] + self.shape) * scales.view(
            [-1] + [1] * self.rank + [scales.size(1)]
        )
        if self.rank == 0:
            values = values.to(torch.float64) + self.baselines[species]
            if self.repelled and repulsion is not None:
                values = values + repulsion.to(torch.float64).unsqueeze(-1)
        return values

    def pack(self, values: Tensor, wanted: Wanted, of_atoms: bool) -> TensorMap:
        """Values of the atoms wanted, or their sums, with the labels that metatomic wants."""
        of_atoms = of_atoms and not self.per_volume
        values = values if of_atoms else self.summed(values, wanted)
        if self.per_volume:
            values = over_volume(values, wanted.cells[wanted.systems])
        return self.labelled(values, wanted, of_atoms)

    def pack_ensemble(self, members: Tensor, wanted: Wanted, of_atoms: bool) -> TensorMap:
        """Predictions of all members for the selected atoms, [n, n_members], or their sums."""
        values = members if of_atoms else self.summed(members, wanted)
        return self.labelled(values, wanted, of_atoms)

    def pack_spread(
        self, members: Tensor, wanted: Wanted, of_atoms: bool, factor: float
    ) -> TensorMap:
        """The standard deviation over the members, a sample (n - 1), times a factor."""
        values = members if of_atoms else self.summed(members, wanted)
        return self.labelled(factor * values.std(1, keepdim=True), wanted, of_atoms)

    def summed(self, values: Tensor, wanted: Wanted) -> Tensor:
        """Sums over the atoms wanted of each system, [n_systems, ...]."""
        place = torch.searchsorted(wanted.systems, wanted.samples[:, 0].contiguous())
        room = [wanted.systems.size(0)] + list(values.shape[1:])
        zeros = torch.zeros(room, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, place, values)

    def labelled(self, values: Tensor, wanted: Wanted, of_atoms: bool) -> TensorMap:
        """Values with the labels that metatomic wants."""
        device = values.device
        names, samples = ["system"], wanted.systems.unsqueeze(1)
        if of_atoms:
            names, samples = ["system", "atom"], wanted.samples
        axis = torch.arange(3, device=device).unsqueeze(1)
        components: list[Labels] = []
        for index in range(self.rank):
            name = "xyz" if self.rank == 1 else f"xyz_{index + 1}"
            components.append(Labels([name], axis))
        columns = torch.arange(values.size(-1), device=device).unsqueeze(1)
        block = TensorBlock(
            values=values.to(wanted.cells.dtype),
            samples=Labels(names, samples, assume_unique=True),
            components=components,
            properties=Labels([self.property], columns),
        )
        keys = Labels(["_"], torch.zeros(1, 1, dtype=torch.int64, device=device))
        return TensorMap(keys, [block])


def over_volume(values: Tensor, cells: Tensor) -> Tensor:
    """Symmetric part of [n_structures, 3, 3, ...] over the volume; zero without a volume."""
    volumes = torch.linalg.det(cells).abs().to(values.dtype)
    inverse = torch.where(volumes > 0, 1.0 / volumes.clamp_min(1e-30), 0.0)
    symmetric = 0.5 * (values + values.transpose(1, 2))
    return symmetric * inverse.view([-1] + [1] * (values.dim() - 1))
