"""The Python door: what a script or a notebook calls, and what the command line calls.

>>> import pet_finetune as pf  # doctest: +SKIP
>>> result = pf.finetune("foundation.ckpt", train_atoms, method=pf.Lora(rank=8))  # doctest: +SKIP
>>> atoms.calc = result.calculator()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pet_finetune.adapters import AdaptedPotential, Adapter, read_adapter
from pet_finetune.calculator import PETCalculator
from pet_finetune.checkpoint import load, load_checkpoint, open_committee, save_checkpoint
from pet_finetune.checkpoint.info import checkpoint_facts, describe_checkpoint
from pet_finetune.committee.committee import Committee
from pet_finetune.config import Options
from pet_finetune.config.named_runs import NamedRun
from pet_finetune.data.exact import write_exact
from pet_finetune.errors import CheckpointError, ConfigError
from pet_finetune.export.export import ExportOutcome, export_model, export_table
from pet_finetune.inspection import Inspection
from pet_finetune.inspection.inspect import (
    Request,
    inspect_data,
    request_of_files,
    request_of_options,
    write_suggestion,
)
from pet_finetune.inspection.preflight import Preflight, read_checked
from pet_finetune.keywords import Arguments, Keywords, Method, is_structures
from pet_finetune.log import get_logger, html_of, setup_logging
from pet_finetune.model import Potential
from pet_finetune.model.fingerprint import weights_fingerprint
from pet_finetune.report.curves import curves_html
from pet_finetune.report.reading import read_run
from pet_finetune.report.record import RunRecord
from pet_finetune.report.write import report_or_warn, write_report
from pet_finetune.runs.folder import RunFolder
from pet_finetune.training import named_runs, profile_run, run
from pet_finetune.training.evaluate import (
    EvaluationResult,
    EvaluationSettings,
    LabelNames,
    evaluate_datasets,
    evaluate_files,
    evaluate_options,
)
from pet_finetune.training.feature import Feature
from pet_finetune.training.prepare import Rooms
from pet_finetune.training.profile import TrainingProfile
from pet_finetune.training.records import TrainOutcome
from pet_finetune.training.resume import plain_errors
from pet_finetune.training.run_files import ADAPTER, BEST, RunFiles
from pet_finetune.training.tables import show

__all__ = [
    "ROOMS",
    "EvaluationResult",
    "EvaluationSettings",
    "FinetuneResult",
    "LabelNames",
    "Model",
    "Request",
    "TrainOutcome",
    "checkpoint_facts",
    "describe_checkpoint",
    "evaluate",
    "evaluate_datasets",
    "evaluate_files",
    "evaluate_options",
    "export",
    "export_model",
    "export_table",
    "finetune",
    "inspect",
    "inspect_data",
    "profile",
    "request_of_files",
    "request_of_options",
    "show",
    "train",
    "train_named",
    "write_report",
    "write_suggestion",
]

_logger = get_logger(__name__)
#: A checkpoint, or a model that was loaded.
Model = str | os.PathLike[str] | AdaptedPotential | Potential
_FOUNDATION = "foundation.ckpt"

# Packages with features of training that no other code names: deleting one takes its features away.
_FEATURE_ROOMS = ("pet_finetune.forgetting",)


def _features() -> list[Feature]:
    """The features of the rooms above training, as far as they are there."""
    there = [name for name in _FEATURE_ROOMS if importlib.util.find_spec(name) is not None]
    return [one for name in there for one in importlib.import_module(name).features()]


#: What takes part in every run that is begun here.
ROOMS = Rooms(
    features=_features,
    inspect=lambda: [Preflight()],
    read=read_checked,
    report=report_or_warn,
)


def train(options: Options, folder: str | Path | None = None, **settings: Any) -> TrainOutcome:
    """Train as the options say; see :func:`pet_finetune.training.run.train`."""
    return run.train(options, folder, rooms=ROOMS, **settings)


def train_named(runs: Sequence[NamedRun], source: str | Path, **settings: Any) -> int:
    """Train named runs; see :func:`pet_finetune.training.named_runs.train_named`."""
    return named_runs.train_named(runs, source, rooms=ROOMS, **settings)


def profile(
    options: Options, folder: str | Path | None, steps: int, **settings: Any
) -> TrainingProfile:
    """Time a few steps; see :func:`pet_finetune.training.profile_run.profile_run`."""
    return profile_run.profile_run(options, folder, steps, rooms=ROOMS, **settings)


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """What fine-tuning gave. A notebook shows the table of errors and the learning curves.

    Attributes:
        model: the best model, adapter merged; of an ensemble, the committee.
        adapter: its adapter; None for methods without one, and for an ensemble.
        table: errors of the starting model and of the best one, for printing; None where they were
            not computed.
        errors: the same as numbers in eV, Å and the targets' units, ``"before"`` and ``"after"``,
            by set, target and name: ``errors["after"]["test"]["energy"]["forces_mae"]``.
        history: the columns of ``train.csv`` over the epochs, NaN where a cell is empty: a pandas
            ``DataFrame`` where pandas is installed, else a dictionary of arrays ``[n_epochs]``. The
            members of an ensemble follow each other and have a column ``member``.
        finished: False where the run was interrupted; the model is the best one until then.
        folder: the files of the run; None where they are removed.
    """

    model: AdaptedPotential | Committee = field(repr=False)
    adapter: Adapter | None = field(repr=False)
    table: Any = field(repr=False)
    errors: Mapping[str, Any] = field(repr=False)
    history: Any = field(repr=False)
    finished: bool
    folder: Path | None
    _record: RunRecord = field(repr=False)
    _calculator: Callable[..., PETCalculator] = field(repr=False)

    def calculator(self, **settings: Any) -> PETCalculator:
        """The model as an ASE calculator.

        Args:
            settings: as for :class:`PETCalculator`: ``device``, ``dtype``, ``target``...
        """
        return self._calculator(**settings)

    def _repr_html_(self) -> str:
        """The table and the curves, for notebooks."""
        table = "" if self.table is None else html_of(self.table)
        return table + curves_html(self._record)


def finetune(
    model: Model | None,
    train: Any,
    validation: Any = None,
    *,
    test: Any = None,
    targets: Mapping[str, Any] | None = None,
    method: Method | str | None = None,
    features: Sequence[Keywords | Feature] = (),
    folder: str | os.PathLike[str] | None = None,
    check: bool = True,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a model on structures, as ``pet-finetune train`` does.

    Args:
        model: what training starts from: a checkpoint or a loaded model, which is not changed. With
            None the options say it.
        train: ``Atoms`` or a list of them (eV and Å; labels in the calculator's results, ``info``
            or ``arrays``), the path of a file that ASE reads, a section of ``training_set``, or
            all options: a dictionary as in an options file, or the path of one (``.yaml``).
        validation: a fraction of the training structures, or structures, a path or a section. None
            leaves it to the options.
        test: given in the same ways.
        targets: what is learned, as ``targets`` of a data set:
            ``{"energy": {"key": "REF_energy", "unit": "eV"}}``. None is ``energy`` with ``forces``
            and ``stress`` where they are there.
        method: :class:`Lora`, :class:`Dora`, :class:`Qlora`, :class:`Prompt`, :class:`Heads` or
            :class:`Full`. None is LoRA where a model is given.
        features: :class:`Replay`, :class:`Anchor`, :class:`Retention`, and objects of
            :class:`Feature` classes of your own.
        folder: where the files of the run are kept; without one they are removed at the end.
        check: whether the data are inspected first.
        options: any other option by its name: those of ``architecture.training`` (``epochs`` is
            short for ``num_epochs``, ``batch_size``, ``learning_rate``...), of its ``finetune``
            (``new_elements``, ``unfreeze``...) and of the top (``seed``, ``device``...).

    Raises:
        ConfigError: options that are wrong, one line for each.
        PetFinetuneError: any other bad input, with one clear message.
    """
    with ExitStack() as stack:
        if folder is None:
            above = stack.enter_context(tempfile.TemporaryDirectory(prefix="pet-finetune-"))
            place = Path(above, "run")
            stack.callback(setup_logging)  # the log file is closed before it goes
        else:
            place = Path(folder)
        own = stack.enter_context(RunFolder.take(place))
        RunFiles(own.path).check_free()
        arguments = Arguments(own.path)
        arguments.data(train, targets)
        for name, given in (("validation", validation), ("test", test)):
            if given is not None:
                arguments.structures(name, given, targets)
        arguments.method(method)
        arguments.features([one for one in features if not isinstance(one, Feature)])
        arguments.options(options)
        start = None if model is None else _checkpoint(model, own.path / _FOUNDATION)
        loaded = arguments.parse(start, "finetune")
        if folder is None and loaded.options.finetune.ensemble is not None:
            raise ConfigError("finetune: the members of an ensemble need a folder: folder=...")
        if isinstance(model, (Potential, AdaptedPotential)):
            _write_foundation(model, Path(start or ""))
        outcome = run.train(
            loaded.options,
            own,
            notices=loaded.notices,
            check=check,
            rooms=_rooms([one for one in features if isinstance(one, Feature)], folder is None),
        )
        return _result(outcome, loaded.options, None if folder is None else own.path)


