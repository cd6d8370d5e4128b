"""The Python door: what a script or a notebook calls, and what the command line calls.

>>> import pet_finetune as pf  # doctest: +SKIP
>>> result = pf.finetune("foundation.ckpt", train_atoms, method=pf.Lora())  # doctest: +SKIP
>>> atoms.calc = result.calculator()  # doctest: +SKIP
"""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

# Names that are written twice (`x as x`) are passed on to the command line.
from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.checkpoint.contents import check_adapters as check_adapters
from pet_finetune.checkpoint.contents import checkpoint_facts as checkpoint_facts
from pet_finetune.checkpoint.contents import combine_adapters as combine_adapters
from pet_finetune.checkpoint.contents import describe_adapter as describe_adapter
from pet_finetune.checkpoint.contents import describe_checkpoint as describe_checkpoint
from pet_finetune.checkpoint.contents import merge_adapter as merge_adapter
from pet_finetune.config.finetune import LastLayerOptions, PretrainOptions
from pet_finetune.config.problems import check_kind, checked_section
from pet_finetune.data.convert_sets import convert as convert
from pet_finetune.data.frame_files import read_frames
from pet_finetune.dynamics.integrators import MDSettings as MDSettings
from pet_finetune.dynamics.md_checks import ModelChoice as ModelChoice
from pet_finetune.dynamics.md_checks import RelaxSettings as RelaxSettings
from pet_finetune.dynamics.md_run import restart_md as restart_md
from pet_finetune.dynamics.md_run import run_md as run_md
from pet_finetune.dynamics.relaxation import relax_structures as relax_structures
from pet_finetune.errors import ConfigError, DataError
from pet_finetune.export.export import ExportOutcome
from pet_finetune.export.export import export_model as export_model
from pet_finetune.export.export import export_table as export_table
from pet_finetune.finetuning import ROOMS as ROOMS
from pet_finetune.finetuning import FinetuneResult as FinetuneResult
from pet_finetune.finetuning import features_of_rooms, result_of
from pet_finetune.finetuning import profile as profile
from pet_finetune.finetuning import train as train
from pet_finetune.finetuning import train_as_told as train_as_told
from pet_finetune.finetuning import train_named as train_named
from pet_finetune.inspection.inspect_data import Request as Request
from pet_finetune.inspection.inspect_data import inspect_data as inspect_data
from pet_finetune.inspection.inspect_data import request_of_files as request_of_files
from pet_finetune.inspection.inspect_data import request_of_options as request_of_options
from pet_finetune.inspection.inspect_data import write_suggestion as write_suggestion
from pet_finetune.inspection.overview import Inspection as Inspection
from pet_finetune.inspection.overview import as_dict as as_dict
from pet_finetune.inspection.overview import render as render
from pet_finetune.keywords import (
    Arguments,
    Keywords,
    Method,
    as_files,
    as_model,
    as_written,
    checkpoint_of,
    is_structures,
    listed,
    renamed,
    with_own_names,
)
from pet_finetune.keywords import Model as Model
from pet_finetune.log import get_logger, setup_logging
from pet_finetune.pretraining.stages import PretrainResult as PretrainResult
from pet_finetune.pretraining.stages import pretrain_model
from pet_finetune.report.report_file import ReportServer as ReportServer
from pet_finetune.report.report_file import write_report as write_report
from pet_finetune.runs import RunFolder
from pet_finetune.terminal import show as show
from pet_finetune.training import run, uncertainty
from pet_finetune.training.compare_runs import evaluate_named as evaluate_named
from pet_finetune.training.evaluation import EvaluationResult as EvaluationResult
from pet_finetune.training.evaluation import EvaluationSettings as EvaluationSettings
from pet_finetune.training.evaluation import LabelNames as LabelNames
from pet_finetune.training.evaluation import evaluate_datasets as evaluate_datasets
from pet_finetune.training.evaluation import evaluate_files as evaluate_files
from pet_finetune.training.evaluation import evaluate_options as evaluate_options
from pet_finetune.training.feature import Feature
from pet_finetune.training.prepare import Rooms
from pet_finetune.training.run_files import RunFiles
from pet_finetune.training.step import TrainOutcome as TrainOutcome

_logger = get_logger(__name__)
_FOUNDATION = "foundation.ckpt"


@contextmanager
def _callers_state_kept() -> Iterator[None]:
    """A context that leaves a script's random numbers of torch and its warnings alone."""
    shown = warnings.showwarning
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            warnings.showwarning = shown


