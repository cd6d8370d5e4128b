"""Ways to ask a model that does not train: without autograd, directly, as a mean over orientations.

Forces that a model predicts directly cost no derivative and are not conservative: an energy need
not stay what it is along a trajectory. Names and variants go together as in metatomic's calculator:
with the energy ``energy/pbe`` go the direct forces ``non_conservative_force/pbe``.

A model that learned its symmetry depends on the orientation (Langer, Pozdnyakov and Ceriotti,
arXiv:2406.17747). The orientations are a group of symmetries of the cube. As a function of the
rotation, a mean over a group has no part of the lowest orders l: half turns about the axes remove
l = 1, the group of the tetrahedron l = 2 as well, that of the cube l = 3. A structure and its image
in a point, whose edges are all reversed, have a mean without what is odd in the edges. So much less
is left than of as many at random. They are the same for every structure: the mean energy is as
smooth as the energy, and the mean forces are its derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from pet_finetune.backends.choice import FUSED
from pet_finetune.backends.fused import weigh_edges
from pet_finetune.backends.instructions import CannotRecord, Instructions, Recorder, static_network
from pet_finetune.errors import ConfigError
from pet_finetune.graph import Batch, repeat_batch
from pet_finetune.keys import DIRECT_FORCES, DIRECT_STRESS, Compile, TargetSpec
from pet_finetune.nn.block import SMALLEST_FACTOR, weigh_keys
from pet_finetune.nn.neighborhood import TINY

from .compiled import CompiledPredictions
from .pet import PET
from .potential import Potential
from .prediction import Prediction, Property

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
        """Energies and derivatives by autograd, with the repulsion [n_atoms], for all cutoffs."""
        with torch.enable_grad():
            batch = batch._replace(edge_vectors=batch.edge_vectors.detach().requires_grad_())
            neighborhood = self._potential.network.neighborhood(batch)
            logarithms = weigh_keys(neighborhood.factors, neighborhood.layout)
            repulsion = self._potential._repulsion(batch)
        vectors, distances = neighborhood.geometry.split([3, 1], 1)
        edges = [vectors.contiguous(), distances.flatten(), logarithms, neighborhood.factors]
        raw, *found = run(
            edges, (neighborhood.centers, neighborhood.neighbors, neighborhood.reverse)
        )
        if repulsion is not None:
            edges, found = [*edges, repulsion], [*found, torch.ones_like(repulsion)]
        (gradient,) = torch.autograd.grad(edges, batch.edge_vectors, found, materialize_grads=True)
        return raw, None if repulsion is None else repulsion.detach(), gradient


class FrozenEnergy:
    """One energy of a potential in inference, computed by the fastest available way.

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
        """Energy and forces, and the stress where it is wanted."""
        if self._compiled is not None:
            wanted = {self._target: (True, stress)}
            found = self._compiled.predict(batch, wanted)
            if found is not None:
                return cast("Prediction", found[self._target])
        listed = self._static.predict(batch, stress=stress)
        if listed is not None:
            return listed
        return self._potential.predict(batch, self._target, forces=True, stress=stress)


#: Which of forces and stress are predicted directly: both, one of them, or neither.
NonConservative = bool | Literal["forces", "stress"]


@dataclass(frozen=True)
class DirectTargets:
    """The targets that stand in for derivatives; None where a derivative is taken."""

    forces: str | None
    stress: str | None


def direct_targets(
    targets: Mapping[str, TargetSpec], energy: str, wanted: NonConservative
) -> DirectTargets | None:
    """Find the direct targets that go with an energy; None if none are wanted.

    Raises:
        ConfigError: there is no such head, or ``wanted`` is not one of its values.
    """
    if wanted not in (True, False, "forces", "stress"):
        raise ConfigError(
            f"non_conservative: {wanted!r} is not one of True, False, 'forces', 'stress'."
        )
    if not wanted:
        return None
    variant = energy.partition("/")[2]
    found: dict[str, str | None] = {}
    for what, bases in (("forces", DIRECT_FORCES), ("stress", DIRECT_STRESS)):
        names = [f"{base}/{variant}" if variant else base for base in bases]
        found[what] = next((name for name in names if name in targets), None)
        if found[what] is None and wanted in (True, what):
            other = "stress" if what == "forces" else "forces"
            raise ConfigError(
                f"non_conservative: the model has no head for direct {what} ({names[0]}) that was "
                f"trained with '{energy}'; trained together: {', '.join(targets)}. Use "
                f"non_conservative='{other}' or False, or train such a head: see 'Targets beyond "
                "the energy' in the documentation."
            )
    return DirectTargets(
        found["forces"] if wanted in (True, "forces") else None,
        found["stress"] if wanted in (True, "stress") else None,
    )


def predict_direct(
    model: Potential,
    batch: Batch,
    energy: str,
    direct: DirectTargets,
    stress: bool,
    features: bool = False,
) -> Prediction:
    """An energy with forces and stress, direct where they are to be.

    The mean of direct forces over a structure's atoms is taken out, as metatomic does: it would
    push the whole structure away.

    Args:
        model: with the direct targets.
        batch: as for :meth:`Potential.predict`.
        energy: which energy.
        direct: from :func:`direct_targets`.
        stress: whether a stress is wanted.
        features: whether those of the energy come back too.
    """
    wanted = {energy: (direct.forces is None, stress and direct.stress is None)}
    if direct.forces is not None:
        wanted[direct.forces] = (False, False)
    if direct.stress is not None and stress:
        wanted[direct.stress] = (False, False)
    found = model.predict_targets(batch, wanted, features_of=[energy] if features else [])
    prediction = found[energy]
    assert isinstance(prediction, Prediction)
    if direct.forces is not None:
        forces = _values(found[direct.forces])
        prediction = replace(prediction, forces=_without_net_force(batch, forces))
    if direct.stress is not None and stress:
        prediction = replace(prediction, stress=_values(found[direct.stress]))
    return prediction


