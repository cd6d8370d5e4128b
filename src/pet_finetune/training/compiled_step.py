"""A training step as one compiled graph: predictions, loss and gradients of a batch.

What the sizes of tensors depend on, which edges count, is found beside the graph. One graph then
does for batches of all sizes; another one is needed where other labels are known or other
parameters train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pet_finetune.backends.choice import EAGER, using
from pet_finetune.backends.graphs import Graph
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.graph import Batch
from pet_finetune.keys import label_kind
from pet_finetune.log import get_logger
from pet_finetune.model.compiled import (
    Graphs,
    Sizes,
    distance,
    obstacle,
    predictions_of,
    tensors_of,
)
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property

from .objectives import LossPart, Objective, loss_parts, sum_of_known
from .step import mixed

_LOG = get_logger(__name__)
#: On a GPU, `auto` compiles where a run has so many batches: some two minutes of compiling are a
#: small part of it then.
MANY_BATCHES = 5000
#: How far compiled gradients may be from plain ones, relative to their length.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_TOLERANCE_MIXED = 0.1


def _compiles(options: TrainingOptions, model: Potential, num_batches: int) -> bool:
    """Whether training uses compiled steps."""
    if options.compile == "off":
        return False
    reason = _obstacle(options, model)
    if reason is None and options.compile == "auto":
        if model.device.type == "cpu":
            return False  # the kernels are as fast or faster: docs/performance.md
        if num_batches < MANY_BATCHES:
            reason = f"a run of {num_batches} batches is over before compiling pays"
    if reason is not None:
        _LOG.info("compile: %s: steps are not compiled: %s", options.compile, reason)
        return False
    _LOG.info("compile: %s: training steps are compiled", options.compile)
    return True


def _obstacle(options: TrainingOptions, model: Potential) -> str | None:
    """Reason against a compiled step, or None."""
    if options.gradient_checkpointing:
        return "gradient_checkpointing computes parts again, which a compiled graph decides itself"
    if any(getattr(module, "dropout", 0.0) for module in model.network.modules()):
        return "dropout draws other numbers in each step"
    return obstacle(model)


@dataclass(frozen=True)
class Gradients:
    """Loss and gradients of a batch.

    Attributes:
        loss: a float64 scalar.
        predictions: by target.
        gradients: of the loss by each parameter; None where the loss does not depend on it.
    """

    loss: Tensor
    predictions: dict[str, Prediction | Property]
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class _Form:
    """All of a step but numbers: what one graph is for.

    Attributes:
        trained: names of the parameters that train, of the potential.
        structure: how the batch's tensors go together.
        leaves: which of its leaves are tensors.
        single: whether the batch is of one structure.
        labels: names of the labels, in order.
        parts: terms of the loss, their weights aside.
    """

    trained: tuple[str, ...]
    structure: TreeSpec
    leaves: tuple[bool, ...]
    single: bool
    labels: tuple[str, ...]
    parts: tuple[LossPart, ...]

    def key(self) -> str:
        """Key of the form, equal in all processes."""
        return repr((self.trained, self.leaves, self.single, self.labels, self.parts))


class CompiledStep:
    """Computes predictions, loss and gradients by compiled graphs.

    Args:
        model: what trains.
        wanted: whether forces and stress are computed, for each target.
        precision: ``architecture.training.precision``.
    """

    def __init__(
        self, model: Potential, wanted: Mapping[str, tuple[bool, bool]], precision: str | None
    ) -> None:
        self._model, self._wanted, self._precision = model, dict(wanted), precision
        self._graphs = Graphs(model, "training steps", "gradients")
        self._weights = self._graphs.weights
        #: Of each form, which parameters the loss depends on.
        self._depends: dict[str, list[bool]] = {}

    @classmethod
    def chosen(
        cls,
        model: Potential,
        wanted: Mapping[str, tuple[bool, bool]],
        options: TrainingOptions,
        num_batches: int,
    ) -> CompiledStep | None:
        """Compiled steps where the options have it so, which a line in the log explains.

        Args:
            model: what trains.
            wanted: whether forces and stress are computed, for each target.
            options: ``architecture.training``.
            num_batches: of the run.
        """
        if not _compiles(options, model, num_batches):
            return None
        return cls(model, wanted, options.precision)

    def __call__(
        self,
        batch: LabelledBatch,
        objectives: Mapping[str, Objective],
        parameters: Sequence[Tensor],
    ) -> Gradients | None:
        """Compute a batch; None if it must be computed without a graph.

        That is where compiling failed, and for structures without any edges.

        Args:
            batch: on the model's device.
            objectives: with the weights of now.
            parameters: of the model, those that gradients are wanted of.
        """
        if self._graphs.failed:
            return None
        with using(EAGER, self._model):
            graph = batch.graph
            if graph.edges is None:
                graph = self._model.network.neighborhood.with_edges(graph)
            assert graph.edges is not None
            if not len(graph.edges.centers):
                return None
            form, values = self._form(graph, batch, objectives, parameters)
            key = form.key()
            found = self._graphs.get(key, lambda: self._make(form, values, graph, batch))
        if found is None:
            return None
        with torch.no_grad():
            loss, *rest = found(*values)
        left = iter(rest)
        predictions = predictions_of(self._model, self._wanted, left)
        gradients = [next(left) if depends else None for depends in self._depends[key]]
        return Gradients(loss, predictions, gradients)

    def _form(
        self,
        graph: Batch,
        batch: LabelledBatch,
        objectives: Mapping[str, Objective],
        parameters: Sequence[Tensor],
    ) -> tuple[_Form, list[Tensor]]:
        """The form of a step, and the numbers that go into its graph."""
        wanted = {id(parameter) for parameter in parameters}
        named = self._weights.named.items()
        trained = tuple(name for name, value in named if id(value) in wanted)
        leaves, structure = tree_flatten(graph)
        labels = sorted(batch.labels)
        parts = loss_parts(labels, objectives)
        counts = [batch.num_known(part.label) for part in parts]
        numbers = _numbers(parts, counts, graph.cells.device)
        form = _Form(
            trained,
            structure,
            tuple(leaf is not None for leaf in leaves),
            graph.num_structures == 1,
            tuple(labels),
            tuple(_bare(part) for part in parts),
        )
        tensors = [leaf for leaf in leaves if leaf is not None]
        given = [batch.labels[name] for name in labels]
        return form, [*self._weights.values(), *tensors, *given, numbers]

    def _function(self, form: _Form) -> Callable[..., list[Tensor | None]]:
        """The step as a function of tensors; a gradient may be None."""
        names, trained = list(self._weights.named), set(form.trained)

        def step(*values: Tensor) -> list[Tensor | None]:
            *others, numbers = values
            factors, scales = numbers.unbind(0)
            weights, others = others[: len(names)], others[len(names) :]
            # The parameters that train, as leaves of this calculation.
            weights = [
                value.detach().requires_grad_() if name in trained else value
                for name, value in zip(names, weights, strict=True)
            ]
            taken = iter(others)
            leaves = [next(taken) if there else None for there in form.leaves]
            graph: Batch = tree_unflatten(leaves, form.structure)
            labels = dict(zip(form.labels, taken, strict=True))
            with torch.enable_grad(), mixed(self._precision, self._model):
                predictions = self._weights.predict(weights, graph, self._wanted, True)
            with torch.enable_grad():
                parts = [_scaled(p, s) for p, s in zip(form.parts, scales, strict=True)]
                sums = [sum_of_known(part, graph, labels, predictions) for part in parts]
                loss = (torch.stack([s.to(factors) for s in sums]) * factors).sum()
            inputs = [w for name, w in zip(names, weights, strict=True) if name in trained]
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
            return [loss.detach(), *tensors_of(predictions), *gradients]

        return step

    def _make(
        self, form: _Form, values: list[Tensor], graph: Batch, batch: LabelledBatch
    ) -> Graph | None:
        function, own = self._function(form), form.key()
        expected = list(function(*values))
        depends = [gradient is not None for gradient in expected[-len(form.trained) :]]
        self._depends[own], count = depends, sum(depends)

        def filled(*values: Tensor) -> list[Tensor]:
            return [value for value in function(*values) if value is not None]

        def error(found: Sequence[Tensor]) -> float:
            return distance(found[-count:], [g for g in expected if g is not None][-count:])

        tolerance = _TOLERANCES[self._model.dtype] if self._precision is None else _TOLERANCE_MIXED
        key = self._weights.key("step", self._wanted, self._precision, own)
        examples = self._examples(form, values, graph, batch)
        return self._graphs.make(key, filled, values, examples, error, tolerance)

    def _examples(
        self, form: _Form, values: list[Tensor], graph: Batch, batch: LabelledBatch
    ) -> tuple[list[Tensor], list[Sequence[int]]]:
        """Inputs for following the function, and which of their axes are free."""
        sizes = Sizes(structures=1 if form.single else 5)
        leaves, free = sizes.batch(graph)
        for name in form.labels:
            leaf, axes = sizes.label(batch.labels[name], label_kind(name, batch.kinds).per_atom)
            leaves.append(leaf)
            free.append(axes)
        weights = values[: len(self._weights.named)]
        return [*weights, *leaves, values[-1]], [*[()] * len(weights), *free, ()]


def _bare(part: LossPart) -> LossPart:
    """The term without weights and scale, which may be others in another run or epoch."""
    loss = part.objective.loss
    terms = {
        "forces": loss.forces_term().model_copy(update={"weight": 0.0}),
        "stress": loss.stress_term().model_copy(update={"weight": 0.0}),
    }
    objective = replace(
        part.objective, scale=1.0, loss=loss.model_copy(update={"weight": 0.0, **terms})
    )
    term = part.term.model_copy(update={"weight": 0.0})
    return replace(part, objective=objective, term=term)


def _scaled(part: LossPart, scale: Tensor) -> LossPart:
    return replace(part, objective=replace(part.objective, scale=scale))


def _numbers(
    parts: Sequence[LossPart], counts: Sequence[Tensor | int], device: torch.device
) -> Tensor:
    """Weight of each term's sum and its scale: [2, n_parts] float64."""
    given = [[part.term.weight for part in parts], [part.objective.scale for part in parts]]
    numbers = torch.tensor(given, dtype=torch.float64).to(device, non_blocking=True)
    known = torch.stack([torch.as_tensor(count, device=device) for count in counts])
    return torch.stack([numbers[0] / known.clamp_min(1), numbers[1]])
