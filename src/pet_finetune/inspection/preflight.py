"""The data are looked at before a run: what would break it stops it, the rest is said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pet_finetune.config import DatasetOptions, Options
from pet_finetune.config.target import TargetOptions
from pet_finetune.data.splits import Splits, make_splits
from pet_finetune.data.structure_sets import sampled
from pet_finetune.errors import DataError, PetFinetuneError, SpeciesError
from pet_finetune.log import get_logger
from pet_finetune.training.extend import ADVICE
from pet_finetune.training.feature import Feature, Plan
from pet_finetune.training.starting_model import Start
from pet_finetune.units import length_to_angstrom

from . import Declared, Finding, Foundation, Inspection, inspect_sets
from .reading import check_cells, read_anyway

_logger = get_logger(__name__)
# A small part of what the first epoch takes; what fits into it is spread over all sets.
_SECONDS = 5.0


def energy_of(options: Options) -> str | None:
    """The energy whose labels are looked at: the first one."""
    specs = options.target_specs()
    return next((name for name, spec in specs.items() if spec.is_energy), None)


def declared_units(datasets: Iterable[DatasetOptions], target: str | None) -> dict[str, Declared]:
    """What the options say of the units of an energy's files."""
    return {
        data.systems.read_from: _declared(
            data.targets[target], length_to_angstrom(data.systems.length_unit)
        )
        for data in datasets
        if target is not None and target in data.targets
    }


def _declared(target: TargetOptions, length: float) -> Declared:
    forces, stress = (target.gradient_factor(kind, length) for kind in ("forces", "stress"))
    return Declared(target.factor, length, forces, stress, named=bool(target.unit))


def cells_of(options: Options) -> list[Finding]:
    """Cells in the files that are not used, each file looked at once."""
    files = {data.systems.read_from: data.systems for data in options.datasets()}
    return [
        finding
        for file, systems in files.items()
        for finding in check_cells(file, systems.format, systems.types)
    ]


def read_checked(options: Options, seed: int) -> Splits:
    """The three sets; where they cannot be read, all that is wrong with the files at once.

    Raises:
        DataError: naming each problem.
    """
    try:
        return make_splits(options, seed)
    except DataError as error:
        findings = [f for data in options.datasets() for f in read_anyway(data)[1]]
        if len(findings) < 2:
            raise  # nothing more to say
        raise DataError(_listed(findings)) from error


class Preflight(Feature):
    """The feature that inspects the data of a new run before anything is trained on them."""

    name = "preflight"

    def check(self, plan: Plan) -> None:
        """Inspect the sets.

        Raises:
            SpeciesError: elements that the model does not know, and nothing else.
            DataError: what would break the run, all of it.
        """
        options, splits, start = plan.options, plan.splits, plan.start
        sets = {
            name: sampled(getattr(splits, name), f"the look at the {name} set")
            for name in ("train", "validation", "test")
        }
        target = energy_of(options)
        known = tuple(z for z in start.model.species if z not in start.new_species)
        foundation = Foundation(
            start.model,
            _reference(start, target),
            known,
            known_too=tuple(start.new_species),
            advice=ADVICE if options.is_finetuning else "",
            seconds=_SECONDS,
            keeps_baselines=options.is_finetuning and options.baseline_mode() == "keep",
        )
        declared = declared_units(options.datasets(), target)
        inspection = inspect_sets(sets, target, declared, foundation, cells_of(options))
        _tell(inspection)
        problem = problem_of(inspection.errors)
        if problem is not None:
            raise problem


def _reference(start: Start, target: str | None) -> str | None:
    """The energy of the foundation that the labels are compared with; None from scratch."""
    if start.fingerprint is None or target is None:
        return None
    if target not in start.fresh:
        return target
    added = {*start.fresh, *start.inherited}
    own = [n for n, spec in start.model.targets.items() if spec.is_energy and n not in added]
    return own[0] if own else None


def _tell(inspection: Inspection) -> None:
    """Warnings and notes into the log, a line each."""
    for finding in inspection.findings:
        if finding.severity == "warning":
            _logger.warning("data: %s", finding.text)
        elif finding.severity == "note":
            _logger.info("data: %s", finding.text)


def problem_of(errors: Sequence[Finding]) -> PetFinetuneError | None:
    """One error for all that would break a run."""
    if not errors:
        return None
    if len(errors) > 1:
        return DataError(_listed(errors))
    kind = SpeciesError if errors[0].code == "unknown-elements" else DataError
    return kind(_plain(errors[0]))


def _plain(finding: Finding) -> str:
    """A finding as an error's message."""
    if not finding.advice:
        return finding.what  # a whole message of what reads or checks the data
    place = f" ({finding.place})" if finding.place else ""
    return f"{finding.what}{place}. {finding.advice}"


def _listed(errors: Sequence[Finding]) -> str:
    lines = [f"  {finding.code}: {_plain(finding)}" for finding in errors]
    return f"The data have {len(errors)} problems:\n" + "\n".join(lines)
