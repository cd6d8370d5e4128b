"""The model that engines call, in metatomic's interface, and the tensors it makes of their systems.

TorchScript and metatomic read the annotations of :meth:`ExportedPotential.forward`, and want those
of :mod:`typing`.
"""

from collections.abc import Mapping, Sequence
from typing import Dict, List, NamedTuple, Optional, Tuple  # noqa: UP035

import torch
from metatensor.torch import Labels, TensorMap
from metatomic.torch import ModelOutput, NeighborListOptions, System
from torch import Tensor, nn

from pet_finetune.graph import Batch, renumbered
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import LastLayer, features_key

from .targets import PlainTarget, Wanted, uncertainty_outputs


class Flat(NamedTuple):
    """Several systems as one, as in :class:`~pet_finetune.graph.Batch`.

    Attributes:
        numbers: [n_atoms] int64, atomic numbers.
        positions: [n_atoms, 3], Angstrom; with the engine's gradients, as vectors and cells.
        vectors: [n_edges, 3], Angstrom.
        centers, neighbors, reverse: [n_edges] int64, sorted by centre.
        samples: [n_atoms, 2] int64: system of each atom, and its place there.
        sizes: [n_structures] int64, atoms of each.
        cells: [n_structures, 3, 3].
    """

    numbers: Tensor
    positions: Tensor
    vectors: Tensor
    centers: Tensor
    neighbors: Tensor
    reverse: Tensor
    samples: Tensor
    sizes: Tensor
    cells: Tensor


def flatten(systems: list[System], neighbors: NeighborListOptions, cutoff: float) -> Flat:
    """Join systems without edges beyond the cutoff, which an engine may keep in its lists."""
    numbers: list[Tensor] = []
    positions: list[Tensor] = []
    cells: list[Tensor] = []
    vectors: list[Tensor] = []
    pairs: list[Tensor] = []
    sizes: list[int] = []
    num_atoms = 0
    for system in systems:
        block = system.get_neighbor_list(neighbors)
        # Rows: first atom, second atom, three cell shifts.
        samples = block.samples.values.to(torch.int64)
        pairs.append(torch.cat([samples[:, :2] + num_atoms, samples[:, 2:]], dim=1))
        vectors.append(block.values.reshape(-1, 3))
        numbers.append(system.types)
        positions.append(system.positions)
        cells.append(system.cell)
        sizes.append(len(system))
        num_atoms += len(system)
    all_pairs, all_vectors = torch.cat(pairs), torch.cat(vectors)
    distances = torch.linalg.vector_norm(all_vectors.detach(), dim=-1)
    near = torch.nonzero(distances <= cutoff).squeeze(-1)
    all_pairs = all_pairs[near]
    order, reverse = pair_up(all_pairs, num_atoms)
    all_pairs = all_pairs[order]
    device = all_pairs.device
    size = torch.tensor(sizes, device=device)
    structure_index = torch.arange(len(systems), device=device).repeat_interleave(size)
    first = size.cumsum(0) - size
    place = torch.arange(num_atoms, device=device) - first[structure_index]
    return Flat(
        torch.cat(numbers).to(torch.int64),
        torch.cat(positions),
        all_vectors[near[order]],
        all_pairs[:, 0],
        all_pairs[:, 1],
        reverse,
        torch.stack([structure_index, place], dim=1),
        size,
        torch.stack(cells),
    )