def _rooms(own: Sequence[Feature], temporary: bool) -> Rooms:
    """What takes part in a run with features of the caller's own."""
    rooms = replace(ROOMS, features=lambda: [*_features(), *own])
    return replace(rooms, report=lambda folder: None) if temporary else rooms


def _result(outcome: TrainOutcome, options: Options, folder: Path | None) -> FinetuneResult:
    """What a run left, read from its files while they are there."""
    place = outcome.folder
    errors = {"before": plain_errors(outcome.before), "after": plain_errors(outcome.after)}
    record = read_run(place)
    adapter = None
    if options.finetune.ensemble is not None and options.finetune.member is None:
        if not outcome.result.finished:
            raise ConfigError(f"finetune: interrupted; the members so far are in '{place}'.")
        base = options.finetune.read_from or ""
        found: AdaptedPotential | Committee = open_committee(base, place)

        def calculator(**settings: Any) -> PETCalculator:
            return PETCalculator(base, adapters=place, **settings)

    else:
        if not (place / BEST).exists():
            raise CheckpointError(
                "finetune: interrupted before the first epoch; there is no model."
            )
        best = found = load(place / BEST)
        adapter = read_adapter(place / ADAPTER) if (place / ADAPTER).is_dir() else None

        def calculator(**settings: Any) -> PETCalculator:
            return PETCalculator(best, **settings)

    if not outcome.result.finished and folder is None:
        _logger.warning("The run had no folder of its own (folder=...) and cannot be gone on with.")
    if folder is None and outcome.table is not None:  # its notes name files that are removed
        outcome.table.caption = None
    return FinetuneResult(
        found,
        adapter,
        outcome.table,
        errors,
        _history(record),
        outcome.result.finished,
        folder,
        record,
        calculator,
    )


