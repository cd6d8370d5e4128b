"""A training run from its options to its final table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pet_finetune import launchers, processes
from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.config import Options
from pet_finetune.device import choose_device
from pet_finetune.errors import ConfigError, PetFinetuneError
from pet_finetune.files import size_text
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.profiling import peak_gpu_mib, peak_resident_mib
from pet_finetune.runs import STARTED, RunFolder, own_folder, starts_of

from .ensemble import train_ensemble
from .feature import Feature, TrainingRun
from .launch import start_processes
from .loggers import RunDisplay
from .metrics import Errors
from .prepare import NO_ROOMS, Rooms, Run, prepare_run
from .records import EpochRecord, TrainingResult, TrainOutcome
from .resume import open_run, plain_errors
from .run_files import LOG, OPTIONS, RESULTS, RunFiles
from .sets import AFTER, BEFORE, evaluate_sets, primary_set
from .tables import error_table, show

_logger = get_logger(__name__)


@torch.inference_mode(False)
def train(
    options: Options,
    folder: str | Path | RunFolder | None = None,
    *,
    restart: str | Path | None = None,
    notices: Sequence[str] = (),
    source: str | Path = "",
    check: bool = True,
    rooms: Rooms = NO_ROOMS,
) -> TrainOutcome:
    """Train as the options say; print the table of errors before and after.

    With ``finetune.ensemble`` each member is trained by this function, then the committee is
    calibrated and evaluated.

    Args:
        options: checked options.
        folder: where the files of the run go; ``outputs/DATE/TIME`` without it. It belongs to
            this process, or those that train together, until the run ends.
        restart: a ``last.ckpt`` to go on from, exactly.
        notices: what reading the options had to say, for the log.
        source: the options file, which the run must not overwrite.
        check: whether a new run inspects its data first (as ``pet-finetune inspect`` does).
        rooms: what other rooms bring into the run.

    Raises:
        PetFinetuneError: any bad input, with one clear message.
    """
    launch = launchers.find_launch(options.training.distributed, options.training.distributed_port)
    several = options.num_processes > 1 or (launch is not None and launch.size > 1)
    if several and restart is None and options.finetune.pretrain is not None:
        raise ConfigError(
            "architecture.training.finetune.pretrain: done by one process, and several train here. "
            "Make the checkpoint with `pet-finetune pretrain` first, and start from it with -c."
        )
    if launch is None and options.num_processes > 1:
        if rooms.own:
            raise ConfigError(
                f"device: {options.device}: features of your own cannot be given to other "
                "processes. Start the script with torchrun instead."
            )
        return start_processes(options, folder, restart, notices, source, check)
    device = choose_device(options.device, None if launch is None else launch.local_rank)
    with processes.joined(launch, device), ExitStack() as stack:
        if launch is not None and options.num_processes not in (1, launch.size):
            raise ConfigError(
                f"device: {options.device} starts as many processes, but {launch.by} has started "
                f"{launch.size} already. Use device: auto with a launcher."
            )
        processes.check_distinct(processes.gathered(processes.identity(device)))
        path = stack.enter_context(own_folder(folder))
        if restart is None and options.finetune.pretrain is not None:
            RunFiles(path).check_free(source)  # before hours are spent
            options = rooms.start(options)
        if options.is_committee:
            return train_ensemble(
                train,
                options,
                path,
                restart=restart,
                notices=notices,
                source=source,
                check=check,
                rooms=rooms,
            )
        return _train_in(path, options, device, restart, notices, source, check, rooms)


def _train_in(
    folder: Path,
    options: Options,
    device: torch.device,
    restart: str | Path | None,
    notices: Sequence[str],
    source: str | Path,
    check: bool,
    rooms: Rooms,
) -> TrainOutcome:
    """Train one model in a folder of its own."""
    files = RunFiles(folder)
    if restart is None:
        files.check_free(source)
    setup_logging(file=files.folder / LOG)
    for notice in notices:
        _logger.warning(notice)
    try:
        saved = open_run(restart, options) if restart is not None else None
        options = saved.options if saved else options
        run = prepare_run(options, files, saved, device, rooms, check=check and saved is None)
        files.tell({STARTED: starts_of(files.about())})
        result = _train(run)
        _tell_memory(run)
        if result.finished:
            outcome = _finish(run, result)
            if processes.first():
                rooms.report(files.folder)
            return outcome
    except PetFinetuneError as error:
        # Whoever called shows it; the log is where one looks for it a week later.
        _logger.error("%s", error, extra=FILE_ONLY)
        raise
    if processes.first():
        rooms.report(files.folder)
    _logger.warning(
        "interrupted; the state is saved. Go on with: %s",
        shlex.join(
            ["pet-finetune", "train", f"{files.folder / OPTIONS}", "--restart", f"{files.folder}"]
        ),
    )
    return TrainOutcome(files.folder, result, {}, {})


class RunRecorder(Feature):
    """The feature that writes a run's files as it goes: table, best model, state."""

    name = "files"

    def __init__(self, run: Run) -> None:
        self._run = run

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Note whose state is written."""
        self._trainer = trainer

    def epoch_ended(self, record: EpochRecord) -> None:
        """Keep the model where it is the best so far, and add a row to ``train.csv``."""
        if record.best:
            self._run.files.keep_best(self._trainer.model, record)
        self._run.files.add_row(record)

    def save(self) -> None:
        """Write ``last.ckpt``."""
        trainer, state = self._trainer, self._run.state
        training = {"run": state.plain(), "trainer": trainer.state()}
        self._run.files.keep_last(trainer.model, training)


def _train(run: Run) -> TrainingResult:
    """Train with the display open and the files written as the run goes."""
    trainer, options = run.trainer, run.trainer.options
    trainer.add(RunRecorder(run))
    trainer.add(RunDisplay(options.num_epochs, options.log_interval, trainer.progress.epoch))
    return trainer.fit()


def _finish(run: Run, result: TrainingResult) -> TrainOutcome:
    """Evaluate the best model, write ``results.json``, print the table."""
    files, before, features = run.files, run.state.before, run.trainer.features
    if result.stopped_early:
        _logger.info("stopped early: no improvement for a while")
    _logger.info("best model: epoch %d of %d, %s", result.best_epoch, result.epochs, files.best)
    after: Errors = {}
    found: dict[str, Any] = {}
    table: Table | None = None
    completing = [f for f in features if type(f).complete is not Feature.complete]
    if run.options.final_eval or completing:
        processes.barrier()  # the first one has written it
        checkpoint = load_checkpoint(files.best)
        model = run.trainer.model
        best = checkpoint.model.to(device=model.device, dtype=model.dtype)
        for feature in completing:
            found |= feature.complete(checkpoint, files)
    if run.options.final_eval:
        after = evaluate_sets(files, AFTER, best, run.data, run.trainer.wanted, features)
        table = _results_table(run, after)
        _logger.info("results\n%s", show(table), extra=FILE_ONLY)
        for feature in features:
            found |= feature.finish(best, files)
    content: dict[str, Any] = {BEFORE: plain_errors(before), AFTER: plain_errors(after)}
    trained = sum(parameter.numel() for parameter in run.trainer.parameters.values())
    content["parameters"] = {"trainable": trained, "total": run.trainer.model.num_parameters()}
    files.write(RESULTS, json.dumps({**content, **found}, indent=2) + "\n")
    return TrainOutcome(files.folder, result, before, after, table)


def _tell_memory(run: Run) -> None:
    """Note the most memory that the process, and its tensors on a GPU, have taken so far."""
    device = run.trainer.model.device
    run.files.tell(
        {"peak_memory_mib": {"process": peak_resident_mib(), "gpu": peak_gpu_mib(device)}}
    )


def _results_table(run: Run, after: Errors) -> Table:
    """Errors before and after on the set that says most."""
    shown = primary_set(run.data.sets)
    finetuned = run.state.fingerprint is not None
    columns: dict[str, Errors] = {}
    if shown in run.state.before:
        name = "starting model" if finetuned else "untrained"
        columns[f"{name} (after {run.state.baseline})"] = run.state.before
    columns["fine-tuned" if finetuned else "trained"] = after
    groups = {"": {name: errors[shown] for name, errors in columns.items()}}
    headings = {feature.name: feature.heading or feature.name for feature in run.trainer.features}
    for own in (name for name in after if name not in run.data.sets):
        kept = {name: errors.get(own, {}) for name, errors in columns.items()}
        groups[f"{headings.get(own, own)}: "] = kept
    notes = [f"{len(run.data.sets[shown].structures)} {shown} structures", *_sizes(run.files)]
    notes += [note for feature in run.trainer.features for note in feature.notes()]
    return error_table(groups, notes, title=f"errors on the {shown} set")


def _sizes(files: RunFiles) -> list[str]:
    """Sizes of what the run wrote, for the table's foot."""
    sizes = [f"model: {files.best} ({size_text(files.best.stat().st_size)})"]
    if files.adapter.is_dir():
        total = sum(path.stat().st_size for path in files.adapter.iterdir())
        sizes.append(f"adapter: {files.adapter} ({size_text(total)})")
    return sizes
