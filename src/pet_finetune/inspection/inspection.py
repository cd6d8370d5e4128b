"""All checks of the data, in order, and as a feature before a run: what would break it stops it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from pet_finetune.config.dataset import DatasetOptions, SystemsOptions
from pet_finetune.config.run_options import Options
from pet_finetune.data.frame_files import read_file
from pet_finetune.data.splits import Splits, make_splits
from pet_finetune.data.structure import Structure, check_charges
from pet_finetune.data.structure_sets import check_species, sampled
from pet_finetune.errors import DataError, PetFinetuneError, SpeciesError
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.terminal import Watch
from pet_finetune.training.extend import ADVICE
from pet_finetune.training.feature import Feature, Plan
from pet_finetune.units import length_to_angstrom

from .energy_checks import check_belonging, check_levels, check_outliers, check_settings
from .evidence import Declared, Evidence
from .foundation import (
    FoundationPrediction,
    ask,
    baseline_shift,
    check_compared,
    check_references,
    check_residuals,
    units_of,
)
from .geometry import (
    check_cells,
    check_charges_used,
    check_distances,
    check_duplicates,
    check_extent,
    check_lengths,
    check_loneliness,
    check_periodicity,
)
from .inspected import Finding, InspectedDataset, dataset_of, worst_first
from .label_checks import (
    check_completeness,
    check_forces,
    check_mechanics,
    read_anyway,
)
from .near_frames import near_pairs, steps
from .overview import Inspection, facts_of
from .unit_checks import check_units, in_found_units


@dataclass(frozen=True)
class Foundation:
    """Foundation that labels are compared with.

    Attributes:
        model: on its device.
        target: the energy that is asked for; None asks for none.
        species: elements it was trained on.
        known_too: elements that are going to be added; None for whatever the data hold.
        advice: what to do about unknown elements, for the message.
        seconds: how long it may predict.
        keeps_baselines: whether the run takes its energies of the elements as they are.
    """

    model: Potential
    target: str | None
    species: tuple[int, ...]
    known_too: tuple[int, ...] | None = ()
    advice: str = ""
    seconds: float = 20.0
    keeps_baselines: bool = False


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # absurd numbers are findings
def inspect_sets(
    sets: Mapping[str, Sequence[Structure]],
    target: str | None,
    declared: Mapping[str, Declared],
    foundation: Foundation | None = None,
    known: Sequence[Finding] = (),
) -> Inspection:
    """Look at structures and labels.

    Args:
        sets: structures by set.
        target: the energy whose labels are looked at; None where none is trained.
        declared: what the options say of the units, by file.
        foundation: to compare with.
        known: findings from reading the files.
    """
    with Watch("neighbours of the structures"):
        dataset = dataset_of(sets, target)
    findings = [*known, *check_extent(dataset)]
    if not dataset.frames:
        return Inspection(facts_of(dataset), tuple(worst_first(findings)))
    # What is cheap comes first: a model that is asked about positions in nm takes all memory.
    lengths = list(check_lengths(dataset))
    odd = {frames.file for finding in lengths for frames in finding.where}
    findings += lengths
    predictions: list[FoundationPrediction] = []
    if foundation is not None:
        refused = list(_refused(dataset, foundation))
        findings += refused
        # Of a charge that it has no embedding for a model can predict nothing.
        if foundation.target is not None and all(f.code != "unknown-charges" for f in refused):
            findings += check_compared(foundation.model, dataset.without(odd))
            with Watch("predictions of the foundation"):
                predictions = ask(
                    foundation.model,
                    foundation.target,
                    dataset.without(odd),
                    foundation.seconds,
                    foundation.species,
                )
    with Watch("checks of structures and labels"):
        findings += _check(dataset, declared, foundation, predictions, lengths)
    return Inspection(
        facts_of(dataset),
        tuple(worst_first(findings)),
        compared=len(predictions),
        errors_before=_errors(predictions),
    )


def _refused(dataset: InspectedDataset, foundation: Foundation) -> Iterator[Finding]:
    """Structures that the model cannot compute: what training would refuse, as findings."""
    structures = [frame.structure for frame in dataset.frames]
    hypers = foundation.model.hypers
    if foundation.known_too is not None:
        known = {*foundation.species, *foundation.known_too}
        try:
            check_species(structures, known, foundation.advice)
        except SpeciesError as error:
            yield Finding("error", "unknown-elements", str(error))
    if hypers.system_conditioning:
        try:
            check_charges(structures, hypers.max_charge, hypers.max_spin_multiplicity)
        except DataError as error:
            yield Finding("error", "unknown-charges", str(error))


def _check(
    dataset: InspectedDataset,
    declared: Mapping[str, Declared],
    foundation: Foundation | None,
    predictions: Sequence[FoundationPrediction],
    lengths: Sequence[Finding],
) -> Iterator[Finding]:
    """Every check of structures and labels, but that of the lengths."""
    model = None if foundation is None else foundation.model
    conditioned = model is not None and model.hypers.system_conditioning
    yield from check_distances(dataset)
    yield from check_loneliness(dataset, None if model is None else model.cutoff)
    yield from check_periodicity(dataset)
    yield from check_charges_used(dataset, conditioned)
    if dataset.target is None:
        yield from check_duplicates(dataset)
        return
    pairs = {file: near_pairs(frames) for file, frames in dataset.files.items()}
    paths = {file: steps(frames, pairs[file]) for file, frames in dataset.files.items()}
    more: Mapping[str, Sequence[Evidence]] = units_of(predictions)
    doubtful = {frames.file for finding in lengths for frames in finding.where}
    odd = list(check_units(dataset, paths, declared, more, doubtful, pairs))
    yield from odd
    # Other checks assume the units found; otherwise every frame would be an outlier.
    mended = in_found_units(dataset, [*lengths, *odd])
    if mended is not dataset:
        paths = {file: steps(frames, pairs[file]) for file, frames in mended.files.items()}
    yield from check_duplicates(mended)
    yield from check_references(predictions, foundation is not None and foundation.keeps_baselines)
    yield from check_completeness(dataset)
    yield from check_forces(mended)
    yield from check_mechanics(mended)
    yield from check_levels(mended)
    yield from check_belonging(mended, paths)
    yield from check_outliers(mended, paths)
    frames = {id(frame.structure): frame for frame in mended.frames}
    yield from check_residuals(
        [replace(a, frame=frames[id(a.frame.structure)]) for a in predictions]
    )


def _errors(predictions: Sequence[FoundationPrediction]) -> dict[str, float]:
    """Errors of the foundation before training.

    The mean absolute error of the forces, eV/Å, and what lies between the references of the
    energies, eV an atom.
    """
    total = count = 0.0
    for prediction in predictions:
        if prediction.frame.forces is not None:
            total += float(abs(prediction.forces - prediction.frame.forces).sum())
            count += prediction.forces.size
    errors = {"forces_mae": total / count} if count else {}
    shift = baseline_shift(predictions)
    return errors if shift is None else {**errors, "energy_shift": shift}


_logger = get_logger(__name__)
# A small part of what the first epoch takes; what fits into it is spread over all sets.
_SECONDS = 5.0


def energy_of(options: Options) -> str | None:
    """The energy whose labels are looked at: the first one."""
    specs = options.target_specs()
    return next((name for name, spec in specs.items() if spec.is_energy), None)


def declared_units(datasets: Iterable[DatasetOptions], target: str | None) -> dict[str, Declared]:
    """Declared units of an energy's files."""
    found = {}
    for data in datasets:
        if target is not None and target in data.targets:
            own, length = data.targets[target], length_to_angstrom(data.systems.length_unit)
            forces, stress = (own.gradient_factor(kind, length) for kind in ("forces", "stress"))
            known = bool(own.unit), _is_converted(data.systems, own.read_from)
            found[data.systems.read_from] = Declared(own.factor, length, forces, stress, *known)
    return found


