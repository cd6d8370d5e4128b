"""A training run from its options to its final table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.config import Options
from pet_finetune.device import choose_device
from pet_finetune.errors import PetFinetuneError
from pet_finetune.files import size_text
from pet_finetune.forgetting.dimer_report import report_dimers
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.report.tables import error_table, show
from pet_finetune.report.write import report_or_warn
from pet_finetune.runs.folder import STARTED, RunFolder, own_folder, starts_of
from pet_finetune.training import TrainingResult
from pet_finetune.training.memory import peak_gpu_mib, peak_resident_mib
from pet_finetune.training.progress import RunDisplay
from pet_finetune.training.records import Callbacks, EpochRecord
from pet_finetune.training.resume import Errors, open_run, plain_errors
from pet_finetune.training.run_files import LOG, OPTIONS, RESULTS, RunFiles

from .ensemble import train_ensemble
from .outcome import TrainOutcome
from .prepare import AFTER, BEFORE, RETENTION, Run, evaluate_sets, prepare_run, telling_set

_logger = get_logger(__name__)


def train(
    options: Options,
    folder: str | Path | RunFolder | None = None,
    *,
    restart: str | Path | None = None,
    notices: Sequence[str] = (),
    source: str | Path = "",
    check: bool = True,
) -> TrainOutcome:
    """Train as the options say; print the table of errors before and after.

    With ``finetune.ensemble`` each member is trained by this function, then the committee is
    calibrated and evaluated.

    Args:
        options: checked options.
        folder: where the files of the run go; ``outputs/DATE/TIME`` without it. It belongs to
            this process until the run ends.
        restart: a ``last.ckpt`` to go on from, exactly.
        notices: what reading the options had to say, for the log.
        source: the options file, which the run must not overwrite.
        check: whether a new run inspects its data first (as ``pet-finetune inspect`` does).

    Raises:
        PetFinetuneError: any bad input, with one clear message.
    """
    device = choose_device(options.device)
    with own_folder(folder) as path:
        if options.finetune.ensemble is not None and options.finetune.member is None:
            return train_ensemble(
                train, options, path, restart=restart, notices=notices, source=source, check=check
            )
        return _train_in(path, options, device, restart, notices, source, check)


def _train_in(
    folder: Path,
    options: Options,
    device: torch.device,
    restart: str | Path | None,
    notices: Sequence[str],
    source: str | Path,
    check: bool,
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
        run = prepare_run(options, files, saved, device, check=check and saved is None)
        files.tell({STARTED: starts_of(files.about())})
        result = _train(run)
        _tell_memory(run)
        if result.finished:
            outcome = _finish(run, result)
            report_or_warn(files.folder)
            return outcome
    except PetFinetuneError as error:
        # Whoever called shows it; the log is where one looks for it a week later.
        _logger.error("%s", error, extra=FILE_ONLY)
        raise
    report_or_warn(files.folder)
    _logger.warning(
        "interrupted; the state is saved. Go on with: %s",
        shlex.join(
            ["pet-finetune", "train", f"{files.folder / OPTIONS}", "--restart", f"{files.folder}"]
        ),
    )
    return TrainOutcome(files.folder, result, {}, {})


def _train(run: Run) -> TrainingResult:
    """Train with the display open and the files written as the run goes."""
    trainer, files = run.trainer, run.files
    options = trainer.options

    def save() -> None:
        files.keep_last(trainer.model, {"run": run.state.plain(), "trainer": trainer.state()})

    with RunDisplay(options.num_epochs, options.log_interval, trainer.progress.epoch) as display:

        def end_of_epoch(record: EpochRecord) -> None:
            files.add_row(record)
            display.epoch(record)

        trainer.callbacks = Callbacks(
            step=display.step, epoch=end_of_epoch, best=files.keep_best, save=save
        )
        if run.retention is not None:
            trainer.callbacks.retention = run.retention.errors_after
        return trainer.fit()


def _finish(run: Run, result: TrainingResult) -> TrainOutcome:
    """Evaluate the best model, write ``results.json``, print the table."""
    files, before = run.files, run.state.before
    if result.stopped_early:
        _logger.info("stopped early: no improvement for a while")
    _logger.info("best model: epoch %d of %d, %s", result.best_epoch, result.epochs, files.best)
    after: Errors = {}
    verdicts: dict[str, str] = {}
    if run.options.final_eval:
        model = run.trainer.model
        best = load_checkpoint(files.best).model.to(device=model.device, dtype=model.dtype)
        after = evaluate_sets(files, AFTER, best, run.data, run.trainer.wanted, run.retention)
        _show_results(run, after)
        verdicts = report_dimers(run.kept.dimers, best, files)
    content: dict[str, Any] = {BEFORE: plain_errors(before), AFTER: plain_errors(after)}
    trained = sum(parameter.numel() for parameter in run.trainer.parameters.values())
    content["parameters"] = {"trainable": trained, "total": run.trainer.model.num_parameters()}
    if verdicts:
        content["dimers"] = verdicts
    files.write(RESULTS, json.dumps(content, indent=2) + "\n")
    return TrainOutcome(files.folder, result, before, after)


def _tell_memory(run: Run) -> None:
    """Note the most memory that the process, and its tensors on a GPU, have taken so far."""
    device = run.trainer.model.device
    run.files.tell(
        {"peak_memory_mib": {"process": peak_resident_mib(), "gpu": peak_gpu_mib(device)}}
    )


def _show_results(run: Run, after: Errors) -> None:
    """Print the table of the set that says most, and put it into the log file."""
    shown = telling_set(run.data.sets)
    finetuned = run.state.fingerprint is not None
    columns: dict[str, Errors] = {}
    if shown in run.state.before:
        name = "starting model" if finetuned else "untrained"
        columns[f"{name} (after {run.state.baseline})"] = run.state.before
    columns["fine-tuned" if finetuned else "trained"] = after
    groups = {"": {name: errors[shown] for name, errors in columns.items()}}
    if RETENTION in after:
        kept = {name: errors.get(RETENTION, {}) for name, errors in columns.items()}
        groups["forgetting: "] = kept
    notes = [f"{len(run.data.sets[shown].structures)} {shown} structures", *_sizes(run.files)]
    if run.kept.retention is not None:
        count, source = len(run.kept.retention.structures), run.kept.retention.structures[0].source
        notes.append(f"forgetting: {count} structures ({source})")
    table = error_table(groups, notes, title=f"errors on the {shown} set")
    _logger.info("results\n%s", show(table), extra=FILE_ONLY)


def _sizes(files: RunFiles) -> list[str]:
    """Sizes of what the run wrote, for the table's foot."""
    sizes = [f"model: {files.best} ({size_text(files.best.stat().st_size)})"]
    if files.adapter.is_dir():
        total = sum(path.stat().st_size for path in files.adapter.iterdir())
        sizes.append(f"adapter: {files.adapter} ({size_text(total)})")
    return sizes
