"""A training run from its options to its final table, by one process or several (``device: 4``).

torch's own launcher, which is what torchrun calls, starts them and ends them all when one fails.
What they train is written to a file; the process that started them has the run's folder, and waits.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pet_finetune import launchers, processes
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.load import parse_options, read_yaml, to_yaml
from pet_finetune.config.run_options import Options
from pet_finetune.device import choose_device, plain_torch
from pet_finetune.errors import ConfigError, PetFinetuneError, TrainingError
from pet_finetune.files import size_text
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.profiling import peak_gpu_mib, peak_resident_mib
from pet_finetune.runs import STARTED, RunFolder, own_folder, starts_of
from pet_finetune.terminal import handed_over, show

from .baselines import settled_rows
from .ensemble import train_ensemble
from .feature import Feature
from .loggers import RunDisplay, error_table
from .metrics import Errors
from .prepare import NO_ROOMS, Rooms, Run, RunRequest, prepare_run, resume_run
from .resume import errors_of, open_run, plain_errors, plain_states
from .run_files import ADAPTER, BEST, LOG, OPTIONS, RESULTS, RunFiles, sizes_of
from .sets import AFTER, BEFORE, evaluate_sets, primary_set
from .step import EpochRecord, TrainingResult, TrainOutcome

_logger = get_logger(__name__)


@plain_torch()
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
    """
    request = RunRequest(restart, notices, source, check, rooms)
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
        return _start_processes(options, folder, request)
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
            return train_ensemble(train, options, path, request)
        return _train_in(path, options, device, request)


def _train_in(
    folder: Path, options: Options, device: torch.device, request: RunRequest
) -> TrainOutcome:
    """Train one model in a folder of its own."""
    rooms = request.rooms
    files = RunFiles(folder, rooms.kept)
    if request.restart is None:
        files.check_free(request.source)
    setup_logging(file=files.folder / LOG)
    for notice in request.notices:
        _logger.warning(notice)
    try:
        if request.restart is None:
            run = prepare_run(options, files, device, rooms, check=request.check)
        else:
            run = resume_run(files, open_run(request.restart, options), device, rooms)
        files.tell({STARTED: starts_of(files.about())})
        trainer, training = run.trainer, run.options.training
        recorder = RunRecorder(run)
        trainer.add(recorder)
        done = trainer.progress.epoch
        trainer.add(RunDisplay(training.epochs, training.log_interval, done))
        if not trainer.progress.step:  # whatever ends the first epoch, the run can be gone on with
            recorder.save()
        result = trainer.fit()
        peaks = {"process": peak_resident_mib(), "gpu": peak_gpu_mib(trainer.model.device)}
        files.tell({"peak_memory_mib": peaks})
        if result.finished:
            outcome = _finish(run, result)
            if processes.first():
                rooms.report(files.folder)
            return outcome
    except PetFinetuneError as error:
        # The caller shows it; the log keeps it for later.
        _logger.error("%s", error, extra=FILE_ONLY)
        raise
    if processes.first():
        rooms.report(files.folder)
    command = ["pet-finetune", "train", f"{files.folder / OPTIONS}"]
    _logger.warning(
        "interrupted; %s",
        f"the state is saved. Go on with: {shlex.join([*command, '--restart', f'{files.folder}'])}"
        if rooms.kept
        else "the result is the best model so far. A run with folder=... can go on later.",
    )
    return TrainOutcome(files.folder, result, {}, {})


class RunRecorder(Feature):
    """The feature that writes a run's files as it goes: table, best model, state."""

    name = "files"

    def __init__(self, run: Run) -> None:
        self._run = run

    def epoch_ended(self, record: EpochRecord) -> None:
        """Keep the model where it is the best so far, and add a row to ``train.csv``."""
        if record.best:
            self._run.files.keep_best(self.trainer.model, record)
        self._run.files.add_row(record)

    def save(self) -> None:
        """Write ``last.ckpt``."""
        training = {"run": self._run.state.plain(), "trainer": self.trainer.state()}
        self._run.files.keep_last(self.trainer.model, training)


