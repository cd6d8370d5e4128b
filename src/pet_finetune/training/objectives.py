"""The loss of a batch, and the number that picks the best model.

The loss has a type and a weight for each of energies per atom, forces, stresses and properties.
Errors are divided by the target's scale, so that weights mean the same for any set of data, and
stress errors count as a virial per atom (stress x volume / atoms, eV), which has the size of the
energies and forces. Labels that a structure lacks are left out of the mean. Where the data have
weights (``weight_key``), each term is multiplied with that of its structure or atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pet_finetune import processes
from pet_finetune.config.target import LossTerm, TargetLoss
from pet_finetune.config.training import LossStage, TrainingOptions, first_epoch
from pet_finetune.data.labelled_batch import LabelledBatch, on_device
from pet_finetune.data.loader import Loader
from pet_finetune.errors import TrainingError
from pet_finetune.graph import Batch
from pet_finetune.keys import forces_key, stress_key, weights_key
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property

from .metrics import Metrics, counted


@dataclass(frozen=True)
class Objective:
    """Loss terms of one target.

    Attributes:
        target: its name.
        loss: types and weights.
        forces, stress: whether any training structure has such labels (and their weight is
            not zero), hence whether they are computed at all.
        scale: what counts as an error of 1, in eV or the unit of the target.
        per_atom: whether energy errors are divided by the number of atoms.
        energy: False for a property, which stages and noise of energies leave alone.
    """

    target: str
    loss: TargetLoss
    forces: bool
    stress: bool
    scale: float | Tensor
    per_atom: bool = True
    energy: bool = True

    def at(self, stage: LossStage | None) -> Objective:
        """The objective in a stage of the run, whose factors multiply the weights."""
        if stage is None or not self.energy:
            return self
        forces, stress = self.loss.forces_term(), self.loss.stress_term()
        weights = {
            "weight": self.loss.weight * stage.energy,
            "forces": forces.model_copy(update={"weight": forces.weight * stage.forces}),
            "stress": stress.model_copy(update={"weight": stress.weight * stage.stress}),
        }
        return replace(self, loss=self.loss.model_copy(update=weights))


def loss_stage(options: TrainingOptions, epoch: int) -> LossStage | None:
    """The stage of ``loss_schedule`` that an epoch, from 0, belongs to; None before the first."""
    begun = [
        stage
        for stage in options.loss_schedule
        if first_epoch(stage.start, options.epochs) <= epoch
    ]
    return begun[-1] if begun else None


def derivatives(objectives: Mapping[str, Objective]) -> dict[str, tuple[bool, bool]]:
    """Whether forces and stress are computed, for each target."""
    return {name: (o.forces, o.stress) for name, o in objectives.items()}


def objectives_at(
    objectives: Mapping[str, Objective], options: TrainingOptions, epoch: int
) -> dict[str, Objective]:
    """The objectives in an epoch, from 0, with the weights that ``loss_schedule`` gives it."""
    stage = loss_stage(options, epoch)
    return {name: o.at(stage) for name, o in objectives.items()}


def _values(errors: Tensor, term: LossTerm) -> Tensor:
    if term.type == "mse":
        return errors**2
    if term.type == "mae":
        return errors.abs()
    return torch.nn.functional.huber_loss(
        errors, torch.zeros_like(errors), reduction="none", delta=term.delta
    )


@dataclass(frozen=True)
class LossPart:
    """One term of the loss of a batch: a mean over the labels of one name.

    Attributes:
        label: the name of the labels.
        objective: what is asked of their target.
        term: the type and the weight of the loss.
    """

    label: str
    objective: Objective
    term: LossTerm


def loss_parts(labels: Iterable[str], objectives: Mapping[str, Objective]) -> list[LossPart]:
    """The terms of the loss of a batch that has labels of these names."""
    parts, known = [], set(labels)
    for name, objective in objectives.items():
        loss = objective.loss
        wanted: list[tuple[str, bool, LossTerm]] = [
            (name, True, loss),
            (forces_key(name), objective.forces, loss.forces_term()),
            (stress_key(name), objective.stress, loss.stress_term()),
        ]
        parts += [
            LossPart(label, objective, term)
            for label, asked, term in wanted
            if asked and label in known
        ]
    return parts


def sum_of_known(
    part: LossPart,
    graph: Batch,
    labels: Mapping[str, Tensor],
    predictions: Mapping[str, Prediction | Property],
) -> Tensor:
    """The sum of the losses of one term over the labels that exist, a scalar."""
    objective, label = part.objective, labels[part.label]
    prediction, atoms = predictions[objective.target], graph.atoms_per_structure
    if isinstance(prediction, Property):
        errors = counted(prediction.spec, prediction.values - label, atoms, graph.volumes)
    elif part.label == objective.target:
        errors = prediction.energy - label
        errors = errors / atoms if objective.per_atom else errors
    elif part.label == forces_key(objective.target):
        assert prediction.forces is not None
        errors = prediction.forces - label
    else:
        assert prediction.stress is not None
        errors = (prediction.stress - label) * (graph.volumes / atoms).view(-1, 1, 1)
    errors = torch.where(label.isnan(), torch.zeros_like(errors), errors / objective.scale)
    values = _values(errors, part.term)
    weights = labels.get(weights_key(part.label))
    if weights is not None:
        rows = weights.nan_to_num(1.0).to(values)  # structures of a set without weights
        values = values * rows.view(-1, *(1,) * (values.dim() - 1))
    return values.sum()


def batch_loss(
    batch: LabelledBatch,
    predictions: Mapping[str, Prediction | Property],
    objectives: Mapping[str, Objective],
) -> Tensor:
    """The weighted sum of all terms, a scalar.

    Each is a mean over the labels of the whole batch where other processes have a part of it: the
    sum of what all of them compute is the loss of the batch, however it is dealt out.
    """
    total = batch.graph.edge_vectors.new_zeros((), dtype=torch.float64)
    for part in loss_parts(batch.labels, objectives):
        count = torch.as_tensor(batch.num_known(part.label)).clamp_min(1)
        known = sum_of_known(part, batch.graph, batch.labels, predictions)
        total = total + part.term.weight * (known / count)
    return total


def check_metric(
    kind: str,
    labels: Collection[str],
    wanted: Mapping[str, tuple[bool, bool]],
    energies: Collection[str] | None = None,
) -> None:
    """Make sure, as soon as data are read, that :func:`best_metric` will find what it needs.

    Args:
        kind: ``best_model_metric``.
        labels: names of all labels in the validation set.
        wanted: for each target, whether forces and stress are computed.
        energies: which of the targets are energies; None for all.

    Raises:
        TrainingError: the validation set lacks the labels, or they are not computed.
    """
    values = [name for name in wanted if name in labels]
    energies = [name for name in values if energies is None or name in energies]
    forces = [name for name in wanted if forces_key(name) in labels]
    needed = {"energy_mae": energies, "forces_mae": forces}.get(kind, values + forces)
    if not needed:
        there = ", ".join(sorted(labels)) or "none"
        raise TrainingError(
            f"best_model_metric '{kind}' needs labels that no validation structure has (there: "
            f"{there}). Use another metric, or validation structures that have them."
        )
    if kind == "forces_mae" and not any(wanted[name][0] for name in forces):
        raise TrainingError(
            "best_model_metric 'forces_mae' needs forces, but none are trained: no training "
            "structure has any, or their weight in the loss is 0. Use another metric."
        )


def best_window(options: TrainingOptions) -> int:
    """Over how many epochs the mean of :func:`best_metric` picks the best model."""
    return options.best_model_window or min(5, max(1, options.epochs // 10))


def best_metric(metrics: Mapping[str, Metrics], kind: str, loss: Callable[[], float]) -> float:
    """The number that picks the best model; lower is better, infinite if it is not finite.

    ``mae_prod`` and ``rmse_prod`` multiply the errors of all quantities of all targets, so that
    none is forgotten because another has larger numbers.
    """
    if kind == "loss":
        value = loss()
    elif kind in ("energy_mae", "forces_mae"):
        quantity = kind.split("_")[0]
        value = math.prod(m.mae(quantity) for m in metrics.values() if quantity in m.kinds)
    else:
        name = kind.split("_")[0]
        value = math.prod(getattr(m, name)(k) for m in metrics.values() for k in m.kinds)
    return value if math.isfinite(value) else math.inf


def mean_loss(
    model: Potential,
    batches: Loader,
    objectives: Mapping[str, Objective],
    options: TrainingOptions,
) -> float:
    """The loss as a mean over structures, with the weights that the model has now.

    Those of the loss are the last stage's in every epoch, so that numbers can be compared.
    """
    model.eval()
    wanted = derivatives(objectives)
    objectives = objectives_at(objectives, options, options.epochs)
    total, count = 0.0, 0
    own = batches.dealt(processes.rank(), processes.size())
    for batch in on_device(own, model.device, model.dtype):
        predictions = model.predict_targets(batch.graph, wanted)
        total += float(batch_loss(batch, predictions, objectives)) * batch.graph.num_structures
        count += batch.graph.num_structures
    totals, counts = zip(*processes.gathered((total, count)), strict=True)
    return sum(totals) / sum(counts)
