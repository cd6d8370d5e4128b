"""The forgetting report: errors on structures that the foundation knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pet_finetune.committee.committee import Committee
from pet_finetune.config.run_options import Options
from pet_finetune.data.readers import probe_structures
from pet_finetune.data.structure import Structure
from pet_finetune.errors import ConfigError
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.training.feature import Plan, TrainingRun
from pet_finetune.training.loggers import describe
from pet_finetune.training.metrics import Metrics, evaluate
from pet_finetune.training.sets import evaluation_loader, label_with, relabelled
from pet_finetune.training.starting_model import FoundationEnergies, named_energy
from pet_finetune.training.step import Measured

from .replay import (
    Keeping,
    as_plain,
    choose_head,
    chosen,
    from_plain,
    known_foundation,
    read_labelled,
)

_logger = get_logger(__name__)


def compared_targets(
    options: Options, foundation: FoundationEnergies, kept: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """The energies that the forgetting report compares, and the one whose labels it reads.

    Args:
        options: of the run.
        foundation: what it starts from.
        kept: heads of the foundation that stay in the model untrained-for by the user's data.

    Returns:
        Names of the new model's energies, none if there is nothing to compare with, and the
        foundation's energy that a retention file is labelled for (empty without a file).
    """
    data = options.finetune.retention.read_from
    targets = tuple(dict.fromkeys([*foundation.sources, *kept]))
    if data is None:
        return targets, ""
    path = "architecture.training.finetune.retention.read_from"
    source = named_energy(data.targets, foundation, path)
    targets = tuple(t for t in targets if foundation.sources.get(t, t) == source)
    if not targets:
        raise ConfigError(
            f"{path}.targets: no head of the new model begins as that of '{source}', so there is "
            "nothing to compare. Give data of the energy that the heads are inherited from."
        )
    return targets, source


class RetentionSet:
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
        """Errors after the first epoch (1) and every few epochs from then on, else nothing."""
        return self.errors(model) if epoch == 1 or epoch % self.every == 0 else {}


class RetentionReport(Keeping):
    """The feature ``finetune.retention``: :class:`RetentionSet` before, during and after a run."""

    name = "retention"
    heading = "forgetting"

    def __init__(self) -> None:
        super().__init__()
        self._structures: list[Structure] = []
        self._compared: tuple[str, ...] = ()
        self._labelled_for = ""
        self._retention: RetentionSet | None = None

    def check(self, plan: Plan) -> None:
        """Read the structures and choose the energies to compare."""
        options = plan.options.finetune.retention
        if plan.foundation is None or not options.wanted:
            return
        self._plan = plan
        head = choose_head(plan.options, plan.foundation)
        heads = () if head is None else (head.target,)
        self._compared, self._labelled_for = compared_targets(plan.options, plan.foundation, heads)
        if options.read_from is not None:
            self._structures = read_labelled(options.read_from, plan.start.model)
        elif not self._compared:
            _logger.info("no forgetting report: no head begins as one of the foundation's")
        else:
            self._structures = probe_structures(plan.foundation.species)
            if not self._structures:
                _logger.info(
                    "no forgetting report: no structure of the probe set has none but the model's "
                    "elements; give labelled ones in finetune.retention.read_from"
                )
        self._structures = chosen(self._structures, options.max_structures, "retention")

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Label the structures, or take them as they were kept."""
        super().start(trainer, kept)
        if self._kept is not None:
            structures = from_plain(self._kept["structures"])
            targets, every = self._kept["targets"], self._kept["every"]
            self._retention = RetentionSet(structures, targets, trainer.model, every)

    def _made(self, model: Potential) -> dict[str, Any] | None:
        """The labelled structures, the energies compared, epochs between two evaluations."""
        if self._plan is None or not self._structures:
            return None
        options = self._plan.options
        every = options.finetune.retention.interval(options.training.epochs)
        if self._labelled_for:
            foundation = known_foundation(self._plan)
            shifts = {target: foundation.shift(model, target) for target in self._compared}
            structures = relabelled(self._structures, self._labelled_for, shifts, model.species)
            labels = f"their labels of '{self._labelled_for}'"
        else:
            structures = label_with(model, self._structures, self._compared)
            labels = "the starting model's own predictions"
        _logger.info(
            "forgetting: %s of %d structures (%s) compared with %s every %d epochs",
            " and ".join(f"'{target}'" for target in self._compared),
            len(structures),
            structures[0].source,
            labels,
            every,
        )
        return {"structures": as_plain(structures), "targets": self._compared, "every": every}

    def validate(self, model: Potential, epoch: int) -> Measured | None:
        """The errors where they are due."""
        found = {} if self._retention is None else self._retention.errors_after(model, epoch)
        if not found:
            return None
        columns = {
            f"{self.name}/{target}/{name}": value
            for target, metrics in found.items()
            for name, value in metrics.as_dict().items()
        }
        return Measured(columns, f"forgetting {describe(found)}")

    def errors(self, model: Potential | Committee) -> Mapping[str, dict[str, Metrics]]:
        """The errors of a model, as those of the set ``retention``."""
        return {} if self._retention is None else {self.name: self._retention.errors(model)}

    def notes(self) -> Sequence[str]:
        """Which structures the errors are of."""
        if self._kept is None:
            return ()
        structures = self._kept["structures"]
        return (f"forgetting: {len(structures)} structures ({structures[0]['source']})",)