def _is_converted(systems: SystemsOptions, labels: str) -> bool:
    """Whether ASE converts the labels; not where the file cannot be read, which is told."""
    with suppress(DataError):
        file = (labels,) if labels else (systems.read_from, systems.format, systems.types)
        return bool(read_file(*file).converted)
    return False


def told_by_files(options: Options) -> list[Finding]:
    """Cells in the files that are not used, and different settings of calculations.

    Each file is looked at once. Settings are compared among files with the same targets.
    """
    files = {data.systems.read_from: data for data in options.datasets()}
    found, settings = list[Finding](), dict[tuple[str, ...], dict[str, Mapping[str, str]]]()
    for file, data in files.items():
        place = file, data.systems.format, data.systems.types
        found += check_cells(*place)
        with suppress(DataError):  # what cannot be read is told elsewhere
            content = read_file(*place)
            settings.setdefault((content.converted, *data.targets), {})[file] = content.settings
    return [*found, *chain.from_iterable(map(check_settings, settings.values()))]


def read_checked(options: Options, seed: int) -> Splits:
    """The three sets, or all problems of the files at once.

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


def looked_at(splits: Splits) -> dict[str, Sequence[Structure]]:
    """The three sets; of large ones on disk a part."""
    return {
        name: sampled(getattr(splits, name), f"the look at the {name} set")
        for name in ("train", "validation", "test")
    }


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
        sets = looked_at(splits)
        target = energy_of(options)
        known = tuple(z for z in start.model.species if z not in start.new_species)
        foundation = Foundation(
            start.model,
            energy_compared(start.model, target, start.fresh),
            known,
            known_too=tuple(start.new_species),
            advice=ADVICE if options.is_finetuning else "",
            seconds=_SECONDS,
            keeps_baselines=options.is_finetuning and options.baseline_mode() == "keep",
        )
        declared = declared_units(options.datasets(), target)
        inspection = inspect_sets(sets, target, declared, foundation, told_by_files(options))
        for finding in inspection.findings:
            if finding.severity == "warning":
                _logger.warning("data: %s", finding.text)
            elif finding.severity == "note":
                _logger.info("data: %s", finding.text)
        problem = problem_of(inspection.errors)
        if problem is not None:
            raise problem


def energy_compared(
    model: Potential, target: str | None, fresh: Collection[str] = ()
) -> str | None:
    """The energy of a foundation that the labels are compared with; heads that are new have none.

    That of the same name, else ``energy``, else the first.
    """
    known = [name for name, spec in model.targets.items() if spec.is_energy and name not in fresh]
    if target is None or not known:
        return None
    return next((name for name in (target, "energy") if name in known), known[0])


def problem_of(errors: Sequence[Finding]) -> PetFinetuneError | None:
    """Combine all problems that would break a run into one error."""
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
