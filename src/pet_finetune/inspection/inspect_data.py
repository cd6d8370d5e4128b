"""A look at data before a run: files by themselves, or the sets of an options file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols

from pet_finetune.backends.choice import choose_backend, ready, use_backend
from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.config.load import LoadedOptions, parse_options, to_yaml
from pet_finetune.config.options_reference import schema_line
from pet_finetune.config.run_options import Options
from pet_finetune.data.splits import make_splits
from pet_finetune.data.structure import Structure
from pet_finetune.data.structure_sets import find_species, of_species
from pet_finetune.device import choose_device, plain_torch
from pet_finetune.errors import ConfigError, DataError, PetFinetuneError
from pet_finetune.files import check_new, write_whole
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.terminal import Watch
from pet_finetune.training.extend import ADVICE
from pet_finetune.training.starting_model import read_start

from .inspected import Finding
from .inspection import (
    Foundation,
    declared_units,
    energy_compared,
    energy_of,
    inspect_sets,
    looked_at,
    told_by_files,
)
from .label_checks import read_anyway, sets_left_out
from .label_names import target_of_file
from .overview import Inspection
from .suggestion import Load, Suggestion, estimate, load_of, suggest, training_section
from .unit_checks import with_found_units

_logger = get_logger(__name__)
_SETS = ("train", "validation", "test")


@dataclass(frozen=True)
class Request:
    """Request for an inspection.

    Attributes:
        options: how the files are read, and what is trained on them.
        raw: the options as they were written, for the suggestion.
        findings: from choosing the names of the labels.
        whole: whether the files are looked at as they are, not cut into sets by fraction.
    """

    options: Options
    raw: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    whole: bool = False


def request_of_files(
    files: Sequence[str],
    checkpoint: str | None = None,
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    systems: Mapping[str, Any] | None = None,
) -> Request:
    """Files by themselves, with labels under whatever names they have, in eV and Å.

    Args:
        files: of the training set.
        checkpoint: the foundation.
        validation: files of the validation set.
        test: files of the test set.
        systems: more options of ``systems`` for all of them: ``format``, ``types``.

    Raises:
        DataError: no file of the training set can be read; single ones are findings.
        ConfigError: as reading options.
    """
    findings: list[Finding] = []
    sections: dict[str, Any] = {}
    for name, own in (("training_set", files), ("validation_set", validation), ("test_set", test)):
        found: list[dict[str, Any]] = []
        for file in own:
            try:
                target, told = target_of_file(file, **(systems or {}))
            except DataError as error:
                if file == own[-1] and not found:
                    raise
                findings.append(Finding("error", "unreadable", str(error)))
                continue
            findings += told
            section = training_section([file], target)
            section["systems"] |= systems or {}
            found.append(section)
        if found:
            sections[name] = found[0] if len(found) == 1 else found
    loaded = parse_options(sections, checkpoint, require_start=False)
    return Request(loaded.options, sections, tuple(findings), whole=True)


def request_of_options(loaded: LoadedOptions, files: Sequence[str] = ()) -> Request:
    """The sets that options name; ``files`` take the place of the training set's.

    Raises:
        ConfigError: several training sets, where it is not clear how the files are read.
    """
    if not files:
        return Request(loaded.options, loaded.raw)
    datasets = loaded.options.training_set
    if len(datasets) > 1:
        raise ConfigError(
            f"The options have {len(datasets)} training sets, so how {files[0]} is to be read is "
            "not clear. Leave it out, or give options with one training set."
        )
    moved = tuple(_moved(datasets[0], file) for file in files)
    options = loaded.options.model_copy(update={"training_set": moved})
    raw = copy.deepcopy(dict(loaded.raw))
    raw["training_set"] = options.resolved()["training_set"]
    return Request(options, raw)


def _moved(dataset: DatasetOptions, file: str) -> DatasetOptions:
    """The same data set read from another file."""
    targets = {
        name: target.model_copy(
            update={
                "read_from": file,
                **{
                    kind: getattr(target, kind).model_copy(update={"read_from": file})
                    for kind in ("forces", "stress", "virial")
                },
            }
        )
        for name, target in dataset.targets.items()
    }
    systems = dataset.systems.model_copy(update={"read_from": file})
    return dataset.model_copy(update={"systems": systems, "targets": targets, "indices": None})


@plain_torch()
def inspect_data(request: Request, *, device: str = "auto", seconds: float = 20.0) -> Inspection:
    """Look at the data, and at what a run with them takes.

    Args:
        request: what is looked at.
        device: where a foundation is asked and a step is measured.
        seconds: how long the foundation may be asked; of large sets it sees a part.

    Raises:
        PetFinetuneError: a checkpoint that cannot be read; what is wrong with the data is in the
            findings.
    """
    options = request.options
    target = energy_of(options)
    sets, findings = _read(request)
    model = read_start(options)[0] if options.is_finetuning else None
    foundation, chosen = None, choose_device(device)
    if model is not None:
        if ready(chosen):
            use_backend(model, choose_backend(chosen))
        model.to(chosen)
        grows = options.finetune.new_elements is not None
        foundation = Foundation(
            model,
            energy_compared(model, target),
            tuple(model.species),
            known_too=None if grows else (),
            advice=ADVICE,
            seconds=seconds,
            keeps_baselines=options.baseline_mode() == "keep",
        )
    declared = declared_units(options.datasets(), target)
    if request.whole:  # nobody named any
        declared = {file: replace(units, named=False) for file, units in declared.items()}
    known = [*request.findings, *findings, *told_by_files(options)]
    inspection = inspect_sets(sets, target, declared, foundation, known)
    if not sets.get("train"):
        return inspection
    return _with_cost(inspection, request, sets, model, target, chosen)


def _read(request: Request) -> tuple[dict[str, Sequence[Structure]], list[Finding]]:
    """The sets, as far as they can be read, and what is wrong with the rest."""
    options = request.options
    if not request.whole:
        try:
            splits = make_splits(options, options.seed or 0)
        except DataError as error:
            failed = Finding("error", "unreadable", str(error))
        else:
            return looked_at(splits), []
    sets: dict[str, Sequence[Structure]] = {}
    findings: list[Finding] = []
    for name, chosen in zip(
        _SETS, (options.training_set, options.validation_set, options.test_set), strict=True
    ):
        datasets = chosen if isinstance(chosen, tuple) else ()
        left_out = sets_left_out(datasets)
        findings += left_out.values()
        for number, dataset in enumerate(datasets):
            if number not in left_out:
                structures, told = read_anyway(dataset)
                sets[name] = [*sets.get(name, ()), *structures]
                findings += told
    if not request.whole and not findings:
        findings.append(failed)
    return sets, findings


def _with_cost(
    inspection: Inspection,
    request: Request,
    sets: Mapping[str, Sequence[Structure]],
    model: Potential | None,
    target: str | None,
    device: torch.device,
) -> Inspection:
    """Add what a run takes, measured on a sample, and options for the data."""
    options, training = request.options, sets["train"]
    held_out = sets.get("validation", ())
    cutoff = model.cutoff if model is not None else options.model.cutoff
    none = Load(len(training), sum(s.num_atoms for s in training), 0.0, 0.0, 0, 0.0)
    if {"length-unit", "impossible-structure"} & {f.code for f in inspection.findings}:
        # In other lengths there are other neighbours, perhaps more than any memory holds.
        return replace(inspection, suggestion=_suggest(inspection, request, sets, model, none))
    try:
        with Watch("counting neighbours"):
            load = load_of(training, held_out, cutoff)
    except DataError as error:  # too dense for this cutoff, though not for the look
        told = Finding("error", "impossible-structure", str(error))
        worse = replace(inspection, findings=(told, *inspection.findings))
        return replace(worse, suggestion=_suggest(worse, request, sets, model, none))
    first = _suggest(inspection, request, sets, model, load)
    batch = first.options["architecture"]["training"]["batch_size"]
    if not request.whole and options.training.max_atoms_per_batch is None:
        batch = options.training.batch_size or batch
    reference = None if model is None else energy_compared(model, target)
    known = [] if model is None else of_species(training, model.species)
    broken = {f.code for f in inspection.errors} & {"unknown-charges", "same-place"}
    if model is None or reference is None or target is None or not known or broken:
        why = "give a checkpoint with -c" if model is None else "the model cannot compute the data"
        return replace(inspection, cost=load, measured=why, suggestion=first)
    with Watch("measuring a step of each method"):
        estimates = estimate(
            model,
            reference,
            known,
            load,
            batch,
            forces=any(forces_key(target) in s.labels for s in training),
            stress=any(stress_key(target) in s.labels for s in training),
        )
    kind = "kernels" if model.network.backend.fused else "plain torch operations"
    threads = f", {torch.get_num_threads()} threads, {kind}" if device.type == "cpu" else ""
    measured = f"from one measured step each ({device.type}{threads}), batches of {batch}"
    done = replace(inspection, cost=load, estimates=tuple(estimates), measured=measured)
    return replace(done, suggestion=_suggest(done, request, sets, model, load))


def _suggest(
    inspection: Inspection,
    request: Request,
    sets: Mapping[str, Sequence[Structure]],
    model: Potential | None,
    load: Load,
) -> Suggestion:
    """Options for the data, in the units that the findings suggest."""
    options = request.options
    training = sets["train"]
    held = {name: len(sets.get(name, ())) for name in _SETS}
    drawn = not request.whole and isinstance(options.validation_set, float)
    count = held["train"] + (held["validation"] + held["test"] if drawn else 0)
    load = replace(load, structures=count or load.structures)
    unknown = []
    if model is not None:
        unknown = [chemical_symbols[z] for z in find_species(training) if z not in model.species]
    codes = {finding.code for finding in inspection.findings}
    raw = copy.deepcopy(dict(request.raw))
    for name in ("training_set", "validation_set", "test_set"):
        raw[name] = with_found_units(raw.get(name), inspection.findings)
    return suggest(
        raw["training_set"],
        load,
        checkpoint=options.finetune.read_from,
        parameters=0 if model is None else model.num_parameters(),
        validation=raw["validation_set"],
        test=raw["test_set"],
        unknown=unknown,
        outliers=bool(codes & {"energy-outliers", "foundation-outliers"}),
        forced=not codes & {"partial-forces", "energies-only", "several-labels"},
        estimates=inspection.estimates,
    )


def write_suggestion(inspection: Inspection, path: str | Path) -> None:
    """Write the suggested options as a file that ``train`` runs.

    Raises:
        DataError: there are no structures to suggest anything for, or the file exists.
        ConfigError: it cannot be written.
    """
    suggestion = inspection.suggestion
    if suggestion is None:
        raise DataError("No structure could be read, so there are no options to write.")
    file = Path(path)
    check_new(file)
    # What is in doubt stands there as a question, which stops a run until it is answered.
    asked = "?'" in repr(suggestion.options)
    try:
        if not asked:
            parse_options(suggestion.options)
    except PetFinetuneError as error:
        raise ConfigError(f"--write-options: {error}") from error
    lines = [schema_line().strip()]
    lines += ["# Suggested by pet-finetune inspect; run it with: pet-finetune train " + file.name]
    lines += [f"# * {reason}" for reason in suggestion.reasons]
    errors = [finding.code for finding in inspection.errors]
    if asked:
        lines.append("# Choose one where there is a question mark: train stops until then.")
    unchecked = [f.what for f in inspection.findings if f.code == "units-unchecked"]
    lines += [f"# Not checked: {what}" for what in unchecked]
    if errors:
        lines.append(f"# Correct first: {', '.join(errors)}")
    try:
        write_whole(file, "\n".join([*lines, to_yaml(suggestion.options)]) + "\n")
    except OSError as error:
        raise ConfigError(f"--write-options: cannot write '{file}': {error.strerror}.") from error
    _logger.info("options: %s", file)
