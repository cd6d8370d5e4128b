"""Predictions as compiled graphs, and what compiled graphs of a potential have in common.

Weights are inputs of a graph, so that it does for all models of a kind. What the sizes of tensors
depend on, which edges count, is found beside it, so that it does for structures of all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from pet_finetune.backends.choice import EAGER, using
from pet_finetune.backends.graphs import CannotCompile, Graph, compiled_graph, is_compiled
from pet_finetune.graph import Batch, Edges, Layout, Rectangles
from pet_finetune.keys import Compile
from pet_finetune.log import get_logger
from pet_finetune.nn.quantized import num_quantized

from .potential import Potential
from .prediction import Prediction, Property

_LOG = get_logger(__name__)
#: For each target, whether forces and stress are computed.
Wanted = Mapping[str, tuple[bool, bool]]
#: How far compiled forces may be from plain ones, relative to their length.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Forces count as this long at least, eV/A each: those of a perfect crystal are rounding errors.
_SMALL = 0.1


class Graphs:
    """Compiled graphs of a potential, one for each form of what they are given.

    The first result of each is computed without it, too: should it differ by more than rounding
    explains, or should compiling fail, a warning says so and nothing is compiled from then on.

    Args:
        potential: held on to, and so are its tensors as they are now.
        what: the graphs compute, for the log: a plural.
        judged: what of their results is compared.
        only_known: whether graphs are used that are there, and none is compiled.
    """

    def __init__(
        self, potential: Potential, what: str, judged: str, only_known: bool = False
    ) -> None:
        self.weights = Weights(potential)
        self._device, self._what, self._judged = potential.device, what, judged
        self._only_known = only_known
        self._made: dict[Hashable, Graph | None] = {}
        self.failed = False

    def get(self, form: Hashable, make: Callable[[], Graph | None]) -> Graph | None:
        """The graph of a form; None where there is none.

        Args:
            form: all of what it computes but numbers.
            make: makes it, with :meth:`make`.
        """
        if self.failed:
            return None
        if form not in self._made:
            try:
                self._made[form] = make()
            except CannotCompile as error:
                _LOG.warning("%s are computed without compiling: %s", self._what, error)
                self.failed = True
                return None
        return self._made[form]

    def make(
        self,
        key: str,
        function: Graph,
        values: Sequence[Tensor],
        examples: tuple[Sequence[Tensor], Sequence[Sequence[int]]],
        error: Callable[[Sequence[Tensor]], float],
        tolerance: float,
    ) -> Graph | None:
        """Compile a function and compare it with itself; None where it would have to be compiled.

        Args:
            key: as for :func:`~pet_finetune.backends.graphs.compiled_graph`.
            function: as there.
            values: its first input.
            examples: inputs for following it, and which of their axes are free.
            error: how far results are from those of the function, relative to their length.
            tolerance: of that.

        Raises:
            CannotCompile: the graph cannot be made, fails, or computes something else.
        """
        if self._only_known and not is_compiled(key, self._device):
            return None
        graph = compiled_graph(self._what, key, self._device, function, *examples)
        try:
            with torch.no_grad():
                apart = error(list(graph(*values)))
        except RuntimeError as failure:
            raise CannotCompile(f"the compiled graph failed ({failure})") from failure
        said = f"{self._judged} differ by {apart:.1e} of their length"
        if apart > tolerance:
            raise CannotCompile(f"compiled {said}")
        _LOG.info("compiled %s: the first %s", self._what, said)
        return graph


class CompiledPredictions:
    """Predictions of a potential that does not train, by compiled graphs.

    A potential whose modules are exchanged (by loading an adapter, say) needs a new one.

    Args:
        potential: in evaluation mode; held on to, not copied.
        only_known: whether graphs are used that are there, and none is compiled.
    """

    def __init__(self, potential: Potential, only_known: bool = False) -> None:
        self._potential = potential
        self._graphs = Graphs(potential, "predictions", "forces", only_known)

    @classmethod
    def chosen(cls, potential: Potential, compile: Compile) -> CompiledPredictions | None:
        """Compiled predictions where the word has it so, else None.

        Args:
            potential: as for the class.
            compile: ``on``, ``off``, or ``auto`` for graphs that were compiled before, on a GPU.
        """
        if compile == "off" or (compile == "auto" and potential.device.type == "cpu"):
            return None
        return cls(potential, only_known=compile == "auto")

    def predict(self, batch: Batch, wanted: Wanted) -> dict[str, Prediction | Property] | None:
        """:meth:`Potential.predict_targets` by a graph; None if there is none.

        Args:
            batch: the structures.
            wanted: for each target, whether forces and stress are computed.
        """
        if self._graphs.failed:
            return None
        with using(EAGER, self._potential):
            graph = batch
            if batch.edges is None or batch.edges.layout.rectangles is None:
                graph = self._potential.network.neighborhood.with_edges(batch)
            graph = _all_within(graph)
            assert graph.edges is not None
            if not len(graph.edges.centers):
                return None
            leaves = tree_flatten(graph)[0]
            values = [*self._graphs.weights.values(), *(t for t in leaves if t is not None)]
            there = tuple(leaf is not None for leaf in leaves)  # one more for a further rectangle
            form = (tuple(wanted.items()), graph.num_structures == 1, there)
            found = self._graphs.get(form, lambda: self._make(form, graph, values, wanted))
        if found is None:
            return None
        with torch.no_grad():
            return predictions_of(self._potential, wanted, iter(found(*values)))

    def _make(
        self, form: Hashable, graph: Batch, values: Sequence[Tensor], wanted: Wanted
    ) -> Graph | None:
        problem = obstacle(self._potential)
        if problem is not None:
            raise CannotCompile(problem)
        weights = self._graphs.weights
        count = len(weights.named)
        all_leaves, structure = tree_flatten(graph)
        there = [leaf is not None for leaf in all_leaves]

        def predict(*values: Tensor) -> list[Tensor]:
            taken = iter(values[count:])
            leaves = [next(taken) if own else None for own in there]
            batch: Batch = tree_unflatten(leaves, structure)
            return tensors_of(weights.predict(values[:count], batch, wanted, False))

        def judged(tensors: Sequence[Tensor]) -> list[Tensor]:
            return _judged(predictions_of(self._potential, wanted, iter(tensors)))

        def error(found: Sequence[Tensor]) -> float:
            return distance(judged(found), judged(predict(*values)), _SMALL)

        leaves, free = Sizes(structures=1 if graph.num_structures == 1 else 5).batch(graph)
        examples = [*values[:count], *leaves], [*[()] * count, *free]
        key = weights.key("prediction", form)
        tolerance = _TOLERANCES[self._potential.dtype]
        return self._graphs.make(key, predict, values, examples, error, tolerance)


def obstacle(potential: Potential) -> str | None:
    """Why nothing of a potential can be compiled, or None."""
    if potential.hypers.long_range.enable:
        return "the grids of long-range features have other sizes for other cells"
    if num_quantized(potential.network):
        return "the base's weights are quantised"
    return None


def _judged(predictions: Mapping[str, Prediction | Property]) -> list[Tensor]:
    """Tensors for the comparison of predictions: derivatives and properties, or energies."""
    derived: list[Tensor | None] = []
    for found in predictions.values():
        own = [found.values] if isinstance(found, Property) else [found.forces, found.stress]
        derived += own
    tensors = [tensor for tensor in derived if tensor is not None]
    return tensors or [p.atom_energies for p in predictions.values() if isinstance(p, Prediction)]


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
        """Key of a function of the potential, equal in all processes.

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
            radii=None if edges.radii is None else edges.radii.new_zeros(self.atoms),
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


def distance(found: Sequence[Tensor], expected: Sequence[Tensor], least: float = 0.0) -> float:
    """Relative distance of tensors from others; 0 where those are not numbers.

    Args:
        found: some tensors.
        expected: others.
        least: a mean square below that of this number counts as it.
    """
    pairs = list(zip(found, expected, strict=True))
    apart = torch.stack([(one - other).double().square().sum() for one, other in pairs]).sum()
    length = torch.stack([other.double().square().sum() for other in expected]).sum()
    if not bool(length.isfinite()):
        return 0.0  # the loss is at fault, and the step will say so
    least = max(least**2 * sum(other.numel() for other in expected), 1e-300)
    return float((apart / length.clamp_min(least)).sqrt())
