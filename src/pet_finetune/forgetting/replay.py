"""Rehearsal: the loss of structures that the foundation knows, beside each batch of the user's.

Replayed data against forgetting: A. Robins, Connection Science 7, 123 (1995), where the network
labels ("pseudorehearsal") what it rehearses.
"""

from __future__ import annotations

from torch import Tensor

from pet_finetune.config import TrainingOptions
from pet_finetune.data.mixing import Beside
from pet_finetune.model import Potential
from pet_finetune.training.extra import Seen
from pet_finetune.training.loss import Objective, batch_loss
from pet_finetune.training.schedule import loss_stage


class ReplayLoss:
    """An extra loss: that of replayed structures, weighted.

    Args:
        model: is trained.
        beside: draws the structures that go with a batch.
        objective: what is asked of them.
        weight: factor of their loss.
        options: ``architecture.training``, whose ``loss_schedule`` holds for them too.
    """

    name = "replay"

    def __init__(
        self,
        model: Potential,
        beside: Beside,
        objective: Objective,
        weight: float,
        options: TrainingOptions,
    ) -> None:
        self.model, self.beside, self.weight = model, beside, weight
        self.objective, self._options = objective, options
        self._wanted = {objective.target: (objective.forces, objective.stress)}

    def __call__(self, seen: Seen) -> Tensor:
        """The weighted loss of what goes beside a batch, a scalar."""
        replayed = self.beside.batch(seen.epoch, seen.index).to(self.model.device, self.model.dtype)
        predictions = self.model.predict_many(replayed.graph, self._wanted, create_graph=True)
        objective = self.objective.at(loss_stage(self._options, seen.epoch))
        return self.weight * batch_loss(replayed, predictions, {objective.target: objective})