def _finish(run: Run, result: TrainingResult) -> TrainOutcome:
    """Evaluate the best model, write ``results.json``, print the table."""
    files, before, features = run.files, run.state.before, run.trainer.features
    if result.stopped_early:
        _logger.info("stopped early: no improvement for a while")
    where = f", {files.best}" if files.kept else ""
    _logger.info("best model: epoch %d of %d%s", result.best_epoch, result.epochs, where)
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
        tables = files.about().get("baselines", ())
        files.tell({"baselines": settled_rows(tables, best)})
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
    notes = [f"{len(run.data.sets[shown].structures)} {shown} structures"]
    notes += _sizes(run.files) if run.files.kept else []
    notes += [note for feature in run.trainer.features for note in feature.notes()]
    return error_table(groups, notes, title=f"errors on the {shown} set")


def _sizes(files: RunFiles) -> list[str]:
    """Sizes of what the run wrote, for the table's foot."""
    sizes, names = sizes_of(files.folder), {BEST: "model", ADAPTER: "adapter"}
    return [f"{names[n]}: {files.folder / n} ({size_text(size)})" for n, size in sizes.items()]


_OUTCOME = "outcome.json"
_SECONDS_TO_STOP = "300"  # to write the state of an interrupted run


def _start_processes(
    options: Options, folder: str | Path | RunFolder | None, request: RunRequest
) -> TrainOutcome:
    """Train with as many processes as ``device`` says; an error is that of the one that failed."""
    count, restart = options.num_processes, request.restart
    with own_folder(folder) as path, tempfile.TemporaryDirectory(prefix="pet-finetune-") as place:
        job = Path(place, "job.yaml")
        content = {
            "options": _plain(options),
            "folder": str(path),
            "restart": None if restart is None else str(restart),
            "notices": list(request.notices),
            "source": str(request.source),
            "check": request.check,
        }
        job.write_text(to_yaml(content), encoding="utf-8")
        error = Path(place, "error.txt")
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, processes.num_cores() // count))
        with _environment({processes.ERROR_FILE: str(error), "OMP_NUM_THREADS": threads}):
            failure = _run(count, job)
        written = Path(place, _OUTCOME)
        if error.exists():
            raise TrainingError(error.read_text(encoding="utf-8"))
        if failure or not written.exists():
            raise TrainingError(
                f"{failure or 'The processes ended without a result'}. The state of the last save "
                f"is untouched: go on with --restart {path}."
            )
        return _outcome(json.loads(written.read_text(encoding="utf-8")), path, options)


def _plain(options: Options) -> dict[str, Any]:
    """Options as values that make the same ones; the learning rate only where it was given."""
    plain = options.resolved()
    if options.training.learning_rate is None:
        del plain["architecture"]["training"]["learning_rate"]
    return plain


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that are started."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(count: int, job: Path) -> str:
    """Start the processes and wait for their end; what went wrong, in words, or nothing."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_STOP)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        run_id=job.parent.name,
    )
    try:
        with handed_over():
            elastic_launch(config, sys.executable)("-m", "pet_finetune", "job", str(job))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return f"Process {rank} of {count} ended with exit status {failure.exitcode}"
        return (
            f"Process {rank} of {count} was ended by {failure.signal_name()}; SIGKILL is what the "
            "system sends where memory runs out"
        )
    except SignalException as error:  # they were told to stop, and have saved
        return "" if Path(job.parent, _OUTCOME).exists() else f"The run was stopped ({error})"
    return ""


def train_as_told(job: Path, train: Callable[..., TrainOutcome]) -> TrainOutcome:
    """Work of each process."""
    told = read_yaml(job)
    loaded = parse_options(told.pop("options"), require_start=False)
    outcome = train(loaded.options, RunFolder(Path(told.pop("folder"))), **told)
    if os.environ["RANK"] == "0":
        content = {
            "result": asdict(outcome.result),
            "before": plain_states(outcome.before),
            "after": plain_states(outcome.after),
        }
        (job.parent / _OUTCOME).write_text(json.dumps(content), encoding="utf-8")
    return outcome


def _outcome(content: dict[str, Any], folder: Path, options: Options) -> TrainOutcome:
    """The opposite of what :func:`train_as_told` writes; without the table, which was printed."""
    specs = options.target_specs()
    result = TrainingResult(**content["result"])
    before, after = (errors_of(content[name], specs) for name in ("before", "after"))
    return TrainOutcome(folder, result, before, after)