def finetune(
    model: Model | None,
    train: Any,
    validation: Any = None,
    *,
    test: Any = None,
    targets: Mapping[str, Any] | None = None,
    method: Method | type[Method] | str | None = None,
    features: Sequence[Keywords | Feature] | Keywords | Feature = (),
    folder: str | os.PathLike[str] | None = None,
    check: bool = True,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a model on structures, as ``pet-finetune train`` does.

    Args:
        model: the start: a checkpoint or a loaded model, not changed. None: from the options.
        train: ``Atoms`` or a list of them (eV and Å; labels in the calculator's results, ``info``
            or ``arrays``), the path of a file that ASE reads, a section of ``training_set``, or
            all options: a dictionary as in an options file, or the path of one (``.yaml``).
        validation: a fraction of the training structures, or given as these; None: the options.
        test: given in the same ways.
        targets: what is learned, as ``targets`` of a data set:
            ``{"energy": {"key": "REF_energy", "unit": "eV"}}``. None is ``energy`` with ``forces``
            and ``stress`` if present.
        method: :class:`Lora`, :class:`Dora`, :class:`Qlora`, :class:`Prompt`, :class:`Heads` or
            :class:`Full`. None is LoRA if a model is given.
        features: one or several of :class:`Replay`, :class:`Anchor`, :class:`Retention`, and of
            objects of :class:`Feature` classes of your own.
        folder: folder of the run's files; None removes them at the end.
        check: whether the data are inspected first.
        options: any other option by its name: those of ``architecture.training`` (``epochs`` is
            short for ``num_epochs``, ``batch_size``, ``learning_rate``...), of its ``finetune``
            (``new_elements``, ``unfreeze``...) and of the top (``seed``, ``device``...).

    Raises:
        ConfigError: options that are wrong, one line for each.
        PetFinetuneError: any other bad input, with one clear message.
    """
    if isinstance(features, (Keywords, Feature)):
        features = [features]
    with ExitStack() as stack:
        stack.enter_context(_callers_state_kept())
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
        spare = own.path / _FOUNDATION
        start = None if model is None else checkpoint_of(model, spare, write=False)
        loaded = arguments.parse(start, "finetune")
        if folder is None and loaded.options.finetune.ensemble is not None:
            raise ConfigError("finetune: the members of an ensemble need a folder: folder=...")
        if model is not None:  # after the options were found to be right
            checkpoint_of(model, spare)
        stack.enter_context(with_own_names(arguments.files))
        outcome = run.train(
            loaded.options,
            own,
            notices=loaded.notices,
            check=check,
            rooms=_rooms([one for one in features if isinstance(one, Feature)], folder is None),
        )
        return result_of(outcome, loaded.options, None if folder is None else own.path)


def _rooms(own: Sequence[Feature], temporary: bool) -> Rooms:
    """Rooms of a run with the caller's own features."""
    rooms = replace(ROOMS, features=lambda: [*features_of_rooms(), *own], own=bool(own))
    return replace(rooms, report=lambda folder: None, kept=False) if temporary else rooms


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
        target: the compared target; None for the energy of the adapter, or else of the model; of
            several, ``energy``.
        device: ``auto``, ``cpu`` or ``cuda``.
        labels: names and units of the labels. Structures without labels are only predicted.
        as_tensormaps: whether the result holds metatensor's ``TensorMap`` of the target too; or
            names of outputs, features among them (``["feature"]``), or a mapping from these to
            ``"atom"`` or ``"system"``, as for :func:`pet_finetune.export.tensormaps.tensor_maps`.
        how: further settings.

    Returns:
        Errors and predictions by set: ``structures`` for structures in memory, else the path.
    """
    for name, given, kind in (("labels", labels, LabelNames), ("how", how, EvaluationSettings)):
        if given is not None:
            check_kind(name, given, kind, f"pf.{kind.__name__}")
    how = replace(how or EvaluationSettings(), keep=True)
    if as_tensormaps is not False:
        how = replace(how, tensormaps=() if as_tensormaps is True else as_tensormaps)
    with as_files(structures, "structures") as (files, names):
        if not files:
            raise DataError("structures: there are none.")
        return evaluate_files(
            as_model(model),
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
    """Check data before training, as ``pet-finetune inspect`` does.

    Args:
        structures: ``Atoms``, a list of them, the path of a file, or a list of paths.
        model: foundation to compare the labels with.
        validation: another set, given in the same ways.
        test: likewise.
        systems: more options of ``systems`` for all files: ``format``, ``types``.
        device: device of the model.
        seconds: time limit for its predictions; it sees a part of large sets.
    """
    with ExitStack() as stack:
        above = stack.enter_context(tempfile.TemporaryDirectory(prefix="pet-finetune-"))
        start = None
        if model is not None:
            start = checkpoint_of(model, Path(above, _FOUNDATION))
        given = {"structures": structures, "validation": validation, "test": test}
        sets = [stack.enter_context(as_files(some, name)) for name, some in given.items()]
        (train, own), (held, second), (last, third) = sets
        if not train:
            raise DataError("structures: there are none.")
        request = request_of_files(train, start, held, last, systems=systems)
        found = inspect_data(request, device=device, seconds=seconds)
        return renamed(found, own | second | third)


def pretrain(
    model: Model,
    structures: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    systems: Mapping[str, Any] | None = None,
    device: str = "auto",
    **settings: Any,
) -> PretrainResult:
    """Train a foundation on a system with cheap labels, as ``pet-finetune pretrain`` does.

    Args:
        model: the foundation: a checkpoint or a loaded model, which is not changed.
        structures: ``Atoms``, a list of them, or the path of a file; labels are not used.
        output: the checkpoint to write; None for the model in memory only.
        work: folder of the stages, from which the same call continues after a stop; default
            ``<output>.work``, and none without ``output``.
        systems: how a file is read: ``format``, ``types``.
        device: ``auto``, ``cpu`` or ``cuda``.
        settings: the options of ``finetune.pretrain``: ``teacher``, ``n``, ``temperatures``,
            ``epochs``...

    Raises:
        PetFinetuneError: bad input, or no frame that the teacher can label.
    """
    checked = checked_section(PretrainOptions, as_written(settings), "pretrain")
    structures = listed(structures)
    if is_structures(structures):
        frames = [structures] if isinstance(structures, Atoms) else list(structures)
    else:
        frames = list(read_frames(structures, **(systems or {})))
    with ExitStack() as stack:
        stack.enter_context(_callers_state_kept())
        above = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pet-finetune-")))
        stack.callback(setup_logging)  # the log file of the training is closed before it goes
        start = checkpoint_of(model, above / _FOUNDATION)
        place = above / "pretrained.ckpt" if output is None else Path(output)
        own = None if work is None else Path(work)
        result = pretrain_model(start, frames, place, checked, own, device)
    return replace(result, checkpoint=None) if output is None else result


def add_uncertainty(
    model: Model,
    train: Any,
    validation: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    target: str | None = None,
    labels: LabelNames | None = None,
    device: str = "auto",
    **settings: Any,
) -> AdaptedPotential:
    """Add a last-layer uncertainty (LLPR) to a model without changing its weights.

    Args:
        model: a checkpoint or a loaded model, which is not changed.
        train: its training structures: ``Atoms``, a list of them, the path of a file, or several.
        validation: other structures with energies, for the calibration factor.
        output: a checkpoint to write.
        target: the target; None for the only energy.
        labels: names and units of the labels in files.
        device: ``auto``, ``cpu`` or ``cuda``.
        settings: the options of ``finetune.llpr``: ``regularizer``, ``calibration_method``,
            ``num_ensemble_members``.

    Returns:
        The model with its uncertainty, for :class:`PETCalculator`, ``evaluate`` and ``export``.
    """
    checked = checked_section(LastLayerOptions, as_written(settings), "add_uncertainty")
    with as_files(train, "train") as (first, _), as_files(validation, "validation") as (second, _):
        made = uncertainty.add_uncertainty(
            as_model(model),
            first,
            second,
            None if output is None else Path(output),
            checked,
            target=target,
            device=device,
            labels=labels or LabelNames(),
        )
    return AdaptedPotential(made)


def export(model: Model, output: str | os.PathLike[str], **settings: Any) -> ExportOutcome:
    """Write a model as a metatomic file for LAMMPS, i-PI, ASE and other engines.

    Args:
        model: a checkpoint or a loaded model.
        output: the file, such as ``model.pt``; an existing one is replaced.
        settings: as for :func:`pet_finetune.export.export.export_model`: ``adapter``, ``target``,
            ``dtype``, ``name``, ``authors``.
    """
    with tempfile.TemporaryDirectory(prefix="pet-finetune-") as above:
        # The file says what it was made from: a name, which a temporary one should not be.
        start = checkpoint_of(model, Path(above, f"{Path(output).stem}.ckpt"))
        return export_model(start, output, **settings)


gc.enable()  # the command line waits with it until all is imported
