"""Predictions as compiled graphs, and what compiled graphs of a potential have in common.

Weights are inputs of a graph, so that it does for all models of a kind. What the sizes of tensors
depend on, which edges count, is found beside it, so that it does for structures of all sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from pet_finetune.backends.choice import EAGER, using
from pet_finetune.backends.graphs import CannotCompile, Graph, compiled_graph, is_compiled
from pet_finetune.graph import Batch, Edges, Layout, Rectangles
from pet_finetune.log import get_logger

from .potential import Potential
from .prediction import Prediction, Property

__all__ = ["CompiledEnergy", "Sizes", "Weights", "distance", "predictions_of", "tensors_of"]

_LOG = get_logger(__name__)
#: For each target, whether forces and stress are computed.
Wanted = Mapping[str, tuple[bool, bool]]
#: How far compiled forces may be from plain ones, relative to their length.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


class CompiledEnergy:
    """One energy of a potential that does not train, with its derivatives, by compiled graphs.

    The first structure of each graph is computed without it, too: should the forces differ by more
    than rounding explains, or should compiling fail, a warning says so and nothing is compiled from
    then on. A potential whose modules are exchanged (by loading an adapter, say) needs a new one.

    Args:
        potential: in evaluation mode; held on to, not copied.
        target: which energy.
        only_known: whether graphs are used that are there, and none is compiled.
    """

    def __init__(self, potential: Potential, target: str, only_known: bool = False) -> None:
        self._potential, self._target, self._only_known = potential, target, only_known
        self._weights = Weights(potential)
        self._graphs: dict[tuple[bool, bool], Graph | None] = {}
        self._failed = False

    def predict(self, batch: Batch, *, stress: bool = False) -> Prediction | None:
        """Energy and forces, and the stress; None where it has to be computed without a graph."""
        if self._failed:
            return None
        with using(EAGER, self._potential):
            graph = _all_within(self._potential.network.neighborhood.with_edges(batch))
            assert graph.edges is not None
            if not len(graph.edges.centers):
                return None
            wanted = {self._target: (True, stress)}
            leaves = [leaf for leaf in tree_flatten(graph)[0] if leaf is not None]
            values = [*self._weights.values(), *leaves]
            form = stress, graph.num_structures == 1
            try:
                if form not in self._graphs:
                    self._graphs[form] = self._first(graph, values, wanted)
            except CannotCompile as error:
                _LOG.warning("predictions are computed without compiling: %s", error)
                self._failed = True
                return None
        found = self._graphs[form]
        if found is None:
            return None
        with torch.no_grad():
            made = predictions_of(self._potential, wanted, iter(found(*values)))
        prediction = made[self._target]
        assert isinstance(prediction, Prediction)
        return prediction

    def _first(self, graph: Batch, values: Sequence[Tensor], wanted: Wanted) -> Graph | None:
        """Compile a graph and compare it with the function that it is made of."""
        device = self._potential.device
        key = self._weights.key("prediction", wanted, graph.num_structures == 1)
        if self._only_known and not is_compiled(key, device):
            return None
        if self._potential.hypers.long_range.enable:
            raise CannotCompile("the grids of long-range features have other sizes for other cells")
        count = len(self._weights.named)
        all_leaves, structure = tree_flatten(graph)
        there = [leaf is not None for leaf in all_leaves]

        def predict(*values: Tensor) -> list[Tensor]:
            taken = iter(values[count:])
            leaves = [next(taken) if own else None for own in there]
            batch: Batch = tree_unflatten(leaves, structure)
            return tensors_of(self._weights.predict(values[:count], batch, wanted, False))

        leaves, free = Sizes(structures=1 if graph.num_structures == 1 else 5).batch(graph)
        examples = [*values[:count], *leaves]
        axes = [*[()] * count, *free]
        compiled = compiled_graph("predictions", key, device, predict, examples, axes)
        with torch.no_grad():
            try:
                found = list(compiled(*values))
            except RuntimeError as failure:
                raise CannotCompile(f"the compiled prediction failed ({failure})") from failure
        error = distance(found[2:], predict(*values)[2:])
        if error > _TOLERANCES[self._potential.dtype]:
            raise CannotCompile(f"compiled forces differ by {error:.1e} of their length")
        _LOG.info("compiled predictions: first forces differ by %.1e of their length", error)
        return compiled


def _all_within(graph: Batch) -> Batch:
    """The batch in the form that it has where some edges are beyond the cutoff."""
    edges = graph.edges
    if edges is None or edges.within is not None:
        return graph
    within = torch.arange(graph.num_edges, device=graph.centers.device)
    return graph._replace(edges=edges._replace(within=within))


class Weights:
    """The tensors of a potential, which a graph is given as inputs.

    Args:
        potential: held on to, and so are its tensors as they are now.
    """

    def __init__(self, potential: Potential) -> None:
        self._potential, self._module = potential, _Predicts(potential)
        #: By path.
        self.named = {**dict(potential.named_parameters()), **dict(potential.named_buffers())}

    def values(self) -> list[Tensor]:
        """In the order of :attr:`named`, without gradients."""
        return [value.detach() for value in self.named.values()]

    def predict(
        self, values: Sequence[Tensor], graph: Batch, wanted: Wanted, create_graph: bool
    ) -> dict[str, Prediction | Property]:
        """:meth:`Potential.predict_targets` with other weights.

        Args:
            values: in the order of :attr:`named`.
            graph: the structures.
            wanted: for each target, whether forces and stress are computed.
            create_graph: whether the derivatives will be differentiated.
        """
        state = {f"model.{name}": v for name, v in zip(self.named, values, strict=True)}
        found: dict[str, Prediction | Property]
        found = functional_call(self._module, state, (graph, wanted, create_graph))
        return found

    def key(self, *facts: object) -> str:
        """What a function of the potential consists of: the same in another process.

        Args:
            facts: whatever else decides.
        """
        tensors = [(name, tuple(t.shape), t.dtype) for name, t in self.named.items()]
        exact = torch.are_deterministic_algorithms_enabled()
        model = self._potential
        return "\n".join(map(str, (model, model.hypers, model.targets, tensors, exact, *facts)))


class _Predicts(nn.Module):
    """A potential, whose weights can be given for a call."""

    def __init__(self, model: Potential) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, graph: Batch, wanted: Wanted, create_graph: bool
    ) -> dict[str, Prediction | Property]:
        return self.model.predict_targets(graph, wanted, create_graph=create_graph)


@dataclass(frozen=True)
class Sizes:
    """Different sizes for different things, so that none is taken for another."""

    structures: int
    atoms: int = 11
    listed: int = 101
    within: int = 89
    kept: int = 71
    rectangles: tuple[int, ...] = (11, 13, 19, 23, 31, 47, 53, 59)
    widths: tuple[int, ...] = (17, 29, 37, 43, 61, 67, 73, 79)

    def batch(self, graph: Batch) -> tuple[list[Tensor], list[Sequence[int]]]:
        """The tensors of a batch of the same form with these sizes, and which axes are free."""
        edges = graph.edges
        assert edges is not None
        within, kept = edges.within, edges.kept
        count = self.listed if within is None else self.within
        count = count if kept is None else self.kept
        rectangles = edges.layout.rectangles
        if rectangles is not None:
            shapes = list(zip(self.rectangles, self.widths, strict=True))[: len(rectangles.slots)]
            slots = sum(atoms * width for atoms, width in shapes)
            rectangles = Rectangles(
                [rectangles.token_of_slot.new_zeros(*shape) for shape in shapes],
                rectangles.slot_of_token.new_zeros(self.atoms + count),
                rectangles.token_of_slot.new_zeros(slots),
                rectangles.empty.new_zeros(slots),
            )
        starts = edges.layout.starts.new_zeros(self.atoms + 1)
        own = Edges(
            within=None if within is None else within.new_zeros(self.within),
            kept=None if kept is None else kept.new_zeros(self.kept),
            centers=edges.centers.new_zeros(count),
            neighbors=edges.neighbors.new_zeros(count),
            reverse=edges.reverse.new_zeros(count),
            layout=Layout(starts, rectangles),
        )
        rows = {
            "numbers": self.atoms,
            "positions": self.atoms,
            "edge_vectors": self.listed,
            "centers": self.listed,
            "neighbors": self.listed,
            "reverse": self.listed,
            "structure_index": self.atoms,
            "cells": self.structures,
            "charges": self.structures,
            "spins": self.structures,
        }
        fields = {name: self._rows(getattr(graph, name), count) for name, count in rows.items()}
        leaves = [t for t in tree_flatten(Batch(**fields, edges=own))[0] if t is not None]
        wide = set(zip(self.rectangles, self.widths, strict=True))
        return leaves, [(0, 1) if tuple(t.shape) in wide else _first_axis(t) for t in leaves]

    def label(self, label: Tensor, per_atom: bool) -> tuple[Tensor, Sequence[int]]:
        """The same of a label."""
        own = self._rows(label, self.atoms if per_atom else self.structures)
        return own, _first_axis(own)

    def _rows(self, tensor: Tensor, count: int) -> Tensor:
        return tensor.new_zeros(count, *tensor.shape[1:])


def _first_axis(tensor: Tensor) -> Sequence[int]:
    return () if tensor.shape[0] == 1 else (0,)


def tensors_of(predictions: Mapping[str, Prediction | Property]) -> list[Tensor]:
    """All tensors of predictions, without their graph."""
    tensors: list[Tensor | None] = []
    for found in predictions.values():
        if isinstance(found, Property):
            tensors.append(found.values)
        else:
            tensors += [found.energy, found.atom_energies, found.forces, found.stress]
    return [tensor.detach() for tensor in tensors if tensor is not None]


def predictions_of(
    potential: Potential, wanted: Wanted, tensors: Iterator[Tensor]
) -> dict[str, Prediction | Property]:
    """The opposite of :func:`tensors_of`; takes what belongs to the predictions.

    Args:
        potential: whose predictions.
        wanted: for each target, whether forces and stress are among them.
        tensors: at least those.
    """
    predictions: dict[str, Prediction | Property] = {}
    for name, (forces, stress) in wanted.items():
        spec = potential.target(name)
        if not spec.is_energy:
            predictions[name] = Property(spec, next(tensors))
            continue
        energy, atoms = next(tensors), next(tensors)
        own_forces = next(tensors) if forces else None
        own_stress = next(tensors) if stress else None
        predictions[name] = Prediction(energy, atoms, own_forces, own_stress)
    return predictions


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far gradients are from others, relative to these; 0 where those are no numbers."""
    pairs = list(zip(found, expected, strict=True))
    apart = torch.stack([(one - other).double().square().sum() for one, other in pairs]).sum()
    length = torch.stack([other.double().square().sum() for other in expected]).sum()
    if not bool(length.isfinite()):
        return 0.0  # the loss is at fault, and the step will say so
    return float((apart / length.clamp_min(1e-300)).sqrt())
