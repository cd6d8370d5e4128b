"""Errors over a data set: energies per atom, components of forces and stress, properties.

What a model says of the set is kept while its errors are counted, so that it is asked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pet_finetune import processes
from pet_finetune.backends.choice import Arena
from pet_finetune.committee.calibration import Comparison
from pet_finetune.committee.committee import Committee, CommitteePrediction
from pet_finetune.committee.llpr import fresh, predict_uncertain
from pet_finetune.config.dataset import SystemsOptions
from pet_finetune.data.labelled_batch import LabelledBatch, on_device
from pet_finetune.data.loader import Loader
from pet_finetune.data.predicted import Predicted
from pet_finetune.data.structure_sets import evenly_spread
from pet_finetune.data.writing import PredictionWriter
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec, forces_key, stress_key, uncertainty_key
from pet_finetune.log import get_logger
from pet_finetune.model.compiled import CompiledPredictions
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property, evaluating
from pet_finetune.terminal import Watch

#: Factor and unit in which each kind of error of an energy is shown.
SHOWN = {
    "energy": (1000.0, "meV/atom"),
    "forces": (1000.0, "meV/A"),
    "stress": (1000.0, "meV/A^3"),
}


class Metrics:
    """Running sums of absolute and squared errors for one target.

    Args:
        target: its name.
        state: sums to go on from, as :meth:`state` gave them.
        spec: the target; where it is no energy, the first prediction tells it too.
    """

    def __init__(
        self,
        target: str,
        state: Mapping[str, list[float]] | None = None,
        spec: TargetSpec | None = None,
    ) -> None:
        self.target = target
        self.spec = TargetSpec(target) if spec is None else spec
        # Of each kind: absolute errors, squared errors, their number; [3] float64. They stay on
        # the device until someone asks, so that a step on a GPU need not wait for them.
        self._sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in (state or {}).items()}

    def state(self) -> dict[str, list[float]]:
        """The sums, as plain numbers."""
        return {kind: sums.tolist() for kind, sums in self._sums.items()}

    def pooled(self) -> Metrics:
        """The errors that all processes have counted, the same on each of them."""
        if processes.size() == 1:
            return self
        found = processes.gathered((self.state(), self.spec))
        return Metrics.together([Metrics(self.target, *one) for one in found])

    @staticmethod
    def together(several: Sequence[Metrics]) -> Metrics:
        """The errors that several, of one target, have counted."""
        sums: dict[str, list[float]] = {}
        for own in several:
            for kind, new in own.state().items():
                old = sums.get(kind, [0.0] * len(new))
                sums[kind] = [a + b for a, b in zip(old, new, strict=True)]
        told = [one.spec for one in several if one.kinds]  # by a prediction, where there was one
        return Metrics(several[0].target, sums, told[0] if told else several[0].spec)

    def _add(self, kind: str, errors: Tensor, known: Tensor) -> None:
        errors = torch.where(known, errors.to(torch.float64), 0.0)
        new = torch.stack([errors.abs().sum(), (errors**2).sum(), known.sum().to(torch.float64)])
        old = self._sums.get(kind)
        self._sums[kind] = new if old is None else old.to(new.device) + new

    @torch.no_grad()
    def update(self, batch: LabelledBatch, prediction: Prediction | Property) -> None:
        """Add the errors of one batch; labels that are NaN do not count, such predictions do."""
        atoms = batch.graph.atoms_per_structure
        if isinstance(prediction, Property):
            self.spec = prediction.spec
        for key, kind, values, _ in labelled_values(self.target, prediction):
            label = batch.labels.get(key)
            if label is None:
                continue
            errors = values - label
            if kind in ("value", "energy"):
                errors = shown(self.spec, errors, atoms)
            self._add(kind, errors, ~label.isnan())

    def shown(self, kind: str) -> tuple[str, float, str]:
        """Name, factor and unit of a kind of error."""
        if kind == "value":
            return self.target, *shown_unit(self.spec)
        return kind, *SHOWN[kind]

    def mae(self, kind: str) -> float:
        """Mean absolute error of ``energy`` (eV/atom), ``forces`` or ``stress``; NaN if none.

        A property has the kind ``value``, in its own unit (as :func:`shown_unit` says).
        """
        total, _, count = self._plain(kind)
        return total / count if count else math.nan

    def rmse(self, kind: str) -> float:
        """Root mean squared error; units as for :meth:`mae`."""
        _, total, count = self._plain(kind)
        return math.sqrt(total / count) if count else math.nan

    @property
    def kinds(self) -> list[str]:
        """The kinds of label that were seen."""
        return [kind for kind, sums in self.state().items() if sums[2]]

    def _plain(self, kind: str) -> list[float]:
        sums = self._sums.get(kind)
        return [0.0, 0.0, 0.0] if sums is None else sums.tolist()

    def as_dict(self) -> dict[str, float]:
        """All errors, ``energy_mae`` and so on."""
        return {
            f"{kind}_{name}": value
            for kind in self.kinds
            for name, value in (("mae", self.mae(kind)), ("rmse", self.rmse(kind)))
        }


def labelled_values(
    target: str, prediction: Prediction | Property
) -> Iterator[tuple[str, str, Tensor, bool]]:
    """Iterate over the labelled quantities of a target.

    Yields:
        The name of its labels, the kind of error, the values, and whether their rows are atoms.
    """
    if isinstance(prediction, Property):
        yield target, "value", prediction.values, prediction.spec.per_atom
        return
    yield target, "energy", prediction.energy, False
    if prediction.forces is not None:
        yield forces_key(target), "forces", prediction.forces, True
    if prediction.stress is not None:
        yield stress_key(target), "stress", prediction.stress, False


# Of a run: by the name of the set and the target.
Errors = dict[str, dict[str, Metrics]]


def evaluate(
    model: Potential | Committee,
    batches: Iterable[LabelledBatch],
    wanted: Mapping[str, tuple[bool, bool]],
    keep: Callable[[LabelledBatch, Mapping[str, Prediction | Property]], None] | None = None,
    compiled: CompiledPredictions | None = None,
) -> dict[str, Metrics]:
    """Errors of a model on labelled batches.

    Args:
        model: is put into evaluation mode, and back.
        batches: any device and dtype; moved to the model's. Several processes deal those of a
            loader out, unless they are kept, and must all call this.
        wanted: for each target, whether forces and stress are compared.
        keep: is given each batch and what the model says of it.
        compiled: predicts in the model's place where no uncertainty is known.
    """
    metrics = {name: Metrics(name) for name in wanted}
    deals = False
    if isinstance(batches, Loader) and keep is None:
        batches, deals = batches.dealt(processes.rank(), processes.size()), True
    layers = {} if isinstance(model, Committee) else fresh(model)
    ready = None if isinstance(model, Committee) else model.network.neighborhood.with_edges
    total = len(batches.structures) if isinstance(batches, Loader) and not deals else None
    with evaluating(model), Watch("predictions", "structures", total) as watch:
        for batch in on_device(batches, model.device, model.dtype, ready):
            predictions: Mapping[str, Prediction | Property] | None = None
            if isinstance(model, Committee):  # of an energy, and has no other targets
                predictions = model.predict_many(batch.graph, wanted)
            elif compiled is not None and layers.keys().isdisjoint(wanted):
                predictions = compiled.predict(batch.graph, wanted)
            if predictions is None:
                assert isinstance(model, Potential)
                predictions = predict_uncertain(model, batch.graph, wanted, layers)
            for name, prediction in predictions.items():
                metrics[name].update(batch, prediction)
            if keep is not None:
                keep(batch, predictions)
            watch.step(batch.graph.num_structures)
    return {name: own.pooled() for name, own in metrics.items()} if deals else metrics


# Units that are shown a thousand times smaller.
_IN_MILLI = frozenset({"eV", "eV/A", "eV/A^3"})


def counted(spec: TargetSpec, errors: Tensor, atoms: Tensor, volumes: Tensor) -> Tensor:
    """Errors of a property as the loss counts them.

    Those of a structure are divided by its number of atoms, as metatrain does, unless the target
    is intensive. Those of a direct stress count as a virial per atom, as a derived stress does.
    """
    if spec.per_volume:
        return errors * _rows(volumes / atoms, errors)
    return shown(spec, errors, atoms)


def shown(spec: TargetSpec, errors: Tensor, atoms: Tensor) -> Tensor:
    """Errors of a property as tables show them, in :func:`shown_unit`; arguments as above."""
    return errors / _rows(atoms, errors) if _divided(spec) else errors


def shown_unit(spec: TargetSpec) -> tuple[float, str]:
    """Factor and unit in which errors of a property are shown."""
    factor, unit = (1000.0, f"m{spec.unit}") if spec.unit in _IN_MILLI else (1.0, spec.unit)
    return factor, f"{unit or '1'}/atom" if _divided(spec) else unit


def _divided(spec: TargetSpec) -> bool:
    return not (spec.per_atom or spec.per_volume or spec.intensive)


def _rows(factors: Tensor, values: Tensor) -> Tensor:
    """Factors with one entry for each row, in the dtype of the values."""
    return factors.to(values).view(-1, *(1,) * (values.dim() - 1))


_logger = get_logger(__name__)

#: What follows a label's name where the number is a spread over the members of a committee.
SPREAD = "~spread"


class PredictionRecorder:
    """Collects predictions for a loader's batches, in the order of its structures."""

    def __init__(self, loader: Loader, set_name: str) -> None:
        self.loader, self.set_name = loader, set_name
        self._parts: dict[str, list[np.ndarray]] = {}
        self._rows: dict[str, bool] = {}  # whether a name's rows are atoms

    def add(self, batch: LabelledBatch, predictions: Mapping[str, Prediction | Property]) -> None:
        """Add the predictions of the next batch."""
        for target, prediction in predictions.items():
            for key, kind, values, per_atom in labelled_values(target, prediction):
                self._keep(key, values, per_atom)
                if isinstance(prediction, CommitteePrediction) and prediction.knows(kind):
                    self._keep(key + SPREAD, prediction.spread(kind), per_atom)

    def _keep(self, name: str, values: Tensor, per_atom: bool) -> None:
        values = values.detach().cpu()
        # Totals are float64 already; of all else float32 says more than a plot can show.
        if values.dim() > 1:
            values = values.to(torch.float32)
        self._parts.setdefault(name, []).append(values.numpy())
        self._rows[name] = per_atom

    def values(self) -> dict[str, np.ndarray]:
        """All predictions, [n_structures, ...] or [n_atoms, ...], by the names of their labels."""
        order = self.loader.order()
        sizes = np.array([self.loader.structures[index].num_atoms for index in order])
        back = np.argsort(order)
        of_atoms = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
        atoms_back = np.concatenate([of_atoms[index] for index in back])
        return {
            name: np.concatenate(parts)[atoms_back if self._rows[name] else back]
            for name, parts in self._parts.items()
        }


