"""The loss of a batch: energies per atom, forces, stresses, properties; a type and weight each.

Errors are divided by the target's scale, so that weights mean the same for any set of data, and
stress errors count as a virial per atom (stress x volume / atoms, eV), which has the size of the
energies and forces. Labels that a structure lacks are left out of the mean. Where the data have
weights (``weight_key``), each term is multiplied with that of its structure or atom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pet_finetune.config import LossStage, LossTerm, TargetLoss, TrainingOptions, first_epoch
from pet_finetune.data.batch import LabelledBatch
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
    scale: float
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


def _mean_of_known(
    batch: LabelledBatch, name: str, errors: Tensor, known: Tensor, term: LossTerm
) -> Tensor:
    """Mean of the loss over the labels that exist; zero where none does.

    The mean is over the whole batch where other processes have a part of it: the sum of what all
    of them compute is the loss of the batch, however it is dealt out.
    """
    errors = torch.where(known, errors, torch.zeros_like(errors))
    count = torch.as_tensor(batch.num_known(name)).clamp_min(1)
    values = _values(errors, term)
    weights = batch.labels.get(weights_key(name))
    if weights is not None:
        rows = weights.nan_to_num(1.0).to(values)  # structures of a set without weights
        values = values * rows.view(-1, *(1,) * (values.dim() - 1))
    return values.sum() / count


def batch_loss(
    batch: LabelledBatch,
    predictions: Mapping[str, Prediction | Property],
    objectives: Mapping[str, Objective],
) -> Tensor:
    """The weighted sum of all terms, a scalar.

    Args:
        batch: with labels, NaN where a structure lacks one; the part of a batch gives its part of
            the loss.
        predictions: one for each objective, with the derivatives it asks for.
        objectives: by target.
    """
    total = batch.graph.edge_vectors.new_zeros((), dtype=torch.float64)
    for name, objective in objectives.items():
        prediction = predictions[name]
        if isinstance(prediction, Property):
            total = total + _property_loss(batch, prediction, objective)
        else:
            total = total + _target_loss(batch, prediction, objective)
    return total


def _property_loss(batch: LabelledBatch, prediction: Property, objective: Objective) -> Tensor:
    label, loss = batch.labels.get(objective.target), objective.loss
    if label is None or loss.weight == 0:
        return prediction.values.new_zeros(())
    atoms, volumes = batch.graph.atoms_per_structure, batch.graph.volumes
    errors = counted(prediction.spec, prediction.values - label, atoms, volumes)
    return loss.weight * _mean_of_known(
        batch, objective.target, errors / objective.scale, ~label.isnan(), loss
    )


def _target_loss(batch: LabelledBatch, prediction: Prediction, objective: Objective) -> Tensor:
    name, loss = objective.target, objective.loss
    atoms = batch.graph.atoms_per_structure
    total = prediction.energy.new_zeros(())
    label = batch.labels.get(name)
    if label is not None and loss.weight > 0:
        errors = (prediction.energy - label) / objective.scale
        if objective.per_atom:
            errors = errors / atoms
        total = total + loss.weight * _mean_of_known(batch, name, errors, ~label.isnan(), loss)
    key = forces_key(name)
    label = batch.labels.get(key)
    if label is not None and objective.forces:
        assert prediction.forces is not None
        term = loss.forces_term()
        errors = (prediction.forces - label) / objective.scale
        total = total + term.weight * _mean_of_known(batch, key, errors, ~label.isnan(), term)
    key = stress_key(name)
    label = batch.labels.get(key)
    if label is not None and objective.stress:
        assert prediction.stress is not None
        term = loss.stress_term()
        volume_per_atom = (batch.graph.volumes / atoms).view(-1, 1, 1)
        errors = (prediction.stress - label) * volume_per_atom / objective.scale
        total = total + term.weight * _mean_of_known(batch, key, errors, ~label.isnan(), term)
    return total