def _values(found: Prediction | Property) -> Tensor:
    assert isinstance(found, Property)
    return found.values


def _without_net_force(batch: Batch, forces: Tensor) -> Tensor:
    """[n_atoms, 3] whose mean over each structure is zero."""
    total = forces.new_zeros(batch.num_structures, 3).index_add(0, batch.structure_index, forces)
    mean = total / batch.atoms_per_structure.unsqueeze(1)
    return forces - mean[batch.structure_index]


#: How many: the structure's own; with its image in a point; half turns; tetrahedron; cube.
ORIENTATIONS = (1, 2, 4, 12, 24)

#: Copies with so many atoms together are predicted at once; memory grows no further.
_MOST_ATOMS = 2000

#: Where each quantity has its structures or atoms, from the end.
_AXES = {
    "energy": -1, "atom_energies": -1, "forces": -2, "stress": -3, "features": -2, "sums": -2,
}  # fmt: skip

AnyPrediction = TypeVar("AnyPrediction", bound=Prediction)


def orientations(count: int) -> Tensor:
    """The matrices of a group, ``[count, 3, 3]`` float64, the first of them the identity.

    All are rotations but the inversion, the second of two. Their elements are
    0, 1 and -1, so turning loses no digit.

    Args:
        count: one of :data:`ORIENTATIONS`.

    Raises:
        ConfigError: it is another number.
    """
    if count not in ORIENTATIONS:
        raise ConfigError(
            f"orientations: {count} is not one of {', '.join(map(str, ORIENTATIONS))}. They are "
            "groups of symmetries; of other sets less of the errors would cancel."
        )
    signed = torch.stack(
        [
            torch.diag(torch.tensor(signs, dtype=torch.float64))[:, list(axes)]
            for axes in permutations(range(3))
            for signs in product((1.0, -1.0), repeat=3)
        ]
    )
    cube = signed[torch.linalg.det(signed) > 0]
    # Of the tetrahedron are those that exchange no two axes, half turns those that leave all.
    tetrahedron = cube[torch.linalg.det(cube.abs()) > 0]
    half_turns = cube[cube.abs().diagonal(dim1=1, dim2=2).sum(1) == 3]
    identity = half_turns[:1]
    inversion = torch.cat([identity, -identity])
    return {1: identity, 2: inversion, 4: half_turns, 12: tetrahedron, 24: cube}[count]


def copies(batch: Batch, rotations: Tensor) -> Batch:
    """A batch in ``k`` orientations, ``[k, 3, 3]``: all structures in the first, and so on."""
    matrices = rotations.to(batch.edge_vectors)
    return repeat_batch(batch, len(rotations))._replace(
        positions=torch.einsum("kij,nj->kni", matrices, batch.positions).flatten(0, 1),
        edge_vectors=torch.einsum("kij,ej->kei", matrices, batch.edge_vectors).flatten(0, 1),
        cells=torch.einsum("kij,baj->kbai", matrices, batch.cells).flatten(0, 1),
    )


def predict_mean(
    batch: Batch, rotations: Tensor, predict: Callable[[Batch], AnyPrediction]
) -> AnyPrediction:
    """Mean of predictions in several orientations, rotated back.

    Args:
        batch: the structures.
        rotations: ``[k, 3, 3]``.
        predict: of a batch; quantities may have axes in front, as those of a committee's members.
    """
    if len(rotations) == 1:
        return predict(batch)
    most = max(1, _MOST_ATOMS // max(1, batch.num_atoms))
    chunks = rotations.split(most)
    return _mean([predict(copies(batch, some)) for some in chunks], chunks)


def _mean(parts: Sequence[AnyPrediction], chunks: Sequence[Tensor]) -> AnyPrediction:
    """Mean over the predictions of rotated copies; ``chunks`` are the rotations of each."""
    values: dict[str, Any] = {}
    for name, first in vars(parts[0]).items():
        each = [getattr(part, name) for part in parts]
        if isinstance(first, Prediction):
            values[name] = _mean(each, chunks)
        elif isinstance(first, Tensor):
            rotated = zip(each, chunks, strict=True)
            back = [_turned_back(name, value, some) for value, some in rotated]
            axis = _AXES[name] - 1
            values[name] = torch.cat(back, axis).mean(axis)
    return replace(parts[0], **values)


def _turned_back(name: str, values: Tensor, rotations: Tensor) -> Tensor:
    """A quantity in the structures' own frame, with an axis of the orientations before its own."""
    matrices = rotations.to(values)
    values = values.detach().unflatten(_AXES[name], (len(rotations), -1))
    if name == "forces":
        return torch.einsum("...kni,kij->...knj", values, matrices)
    if name == "stress":
        return torch.einsum("...kbxy,kxi,kyj->...kbij", values, matrices, matrices)
    return values