def split_predictions(
    batch: Batch, predictions: Mapping[str, Prediction | Property]
) -> list[dict[str, np.ndarray]]:
    """Predictions for each structure of a batch, by label.

    A stress is NaN where the structure has no volume.
    """
    sizes = batch.atoms_per_structure.tolist()
    results: list[dict[str, np.ndarray]] = [{} for _ in sizes]

    def put(name: str, values: Tensor, per_atom: bool) -> None:
        rows = torch.split(values.detach().cpu(), sizes if per_atom else 1)
        for result, row in zip(results, rows, strict=True):
            result[name] = (row if per_atom else row[0]).numpy()

    flat = (batch.volumes <= 0).view(-1, 1, 1)
    for target, prediction in predictions.items():
        for key, kind, values, per_atom in labelled_values(target, prediction):
            put(key, values.masked_fill(flat, torch.nan) if kind == "stress" else values, per_atom)
        if isinstance(prediction, CommitteePrediction):
            put(uncertainty_key(target), prediction.uncertainty("energy"), False)
    return results


def with_model(
    predicted: Predicted | None,
    recorder: PredictionRecorder,
    name: str,
    model: Potential | Committee,
) -> Predicted:
    """Predictions of one more model.

    Args:
        predicted: those of others; dropped where they are of other structures.
        recorder: what the model said.
        name: ``before`` or ``after``.
        model: gives the baselines of energies; those of a committee are what they were.
    """
    own = Predicted.of(recorder.loader.structures, recorder.set_name)
    others = predicted if predicted is not None and predicted.same_structures(own) else own
    baselines = others.baselines
    if isinstance(model, Potential):
        baselines = {
            target: _baselines(model, target, own)
            for target, spec in model.targets.items()
            if spec.is_energy and target in own.labels
        }
    return replace(own, baselines=baselines, models={**others.models, name: recorder.values()})


