"""The loss of a batch: energies per atom, forces, stresses, properties; a type and weight each.

Errors are divided by the target's scale, so that weights mean the same for any set of data, and
stress errors count as a virial per atom (stress x volume / atoms, eV), which has the size of the
energies and forces. Labels that a structure lacks are left out of the mean. Where the data have
weights (``weight_key``), each term is multiplied with that of its structure or atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pet_finetune.config import LossStage, LossTerm, TargetLoss, TrainingOptions, first_epoch
from pet_finetune.data.batch import LabelledBatch
from pet_finetune.graph import Batch
from pet_finetune.keys import forces_key, stress_key, weights_key
from pet_finetune.model import Prediction, Property

from .metrics import counted


@dataclass(frozen=True)
class Objective:
    """What is asked of one target.

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
        if first_epoch(stage.start, options.num_epochs) <= epoch
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
class Part:
    """One term of the loss of a batch: a mean over the labels of one name.

    Attributes:
        label: the name of the labels.
        objective: what is asked of their target.
        term: the type of the loss.
        weight: of the term.
    """

    label: str
    objective: Objective
    term: LossTerm
    weight: float


def loss_parts(labels: Iterable[str], objectives: Mapping[str, Objective]) -> list[Part]:
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
            Part(label, objective, term, term.weight)
            for label, asked, term in wanted
            if asked and label in known
        ]
    return parts


def sum_of_known(
    part: Part,
    graph: Batch,
    labels: Mapping[str, Tensor],
    predictions: Mapping[str, Prediction | Property],
) -> Tensor:
    """The sum of the losses of one term over the labels that exist, a scalar.

    Args:
        part: the term.
        graph: the structures.
        labels: of them, with their weights; NaN where a structure lacks one.
        predictions: with the derivatives that the objectives ask for.
    """
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

    Args:
        batch: with labels, NaN where a structure lacks one; the part of a batch gives its part of
            the loss.
        predictions: one for each objective, with the derivatives it asks for.
        objectives: by target.
    """
    total = batch.graph.edge_vectors.new_zeros((), dtype=torch.float64)
    for part in loss_parts(batch.labels, objectives):
        count = torch.as_tensor(batch.num_known(part.label)).clamp_min(1)
        known = sum_of_known(part, batch.graph, batch.labels, predictions)
        total = total + part.weight * (known / count)
    return total