def pair_up(pairs: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Sort directed pairs and find the opposite of each.

    A pair without its opposite is left out. There is one only where a distance equals the cutoff
    to the last digit and an engine decided on the two directions apart; it weighs nothing there.

    Args:
        pairs: [n, 5] int64: centre, neighbour, cell shift of the neighbour.
        num_atoms: of all systems together.

    Returns:
        The pairs to take, in order of their centres, and for each of those the place of its
        opposite among them; both [n_edges].
    """
    if pairs.size(0) == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=pairs.device)
        return nothing, nothing
    centers, neighbors, shifts = pairs[:, 0], pairs[:, 1], pairs[:, 2:]
    reach = shifts.abs().max()
    keys, order = sort_keys(centers, neighbors, shifts, reach, num_atoms).sort()
    opposite = sort_keys(neighbors, centers, -shifts, reach, num_atoms)[order]
    places = torch.searchsorted(keys, opposite).clamp_max(len(keys) - 1)
    paired = keys[places] == opposite
    if bool(paired.all()):
        return order, places
    kept = torch.nonzero(paired).squeeze(-1)
    reverse = renumbered(kept, places)
    return order[kept], reverse


def sort_keys(
    centers: Tensor, neighbors: Tensor, shifts: Tensor, reach: Tensor, num_atoms: int
) -> Tensor:
    """One integer for each pair that sorts as centre, neighbour and shift do, [n] int64."""
    key = centers * num_atoms + neighbors
    for axis in range(3):
        key = key * (2 * reach + 1) + (shifts[:, axis] + reach)
    return key


def selected_rows(selected: Labels, sizes: Tensor) -> Tensor:
    """Which atoms of the joined systems are selected, [n_selected] int64, in their order."""
    first = sizes.cumsum(0) - sizes
    return first[selected.column("system").to(torch.int64)] + selected.column("atom")


def integer_input(systems: list[System], name: str, low: int, high: int, missing: int) -> Tensor:
    """Integer input of each system from the engine, [n_structures] int64."""
    values = torch.full((len(systems),), missing, dtype=torch.int64, device=systems[0].device)
    for index, system in enumerate(systems):
        if name in system.known_data():
            given = float(system.get_data(name).block().values.reshape(()))
            if given != round(given) or given < low or given > high:
                raise ValueError(
                    f"the {name} of system {index} is {given}; "
                    f"this model knows whole numbers from {low} to {high}"
                )
            values[index] = round(given)
    return values


class ExportedMember(nn.Module):
    """The network of a potential, and what makes targets of its outputs.

    Args:
        potential: without adapters, in evaluation mode; it is given up.
        outputs: metatomic's name of each output, and the target it is.
    """

    features_of: List[str]  # noqa: UP006

    def __init__(self, potential: Potential, outputs: Mapping[str, str]) -> None:
        super().__init__()
        self.targets = nn.ModuleList(
            PlainTarget(potential, target, output) for output, target in outputs.items()
        )
        self.target_names = list(outputs.values())
        self.network = potential.network
        self.features_of = [name for name in self.target_names if name in potential.uncertainties]

    def forward(
        self,
        batch: Batch,
        repulsion: Optional[Tensor],  # noqa: UP045
        with_features: bool,
    ) -> Tuple[List[Tensor], Dict[str, Tensor]]:  # noqa: UP006
        """Values of each atom for each output, [n_atoms, ...], and features if requested."""
        seen: List[str] = self.features_of if with_features else []  # noqa: UP006
        raw = self.network(batch, self.target_names, False, seen)
        values: List[Tensor] = []  # noqa: UP006
        for index, target in enumerate(self.targets):
            values.append(target.scaled(raw[self.target_names[index]], batch.numbers, repulsion))
        return values, raw


class ExportedPotential(nn.Module):
    """A potential as metatomic calls it; forces and stresses are the engine's derivatives.

    Several potentials are a committee: each output is their mean, and energies have their spread
    and what each of them says beside it. Energies of one potential have the same where its last
    layer has an uncertainty.

    Args:
        potentials: without adapters, in evaluation mode, of one make; they are given up.
        outputs: metatomic's name of each output, and the target it is.
        calibration: what the spread of energies is multiplied with to become an uncertainty.
    """

    spreads: Dict[str, str]  # noqa: UP006
    ensembles: Dict[str, str]  # noqa: UP006
    seen: Dict[str, str]  # noqa: UP006

    def __init__(
        self, potentials: Sequence[Potential], outputs: Mapping[str, str], calibration: float = 1.0
    ) -> None:
        super().__init__()
        first = potentials[0]
        hypers = first.hypers
        self.outputs = list(outputs)
        self.floating = first.dtype
        self.calibration = calibration
        for potential in potentials:
            for other in potential.targets.keys() - outputs.values():
                potential.remove_target(other)
        self.members = nn.ModuleList(ExportedMember(potential, outputs) for potential in potentials)
        # Of energies, by the name of the output; empty where there is no uncertainty.
        self.spreads, self.ensembles = uncertainty_outputs(potentials, outputs)
        layers = {output: first.uncertainty_of(target) for output, target in outputs.items()}
        # Where in what the network returns the features of an output's last layer stand.
        self.seen = {name: features_key(outputs[name]) for name in layers if layers[name]}
        nothing = LastLayer(torch.eye(1), torch.eye(1), 0.0)  # never called
        self.layers = nn.ModuleList(layer or nothing for layer in layers.values())
        self.packers = nn.ModuleList(
            PlainTarget(first, target, output) for output, target in outputs.items()
        )
        self.zbl = first.zbl
        self.cutoff = first.cutoff
        # Not strict: longer edges are left out here, at less cost than an engine's second list.
        self.neighbors = NeighborListOptions(cutoff=self.cutoff, full_list=True, strict=False)
        self.conditioned = hypers.system_conditioning
        self.max_charge = hypers.max_charge
        self.max_spin_multiplicity = hypers.max_spin_multiplicity
        self.eval().requires_grad_(False)

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        """The one list it needs: every pair in both directions."""
        return [self.neighbors]

    def requested_inputs(self) -> Dict[str, ModelOutput]:  # noqa: UP006
        """Inputs for the engine: total charge and spin multiplicity, if the model uses them."""
        inputs: Dict[str, ModelOutput] = {}  # noqa: UP006
        if self.conditioned:
            inputs["charge"] = ModelOutput(unit="e", sample_kind="system")
            inputs["spin_multiplicity"] = ModelOutput(unit="", sample_kind="system")
        return inputs

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """Compute the requested outputs; see ``metatomic.torch.ModelInterface``."""
        results: Dict[str, TensorMap] = {}  # noqa: UP006
        if len(systems) == 0 or len(outputs) == 0:
            return results
        flat = flatten(systems, self.neighbors, self.cutoff)
        charges, spins = self.conditions(systems)
        # An engine may have float64 where the network has float32.
        vectors = flat.vectors.to(self.floating)
        batch = Batch(
            numbers=flat.numbers,
            positions=flat.positions.to(self.floating),
            edge_vectors=vectors,
            centers=flat.centers,
            neighbors=flat.neighbors,
            reverse=flat.reverse,
            structure_index=flat.samples[:, 0],
            cells=flat.cells.to(self.floating),
            charges=charges,
            spins=spins,
        )
        repulsion = self.repulsion(batch)
        unsure = False
        for name in self.spreads:
            unsure = (
                unsure or self.spreads[name] in outputs or self.ensembles.get(name, "") in outputs
            )
        said: List[List[Tensor]] = []  # noqa: UP006
        raw: Dict[str, Tensor] = {}  # noqa: UP006
        for member in self.members:
            of_targets, raw = member(batch, repulsion, unsure)
            said.append(of_targets)
        rows = torch.arange(flat.numbers.size(0), device=flat.numbers.device)
        ids = torch.arange(len(systems), device=flat.numbers.device)
        if selected_atoms is not None:
            rows = selected_rows(selected_atoms, flat.sizes)
            ids = torch.unique(flat.samples[rows, 0])
        wanted = Wanted(rows, flat.samples[rows], ids, flat.cells)
        for index, (packer, layer) in enumerate(zip(self.packers, self.layers)):  # noqa: B905
            name = self.outputs[index]
            values = torch.stack([of_member[index] for of_member in said])
            if name in outputs:
                of_atoms = outputs[name].sample_kind == "atom"
                results[name] = packer.pack(values.mean(0)[wanted.rows], wanted, of_atoms)
            if unsure and name in self.spreads:
                # [n_atoms, n_members]
                ensemble = values.squeeze(-1).transpose(0, 1)[wanted.rows]
                features = ensemble
                if name in self.seen:
                    features = raw[self.seen[name]][wanted.rows].to(torch.float64)
                    ensemble = ensemble + layer.deviations(features)
                spread, each = self.spreads[name], self.ensembles.get(name, "")
                if each in outputs:
                    of_atoms = outputs[each].sample_kind == "atom"
                    results[each] = packer.pack_ensemble(ensemble, wanted, of_atoms)
                if spread in outputs:
                    of_atoms = outputs[spread].sample_kind == "atom"
                    if name in self.seen:
                        sure = layer(features if of_atoms else packer.summed(features, wanted))
                        results[spread] = packer.labelled(sure.unsqueeze(1), wanted, of_atoms)
                    else:
                        results[spread] = packer.pack_spread(
                            ensemble, wanted, of_atoms, self.calibration
                        )
        return results

    def conditions(self, systems: List[System]) -> tuple[Tensor, Tensor]:  # noqa: UP006
        """Charges and spin multiplicities, both [n_structures] int64."""
        limit = self.max_charge
        charges = integer_input(systems, "charge", -limit, limit, 0)
        spins = integer_input(systems, "spin_multiplicity", 1, self.max_spin_multiplicity, 1)
        return charges, spins

    def repulsion(self, batch: Batch) -> Optional[Tensor]:  # noqa: UP045
        """ZBL energy of each atom, [n_atoms] eV; None for models without it."""
        if self.zbl is not None:
            distances = torch.linalg.vector_norm(batch.edge_vectors, dim=-1)
            numbers = batch.numbers
            pairs = self.zbl(numbers[batch.centers], numbers[batch.neighbors], distances)
            return pairs.new_zeros(numbers.size(0)).index_add(0, batch.centers, pairs)
        return None
