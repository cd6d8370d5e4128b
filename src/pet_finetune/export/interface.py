"""The model that engines call, in metatomic's interface.

TorchScript and metatomic read the annotations of :meth:`ExportedPotential.forward`, and want those
of :mod:`typing`.
"""

from collections.abc import Mapping
from typing import Dict, List, Optional  # noqa: UP035

import torch
from metatensor.torch import Labels, TensorMap
from metatomic.torch import ModelOutput, NeighborListOptions, System
from torch import Tensor, nn

from pet_finetune.graph import Batch
from pet_finetune.model import Potential

from .systems import Flat, flatten, integer_input, selected_rows
from .targets import PlainTarget, Wanted


class ExportedPotential(nn.Module):
    """A potential as metatomic calls it; forces and stresses are the engine's derivatives.

    Args:
        potential: without adapters, in evaluation mode; it is given up.
        outputs: metatomic's name of each output, and the target it is.
    """

    def __init__(self, potential: Potential, outputs: Mapping[str, str]) -> None:
        super().__init__()
        hypers = potential.hypers
        self.outputs = list(outputs)
        self.targets = nn.ModuleList(
            PlainTarget(potential, target, output) for output, target in outputs.items()
        )
        self.target_names = list(outputs.values())
        for other in potential.targets.keys() - outputs.values():
            potential.remove_target(other)
        self.network = potential.network
        self.zbl = potential.zbl
        self.cutoff = potential.cutoff
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
        """Total charge and spin multiplicity, where the model is told them."""
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
        """The outputs asked for; see ``metatomic.torch.ModelInterface``."""
        results: Dict[str, TensorMap] = {}  # noqa: UP006
        if len(systems) == 0 or len(outputs) == 0:
            return results
        flat = flatten(systems, self.neighbors, self.cutoff)
        charges, spins = self.conditions(systems)
        batch = Batch(
            numbers=flat.numbers,
            edge_vectors=flat.vectors,
            centers=flat.centers,
            neighbors=flat.neighbors,
            reverse=flat.reverse,
            structure_index=flat.samples[:, 0],
            cells=flat.cells,
            charges=charges,
            spins=spins,
        )
        raw = self.network(batch, self.target_names)
        repulsion = self.repulsion(flat)
        rows = torch.arange(flat.numbers.size(0), device=flat.numbers.device)
        ids = torch.arange(len(systems), device=flat.numbers.device)
        if selected_atoms is not None:
            rows = selected_rows(selected_atoms, flat.sizes)
            ids = torch.unique(flat.samples[rows, 0])
        wanted = Wanted(rows, flat.samples[rows], ids, flat.cells)
        for index, target in enumerate(self.targets):
            name = self.outputs[index]
            if name in outputs:
                of_atoms = outputs[name].sample_kind == "atom"
                values = raw[self.target_names[index]]
                results[name] = target(values, flat.numbers, repulsion, wanted, of_atoms)
        return results

    def conditions(self, systems: List[System]) -> tuple[Tensor, Tensor]:  # noqa: UP006
        """Charges and spin multiplicities, both [n_structures] int64."""
        limit = self.max_charge
        charges = integer_input(systems, "charge", -limit, limit, 0)
        spins = integer_input(systems, "spin_multiplicity", 1, self.max_spin_multiplicity, 1)
        return charges, spins

    def repulsion(self, flat: Flat) -> Optional[Tensor]:  # noqa: UP045
        """ZBL energy of each atom, [n_atoms] eV; None for models without it."""
        if self.zbl is not None:
            distances = torch.linalg.vector_norm(flat.vectors, dim=-1)
            numbers = flat.numbers
            pairs = self.zbl(numbers[flat.centers], numbers[flat.neighbors], distances)
            return pairs.new_zeros(numbers.size(0)).index_add(0, flat.centers, pairs)
        return None