def _history(record: RunRecord) -> Any:
    """The rows of ``train.csv`` as columns."""
    many = len(record.epochs) > 1
    rows = [
        {"member": float(member), **row} if many else row
        for member, rows in enumerate(record.epochs)
        for row in rows
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    try:
        from pandas import DataFrame  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return columns
    return DataFrame(columns)


def evaluate(
    model: Model,
    structures: Any,
    *,
    adapter: str | os.PathLike[str] | None = None,
    target: str | None = None,
    device: str = "auto",
    labels: LabelNames | None = None,
    as_tensormaps: bool | Sequence[str] | Mapping[str, str] = False,
    how: EvaluationSettings | None = None,
) -> EvaluationResult:
    """Errors of a model on labelled structures, and its predictions.

    Args:
        model: a checkpoint or a loaded model.
        structures: ``Atoms``, a list of them, the path of a file, or a list of paths.
        adapter: folder of an adapter of this checkpoint.
        target: which target is compared; None for the adapter's, or the only energy.
        device: ``auto``, ``cpu`` or ``cuda``.
        labels: names and units of the labels. Structures without are predicted only.
        as_tensormaps: whether the result holds metatensor's ``TensorMap`` of the target too; or
            names of outputs, features among them (``["feature"]``), or a mapping from these to
            ``"atom"`` or ``"system"``, as for :func:`pet_finetune.export.tensormaps.tensor_maps`.
        how: what else to do.

    Returns:
        Errors and predictions by set: ``structures`` for structures in memory, else the path.
    """
    how = replace(how or EvaluationSettings(), keep=True)
    if as_tensormaps is not False:
        how = replace(how, tensormaps=() if as_tensormaps is True else as_tensormaps)
    with _files(structures, "structures") as (files, names):
        return evaluate_files(
            _potential(model),
            files,
            names=[names.get(file, file) for file in files],
            adapter=None if adapter is None else Path(adapter),
            target=target,
            device=device,
            labels=labels or LabelNames(),
            how=how,
        )


def inspect(
    structures: Any,
    model: Model | None = None,
    *,
    validation: Any = (),
    test: Any = (),
    systems: Mapping[str, Any] | None = None,
    device: str = "auto",
    seconds: float = 20.0,
) -> Inspection:
    """Look at the data before anything is trained on them, as ``pet-finetune inspect`` does.

    Args:
        structures: ``Atoms``, a list of them, the path of a file, or a list of paths.
        model: to compare the labels with.
        validation: another set, given in the same ways.
        test: likewise.
        systems: more options of ``systems`` for all files: ``format``, ``types``.
        device: where the model is asked.
        seconds: how long it may be asked; of large sets it sees a part.
    """
    with ExitStack() as stack:
        above = stack.enter_context(tempfile.TemporaryDirectory(prefix="pet-finetune-"))
        start = None
        if model is not None:
            start = _checkpoint(model, Path(above, _FOUNDATION))
            if isinstance(model, (Potential, AdaptedPotential)):
                _write_foundation(model, Path(start))
        given = {"structures": structures, "validation": validation, "test": test}
        sets = [stack.enter_context(_files(some, name))[0] for name, some in given.items()]
        request = request_of_files(sets[0], start, sets[1], sets[2], systems=systems)
        return inspect_data(request, device=device, seconds=seconds)


def export(model: Model, output: str | os.PathLike[str], **settings: Any) -> ExportOutcome:
    """Write a model as a metatomic file for LAMMPS, i-PI, ASE and other engines.

    Args:
        model: a checkpoint or a loaded model.
        output: the file, ``model.pt``; one that exists is replaced.
        settings: as for :func:`pet_finetune.export.export.export_model`: ``adapter``, ``target``,
            ``dtype``, ``name``, ``authors``.
    """
    with tempfile.TemporaryDirectory(prefix="pet-finetune-") as above:
        # The file says what it was made from: a name, which a temporary one should not be.
        start = _checkpoint(model, Path(above, f"{Path(output).stem}.ckpt"))
        if isinstance(model, (Potential, AdaptedPotential)):
            _write_foundation(model, Path(start))
        return export_model(start, output, **settings)


def _potential(model: Model) -> str | Path | Potential:
    """A model as one that is evaluated."""
    if isinstance(model, AdaptedPotential):
        return model.potential
    return model if isinstance(model, Potential) else Path(model)


def _checkpoint(model: Model, spare: Path) -> str:
    """The file that a model is read from: its own where it is still that model, or ``spare``."""
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    if isinstance(model, AdaptedPotential) and model.source is not None:
        unchanged = model.source.exists() and model.active_adapter is None and (
            weights_fingerprint(load_checkpoint(model.source).model)
            == weights_fingerprint(model.potential)
        )  # fmt: skip
        if unchanged:
            return os.fspath(model.source)
    return os.fspath(spare.absolute())


def _write_foundation(model: Potential | AdaptedPotential, path: Path) -> None:
    """Write a model that lives in memory only."""
    if isinstance(model, AdaptedPotential):
        if model.source is not None and path == model.source:
            return
        model = model.potential
    save_checkpoint(path, model)


@contextmanager
def _files(structures: Any, name: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Structures as files, and what to call those that are made for it."""
    if isinstance(structures, (str, os.PathLike)):
        yield [os.fspath(structures)], {}
    elif len(structures) and not is_structures(structures):
        yield [os.fspath(path) for path in structures], {}
    elif not len(structures):
        yield [], {}
    else:
        with tempfile.TemporaryDirectory(prefix="pet-finetune-") as above:
            path = str(Path(above, f"{name}.db"))
            write_exact(path, structures if isinstance(structures, Sequence) else [structures])
            yield [path], {path: name}
