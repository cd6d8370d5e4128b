"""Energy and forces of few atoms from weights that stay as they are, without autograd's work."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pet_finetune import kernels
from pet_finetune.data.batch import Batch
from pet_finetune.kernels.listing import Instructions, frozen_network
from pet_finetune.nn.attention import weigh_keys

from .listed import list_network
from .potential import Potential
from .prediction import Prediction, forces_of, stress_of

#: Up to so many atoms and edges together the operators' surroundings cost more than they do.
MOST_ROWS = 2048


class FrozenEnergy:
    """One energy of a potential that does not train, with its derivatives.

    What it needs of the weights is prepared once and again when they have changed. A potential
    whose modules are exchanged (by loading an adapter, say) needs a new one.

    Args:
        potential: in evaluation mode; held on to, not copied.
        target: which energy.
    """

    def __init__(self, potential: Potential, target: str) -> None:
        self._potential = potential
        self._target = target
        self._tensors = [*potential.network.parameters(), *potential.network.buffers()]
        self._state: list[tuple[int, int]] | None = None
        self._instructions: Instructions | None = None

    def predict(self, batch: Batch, *, stress: bool = False) -> Prediction | None:
        """Energy and forces, and the stress; None where :meth:`Potential.predict` has to do it.

        That is with many atoms, without the kernels, and with networks of a kind that there are
        no instructions for.
        """
        few = batch.num_atoms + batch.num_edges <= MOST_ROWS
        if not few or not kernels.usable(batch.edge_vectors) or kernels.halves():
            return None
        instructions = self._current()
        if instructions is None or batch.edge_vectors.dtype != instructions.weights.dtype:
            return None
        return self._predict(instructions, batch, stress)

    def _current(self) -> Instructions | None:
        """The instructions for the weights as they are."""
        state = [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]
        if state != self._state:
            self._instructions = list_network(self._potential.network, self._target)
            self._state = state
        return self._instructions

    def _predict(self, instructions: Instructions, batch: Batch, stress: bool) -> Prediction:
        potential, network = self._potential, self._potential.network
        scale = potential.scale.get(self._target).to(batch.edge_vectors)
        with torch.enable_grad():
            vectors = batch.edge_vectors.detach().requires_grad_()
            batch = replace(batch, edge_vectors=vectors)
            hood = network.neighborhood(batch)
            keys = weigh_keys(hood.factors, hood.layout)
            repulsion = potential._repulsion(batch)
        species = network.species_to_species_index[batch.numbers]
        condition = None
        if network.system_conditioning is not None:
            with torch.no_grad():
                condition = network.system_conditioning(
                    batch.charges, batch.spins, batch.structure_index
                )
        edges = [hood.vectors, hood.distances, keys.logarithms, hood.factors]
        raw, *found = frozen_network(
            instructions,
            edges,
            [species, hood.centers, hood.neighbors, hood.reverse],
            condition,
            scale.expand(batch.num_atoms),
        )
        learned: Tensor = raw * scale
        if repulsion is not None:
            learned = learned + repulsion.detach()
            edges, found = [*edges, repulsion], [*found, torch.ones_like(repulsion)]
        (gradient,) = torch.autograd.grad(edges, vectors, found, materialize_grads=True)
        return potential._prediction(batch, self._target, learned, gradient, True, stress)
