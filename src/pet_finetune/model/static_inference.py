"""Energy and forces of few atoms from weights that stay as they are, without autograd's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from pet_finetune.backends.choice import FUSED
from pet_finetune.backends.fused import weigh_edges
from pet_finetune.backends.instructions import (
    CannotRecord,
    Instructions,
    Recorder,
    static_network,
)
from pet_finetune.graph import Batch
from pet_finetune.keys import Compile
from pet_finetune.nn.attention import SMALLEST_FACTOR, weigh_keys
from pet_finetune.nn.neighborhood import TINY

from .compiled import CompiledPredictions
from .pet import PET
from .potential import Potential
from .prediction import Prediction

#: Up to so many atoms and edges together the list is the faster way, as measured; beyond it the
#: modules are, whose operators take a few rows at a time from norm to product.
MOST_ROWS = 400

#: Inputs of the network of each edge, and indices, to what ``static_network`` returns.
Run = Callable[[list[Tensor], tuple[Tensor, ...]], list[Tensor]]


@torch.no_grad()
def record_network(network: PET, target: str) -> Instructions | None:
    """The instructions for one output of each atom, or None where there are none for a part."""
    recorder = Recorder(network.edge_embedder.weight.dtype)
    try:
        network.record(recorder, target)
    except (CannotRecord, ValueError):  # a part of another kind, or of another width
        return None
    return recorder.finish()


class StaticEnergy:
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

        That is with many atoms, without fused operators, and with networks of a kind that there are
        no instructions for.
        """
        few = batch.num_atoms + batch.num_edges <= MOST_ROWS
        if not few or self._potential.network.backend is not FUSED:
            return None
        instructions = self._current()
        if instructions is None or batch.edge_vectors.dtype != instructions.weights.dtype:
            return None
        return self._predict(instructions, batch, stress)

    def _current(self) -> Instructions | None:
        """The instructions for the weights as they are."""
        state = [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]
        if state != self._state:
            self._instructions = record_network(self._potential.network, self._target)
            self._state = state
        return self._instructions

    def _predict(self, instructions: Instructions, batch: Batch, stress: bool) -> Prediction:
        potential, network = self._potential, self._potential.network
        scale = potential.scale.get(self._target).to(batch.edge_vectors)
        condition = None
        if network.system_conditioning is not None:
            with torch.no_grad():
                condition = network.system_conditioning(
                    batch.charges, batch.spins, batch.structure_index
                )

        def run(edges: list[Tensor], indices: tuple[Tensor, ...]) -> list[Tensor]:
            species = network.species_to_species_index[batch.numbers]
            weights = scale.expand(batch.num_atoms)
            return static_network(instructions, edges, [species, *indices], condition, weights)

        plain = potential.zbl is not None or network.options.num_neighbors_adaptive is not None
        derive = self._by_autograd if plain else self._by_hand
        raw, repulsion, gradient = derive(batch, run)
        learned = raw * scale
        if repulsion is not None:
            learned = learned + repulsion
        return potential._prediction(batch, self._target, learned, [gradient], True, stress)

    def _by_hand(self, batch: Batch, run: Run) -> tuple[Tensor, None, Tensor]:
        """The network's outputs, and the gradient of the energy by the edge vectors, [n_edges, 3].

        With one cutoff for all edges, what lies between these and the network's inputs is short.
        """
        options = self._potential.hypers
        vectors, numbers, indices, which = weigh_edges(
            batch.edge_vectors,
            batch.centers,
            batch.neighbors,
            batch.reverse,
            cutoff=options.cutoff,
            width=options.cutoff_width,
            cosine=options.cutoff_function == "Cosine",
            smallest=SMALLEST_FACTOR,
            tiny=TINY,
        )
        distances, logarithms, factors, log_slopes, slopes = numbers.unbind(0)
        raw, by_vectors, by_distances, by_logarithms, by_factors = run(
            [vectors, distances, logarithms, factors], indices
        )
        pull = by_distances.addcmul_(by_logarithms, log_slopes).addcmul_(by_factors, slopes)
        gradient = by_vectors.addcmul_(vectors, (pull / distances).unsqueeze(-1))
        if len(gradient) < batch.num_edges:
            gradient = torch.zeros_like(batch.edge_vectors).index_copy_(0, which, gradient)
        return raw, None, gradient

    def _by_autograd(self, batch: Batch, run: Run) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same, with the repulsion of atoms [n_atoms], for cutoffs of any kind."""
        with torch.enable_grad():
            batch = batch._replace(edge_vectors=batch.edge_vectors.detach().requires_grad_())
            neighborhood = self._potential.network.neighborhood(batch)
            logarithms = weigh_keys(neighborhood.factors, neighborhood.layout)
            repulsion = self._potential._repulsion(batch)
        edges = [neighborhood.vectors, neighborhood.distances, logarithms, neighborhood.factors]
        raw, *found = run(
            edges, (neighborhood.centers, neighborhood.neighbors, neighborhood.reverse)
        )
        if repulsion is not None:
            edges, found = [*edges, repulsion], [*found, torch.ones_like(repulsion)]
        (gradient,) = torch.autograd.grad(edges, batch.edge_vectors, found, materialize_grads=True)
        return raw, None if repulsion is None else repulsion.detach(), gradient


class FrozenEnergy:
    """One energy of a potential that does not train, computed the fastest way that there is.

    That is by a compiled graph, by :class:`StaticEnergy`, or by the potential's own modules.

    Args:
        potential: in evaluation mode; held on to, not copied.
        target: which energy.
        compile: as for :meth:`CompiledPredictions.chosen`.
    """

    def __init__(self, potential: Potential, target: str, compile: Compile) -> None:
        self._potential, self._target = potential, target
        self._compiled = CompiledPredictions.chosen(potential, compile)
        self._static = StaticEnergy(potential, target)

    def predict(self, batch: Batch, *, stress: bool = False) -> Prediction:
        """Energy and forces, and the stress.

        Args:
            batch: the structures.
            stress: whether it is computed.
        """
        if self._compiled is not None:
            wanted = {self._target: (True, stress)}
            found = self._compiled.predict(batch, wanted)
            if found is not None:
                return cast("Prediction", found[self._target])
        listed = self._static.predict(batch, stress=stress)
        if listed is not None:
            return listed
        return self._potential.predict(batch, self._target, forces=True, stress=stress)
