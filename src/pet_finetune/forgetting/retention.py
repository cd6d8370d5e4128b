"""The forgetting report: errors on structures that say what the foundation knew."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pet_finetune.committee.committee import Committee
from pet_finetune.data.structure import Structure
from pet_finetune.model import Potential
from pet_finetune.training.labels import evaluation_loader
from pet_finetune.training.metrics import Metrics, evaluate


class Retention:
    """Evaluates models on the retention set.

    Args:
        structures: labelled on the baseline of the model that trains, so that what the refitted
            baseline explains does not count as forgotten.
        targets: the energies that are compared, with their forces.
        model: gives cutoff and precision.
        every: epochs between two evaluations.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        targets: Collection[str],
        model: Potential,
        every: int,
    ) -> None:
        self.every = every
        self._loader = evaluation_loader(structures, model)
        self._wanted = dict.fromkeys(targets, (True, False))

    def errors(self, model: Potential | Committee) -> dict[str, Metrics]:
        """The errors of a model by target."""
        return evaluate(model, self._loader, self._wanted)

    def errors_after(self, model: Potential, epoch: int) -> dict[str, Metrics]:
        """The same after the first epoch (1) and every few from then on, else nothing."""
        return self.errors(model) if epoch == 1 or epoch % self.every == 0 else {}
