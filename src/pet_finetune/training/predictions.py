"""Keeping what a model says of a set while its errors are counted, so that it is asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pet_finetune.committee.calibration import Comparison
from pet_finetune.committee.committee import Committee, CommitteePrediction
from pet_finetune.config.dataset import SystemsOptions
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.data.loader import Loader
from pet_finetune.data.predicted import Predicted
from pet_finetune.data.structure_sets import evenly_spread
from pet_finetune.data.writing import PredictionWriter
from pet_finetune.graph import Batch
from pet_finetune.keys import forces_key, stress_key, uncertainty_key
from pet_finetune.log import get_logger
from pet_finetune.model.compiled import CompiledPredictions
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property

from .metrics import Metrics, evaluate, labelled_values

_logger = get_logger(__name__)

#: What follows a label's name where the number is a spread over the members of a committee.
SPREAD = "~spread"


class PredictionRecorder:
    """Gathers what a model says of the batches of a loader, in the order of its structures.

    Args:
        loader: in whose order the batches come; every one of epoch 0 is given once.
        set_name: what its set is called.
    """

    def __init__(self, loader: Loader, set_name: str) -> None:
        self.loader, self.set_name = loader, set_name
        self._parts: dict[str, list[np.ndarray]] = {}
        self._rows: dict[str, bool] = {}  # whether a name's rows are atoms

    def add(self, batch: LabelledBatch, predictions: Mapping[str, Prediction | Property]) -> None:
        """Keep what a model says of the next batch."""
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
    """What a model says of each structure of a batch, by the names of the labels.

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