def _baselines(model: Potential, target: str, structures: Predicted) -> np.ndarray:
    """Sum of an energy's baselines over the atoms of each structure, eV, [n_structures]."""
    values = model.composition.get(target).cpu().numpy()
    # An element that the model lacks would have been refused before.
    rows = np.searchsorted(np.array(model.species), structures.numbers)
    sums: np.ndarray = np.bincount(structures.structure_index, values[rows], len(structures.sizes))
    return sums


def errors_and_predictions(
    model: Potential,
    loader: Loader,
    targets: Sequence[str],
    path: str | None,
    systems: Mapping[str, SystemsOptions],
    kept: list[dict[str, np.ndarray]] | None,
    comparison: Comparison,
    compiled: CompiledPredictions | None = None,
) -> dict[str, Metrics]:
    """Errors on one set, and where they are wanted its predictions.

    Args:
        model: is put into evaluation mode, and back.
        loader: of the set.
        targets: that are compared.
        path: a file to write predictions to.
        systems: by file that was read, how.
        kept: a list that takes the predictions of each structure.
        comparison: takes errors beside uncertainties.
        compiled: predicts in the model's place.
    """
    labels = loader.label_names
    if path is None and kept is None:
        wanted = {t: (forces_key(t) in labels, stress_key(t) in labels) for t in targets}
        with Arena().reused():
            return evaluate(model, loader, wanted, comparison.add, compiled)
    periodic = any(bool(structure.pbc.all()) for structure in evenly_spread(loader.structures))
    wanted = {
        t: (True, periodic) if model.targets[t].is_energy else (False, False) for t in targets
    }
    energies = [t for t in targets if model.targets[t].is_energy]
    kinds = {t: model.targets[t].label_kind for t in targets if t not in energies}
    main = "energy" if "energy" in energies else energies[0] if energies else None
    left = iter(loader.structures)
    with ExitStack() as stack:
        stack.enter_context(Arena().reused())
        writer = None
        if path is not None:
            writer = stack.enter_context(PredictionWriter(path, main, kinds=kinds, systems=systems))

        def keep(batch: LabelledBatch, predictions: Mapping[str, Prediction | Property]) -> None:
            comparison.add(batch, predictions)
            values = split_predictions(batch.graph, predictions)
            if kept is not None:
                kept.extend(values)
            if writer is not None:
                writer.add(list(islice(left, len(values))), values)

        metrics = evaluate(model, loader, wanted, keep, compiled)
    if path is not None:
        _logger.info("predictions of %d structures: %s", len(loader.structures), path)
    return metrics
