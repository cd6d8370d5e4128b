"""Starting the processes of a run: ``device: 4``.

torch's own launcher, which is what torchrun calls, starts them and ends them all when one fails.
What they train is written to a file; the process that started them has the run's folder, and waits.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pet_finetune import processes
from pet_finetune.config import Options
from pet_finetune.config.load import parse_options
from pet_finetune.config.yaml_file import read_yaml
from pet_finetune.errors import TrainingError
from pet_finetune.progress import handed_over
from pet_finetune.runs import RunFolder, own_folder

from .records import TrainingResult, TrainOutcome
from .resume import errors_of, plain_states

_OUTCOME = "outcome.json"
_SECONDS_TO_STOP = "300"  # to write the state of an interrupted run


def start_processes(
    options: Options,
    folder: str | Path | RunFolder | None,
    restart: str | Path | None,
    notices: Sequence[str],
    source: str | Path,
    check: bool,
) -> TrainOutcome:
    """Train with as many processes as ``device`` says; arguments as for :func:`~.run.train`.

    Raises:
        TrainingError: what ended the run; its message is that of the process that failed.
    """
    count = options.num_processes
    with own_folder(folder) as path, tempfile.TemporaryDirectory(prefix="pet-finetune-") as place:
        job = Path(place, "job.yaml")
        content = {
            "options": _plain(options),
            "folder": str(path),
            "restart": None if restart is None else str(restart),
            "notices": list(notices),
            "source": str(source),
            "check": check,
        }
        job.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
        error = Path(place, "error.txt")
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _num_cores() // count))
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


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
            elastic_launch(config, sys.executable)("-m", "pet_finetune.cli.worker", str(job))
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
    """What each of the processes does.

    Args:
        job: the file that :func:`start_processes` wrote.
        train: :func:`pet_finetune.api.train`.
    """
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
