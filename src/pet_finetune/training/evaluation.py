"""Errors of a finished model on labelled structures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pet_finetune.checkpoint.opening import open_model
from pet_finetune.committee.calibration import Comparison, Deviations
from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.label_columns import find_value
from pet_finetune.data.loader import Loader
from pet_finetune.data.readers import read_structures
from pet_finetune.data.splits import make_splits
from pet_finetune.data.structure import Structure
from pet_finetune.data.structure_sets import evenly_spread, joined
from pet_finetune.data.writing import check_prediction_path, numbered
from pet_finetune.device import plain_torch, torchscript
from pet_finetune.errors import ConfigError, DataError, did_you_mean
from pet_finetune.keys import Compile, TargetSpec, direct_quantity
from pet_finetune.log import get_logger
from pet_finetune.model.compiled import CompiledPredictions
from pet_finetune.model.potential import Potential
from pet_finetune.terminal import show

from .extend import check_known, check_meaning
from .loggers import error_table, spread_text, uncertainty_text
from .loss_features import Spread, rotational_spread
from .metrics import Metrics, errors_and_predictions

_logger = get_logger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation.

    Attributes:
        errors: by data set and target.
        spreads: differences under rotation, if requested.
        predictions: for each structure of a set the values by label, in eV and Å, if kept.
        tensormaps: for each set the requested tensor maps, by name.
        uncertainties: for each set and energy with one, errors and uncertainties, eV/atom.
    """

    errors: dict[str, dict[str, Metrics]]
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)
    predictions: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    tensormaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    uncertainties: dict[str, dict[str, Deviations]] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelNames:
    """Names and units of labels in files.

    Attributes:
        key: name of the energy or of another target's values; None: ``energy``, or the target's.
        forces, stress, virial: names; None is ASE's, and the label is used if present.
        energy_unit: None is eV, or the unit of the target.
        length_unit: of positions and cells; forces and stress are in units of both.
        systems: more options of ``systems``: ``format``, ``types``.
    """

    key: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    energy_unit: str | None = None
    length_unit: str | None = None
    systems: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        rotations: random orientations in which energies and forces are compared; 0 for none.
        output: file of the predictions; several sets get ``_<name>`` in their names.
        batch_size: structures predicted at once.
        keep: whether predictions are part of the result.
        tensormaps: outputs in the result as tensor maps, as for
            :func:`pet_finetune.export.tensormaps.tensor_maps`; default none.
        compile: ``on``, ``off`` or ``auto``, as for the calculator.
    """

    rotations: int = 0
    output: str | None = None
    batch_size: int = 32
    keep: bool = False
    tensormaps: Sequence[str] | Mapping[str, str] | None = None
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be done before anything is opened."""
        if self.rotations == 1 or self.rotations < 0:
            raise ConfigError(
                f"rotations: {self.rotations} orientations are nothing to compare. Give 2 or more."
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch size: at least one structure, not {self.batch_size}.")


@dataclass(frozen=True)
class _Set:
    """Structures, targets to compare, how they were read, where predictions go if at all."""

    structures: Sequence[Structure]
    targets: Sequence[str]
    datasets: Sequence[DatasetOptions]
    output: str | None


@plain_torch()
def evaluate_files(
    checkpoint: str | Path | Potential,
    files: Sequence[str | Path],
    *,
    names: Sequence[str] = (),
    adapter: str | Path | None = None,
    target: str | None = None,
    device: str = "auto",
    labels: LabelNames = LabelNames(),
    how: EvaluationSettings = EvaluationSettings(),
) -> EvaluationResult:
    """Errors on whole files.

    Args:
        checkpoint: ours or metatrain's, or a potential, which is copied.
        files: anything ASE reads.
        names: what the files are called in the result; their paths without it.
        adapter: folder of an adapter of this checkpoint.
        target: which target of the model is compared; None for the energy of the adapter or, where
            there is none, of the model; of several, ``energy``.
        device: as in the options.
        labels: names and units in the files. A file without the label is predicted only, if that
            is asked for and the label is not named.
        how: further settings.
    """
    outputs = _outputs(how, [str(index) for index in range(len(files))])
    model, adapted = open_model(checkpoint, adapter, device)
    spec = chosen_target(model, target, adapted)
    sets = {}
    for file, name, output in zip(files, names or map(str, files), outputs, strict=True):
        options = _file_options(file, spec, labels)
        key = options.targets[spec.name].key
        if (
            (how.output is not None or how.keep)
            and labels.key is None
            and not _any_has(options, spec.name)
        ):
            _logger.info("%s has no %r: nothing is compared, only predicted", file, key)
            options = options.model_copy(update={"targets": {}})
        sets[name] = _Set(read_structures(options), [spec.name], [options], output)
    result = _evaluate(model, sets.items(), how)
    compared = [errors[spec.name] for errors in result.errors.values() if spec.name in errors]
    if len(compared) > 1:
        together = {"": {"error": {spec.name: Metrics.together(compared)}}}
        show(error_table(together, title=f"{len(compared)} files together"))
    return result


def _any_has(options: DatasetOptions, name: str) -> bool:
    """Whether any frame has a label of a target (for an energy also forces or stress)."""
    systems, target = options.systems, options.targets[name]
    keys = [target.key or name]
    if target.is_energy:
        kinds = {"forces": target.forces, "stress": target.stress, "virial": target.virial}
        keys += [given.key or kind for kind, given in kinds.items() if given.wanted]
    frames = evenly_spread(read_frames(systems.read_from, systems.format, systems.types))
    return any(find_value(atoms, key) is not None for atoms in frames for key in keys)


def read_labelled(
    files: Sequence[str | Path], spec: TargetSpec, labels: LabelNames
) -> Sequence[Structure]:
    """The structures of whole files, with the labels of one target."""
    return joined([read_structures(_file_options(file, spec, labels)) for file in files])


def chosen_target(model: Potential, wanted: str | None, of_adapter: Sequence[str]) -> TargetSpec:
    """The target that is meant: any that is named, else the energy, else the only one."""
    there = of_adapter or tuple(model.targets)
    if wanted is None and len(there) == 1:
        wanted = there[0]
    if wanted is None or model.target(wanted).is_energy:
        wanted = model.energy_target(wanted, of_adapter)
    return model.target(wanted)


@plain_torch()
def evaluate_datasets(
    datasets: Sequence[DatasetOptions],
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    target: str | None = None,
    device: str = "auto",
    how: EvaluationSettings = EvaluationSettings(),
) -> EvaluationResult:
    """Errors on data sets as ``mtt eval`` takes them; one without targets is predicted only.

    Args:
        datasets: checked options.
        checkpoint: ours or metatrain's.
        adapter: folder of an adapter of this checkpoint.
        target: the one target to compare; None for all that a set and the model share.
        device: as in the options.
        how: further settings.
    """
    if how.output is None and not all(dataset.targets for dataset in datasets):
        raise ConfigError(
            "The options name no targets, so there is nothing to compare. Name them, or write "
            "predictions with -o predictions.xyz."
        )
    marks = [str(index) for index in range(len(datasets))]
    outputs = _outputs(how, marks)
    model, adapted = open_model(checkpoint, adapter, device)

    def sets() -> Iterator[tuple[str, _Set]]:
        """Read the sets one after the other."""
        named: set[str] = set()
        for dataset, mark, output in zip(datasets, marks, outputs, strict=True):
            if dataset.targets and target is None:
                specs = {name: one.spec(name) for name, one in dataset.targets.items()}
                targets = _in_both(specs, model, "targets")
            else:
                targets = [chosen_target(model, target, adapted).name]
            name = dataset.systems.read_from
            shown = f"{name} ({mark})" if name in named else name
            named.add(name)
            yield shown, _Set(read_structures(dataset), targets, [dataset], output)

    return _evaluate(model, sets(), how)


@plain_torch()
def evaluate_options(
    options: Options,
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    target: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    how: EvaluationSettings = EvaluationSettings(),
) -> EvaluationResult:
    """Errors on the validation and test sets of an options file, or on the training set.

    The sets are drawn with the options' seed; a run's own sets are evaluated by giving the
    ``options.yaml`` of its folder, which names the seed.

    Args:
        options: checked options.
        checkpoint: ours or metatrain's.
        adapter: folder of an adapter of this checkpoint.
        target: the one target to compare; None for all that options and model share.
        device: instead of that of the options.
        seed: used where the options name none.
        how: further settings.
    """
    specs = options.target_specs()
    if target is not None and target not in specs:
        raise ConfigError(
            f"training_set.targets has no '{target}'.{did_you_mean(target, specs)} "
            f"Targets: {', '.join(specs)}."
        )
    _outputs(how, ["validation", "test"])
    model, _ = open_model(checkpoint, adapter, device or options.device)
    wanted = specs if target is None else {target: specs[target]}
    targets = _in_both(wanted, model, "training_set.targets")
    if options.seed is None and seed is None:
        _logger.warning("no seed in the options: sets drawn by fraction are not those of training")
    splits = make_splits(options, options.seed if options.seed is not None else seed or 0)
    held_out = {"validation": splits.validation, "test": splits.test}
    shown = {name: some for name, some in held_out.items() if some} or {"train": splits.train}
    outputs = _outputs(how, list(shown))
    sets = {
        name: _Set(some, targets, options.datasets(), output)
        for (name, some), output in zip(shown.items(), outputs, strict=True)
    }
    return _evaluate(model, sets.items(), how)


def _in_both(specs: Mapping[str, TargetSpec], model: Potential, where: str) -> list[str]:
    """Targets of the options, in the section ``where``, that the model has, with one meaning."""
    known = [name for name in specs if name in model.targets]
    if not known:
        model.target(next(iter(specs)))  # says what the model has
    missing = [name for name in specs if name not in model.targets]
    if missing:
        _logger.warning(
            "not compared, because the model does not predict it: %s (it predicts %s)",
            ", ".join(missing),
            ", ".join(model.targets),
        )
    for name in known:  # the quantity alone changes no number
        check_meaning(model, replace(specs[name], quantity=""), where, of="")
    return known


#: ASE's names of what the quantity of a direct prediction is.
_ASE_NAMES = {"force": "forces", "pressure": "stress"}


def _file_options(file: str | Path, spec: TargetSpec, labels: LabelNames) -> DatasetOptions:
    """Options that read one target from a file."""
    name, direct = spec.name, direct_quantity(spec.name)
    usual = "energy" if spec.is_energy else _ASE_NAMES[direct] if direct else name
    named = {"forces": labels.forces, "stress": labels.stress, "virial": labels.virial}
    if not spec.is_energy and any(named.values()):
        raise ConfigError(
            f"forces, stress and virial belong to an energy, but '{name}' is {spec.form}. Name "
            "its values with --key, or another target with --target."
        )
    target = {
        "quantity": spec.quantity,
        "key": labels.key or usual,
        "unit": labels.energy_unit or spec.unit,
        "sample_kind": "atom" if spec.per_atom else "system",
        "type": {"cartesian": {"rank": spec.rank}} if spec.rank else "scalar",
        "num_subtargets": spec.num_subtargets,
        **{kind: {"key": key} for kind, key in named.items() if key is not None},
    }
    systems = {
        "read_from": str(file),
        "length_unit": labels.length_unit or "angstrom",
        **labels.systems,
    }
    section = {"systems": systems, "targets": {name: target}}
    options = parse_options({"training_set": section}, require_start=False, source=str(file))
    return options.options.training_set[0]


def _outputs(how: EvaluationSettings, marks: Sequence[str]) -> list[str | None]:
    """Output of each set's predictions, with its mark if there are several.

    A place that cannot be is refused; ask before the model is opened.
    """
    if how.output is None:
        return [None] * len(marks)
    paths = [how.output] if len(marks) == 1 else [numbered(how.output, mark) for mark in marks]
    for path in {how.output, *paths}:
        check_prediction_path(path)
    return list(paths)


def _evaluate(
    model: Potential, sets: Iterable[tuple[str, _Set]], how: EvaluationSettings
) -> EvaluationResult:
    """Errors on sets of structures, by their names."""
    result = EvaluationResult({})
    errors, spreads = result.errors, result.spreads
    compiled = CompiledPredictions.chosen(model, how.compile)
    for name, chosen in sets:
        structures, targets = chosen.structures, chosen.targets
        if not structures:
            raise DataError(f"'{name}' holds no structures.")
        check_known(structures, model)
        loader = Loader(structures, model.cutoff, batch_size=how.batch_size, dtype=model.dtype)
        kept = result.predictions.setdefault(name, []) if how.keep else None
        systems = {one.systems.read_from: one.systems for one in chosen.datasets}
        comparison = Comparison()
        errors[name] = errors_and_predictions(
            model, loader, targets, chosen.output, systems, kept, comparison, compiled
        )
        found = {t: comparison.of(t)["energy"] for t in targets if "energy" in comparison.of(t)}
        if found:
            result.uncertainties[name] = found
        if how.tensormaps is not None:
            with torchscript():
                from pet_finetune.export.tensormaps import tensor_maps

                result.tensormaps[name] = tensor_maps(
                    model, structures, how.tensormaps or targets, batch_size=how.batch_size
                )
        if how.rotations:
            energies = [t for t in targets if model.targets[t].is_energy]
            spreads[name] = {
                t: rotational_spread(model, loader, t, how.rotations) for t in energies
            }
        if any(metrics.kinds for metrics in errors[name].values()):
            title = f"{name} ({len(structures)} structures)"
            show(error_table({"": {"error": errors[name]}}, title=title))
        for target, deviations in found.items():
            _logger.info("%s", uncertainty_text(target, deviations))
        for target, spread in spreads.get(name, {}).items():
            text = spread_text(how.rotations, target, spread, errors[name][target])
            _logger.info("%s", text)
    return result
