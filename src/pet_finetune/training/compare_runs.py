"""Running the named runs of a file, evaluating them by name, and comparing them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from pet_finetune import launchers, processes
from pet_finetune.config.load import read_yaml
from pet_finetune.config.named_run_options import NamedRun
from pet_finetune.config.run_options import Options
from pet_finetune.device import choose_device
from pet_finetune.errors import ConfigError, DataError, PetFinetuneError, did_you_mean
from pet_finetune.files import read_object, size_text
from pet_finetune.hub import is_address
from pet_finetune.log import get_logger, setup_logging
from pet_finetune.runs import RunFolder, changed_options, own_folder
from pet_finetune.terminal import show

from .evaluation import (
    EvaluationResult,
    EvaluationSettings,
    LabelNames,
    evaluate_files,
    evaluate_options,
)
from .metrics import SHOWN
from .prepare import NO_ROOMS, Rooms
from .run import train
from .run_files import ADAPTER, BEST, LAST, OPTIONS, RESULTS, TABLE, RunFiles, read_epochs, sizes_of
from .step import TrainOutcome

_logger = get_logger(__name__)
#: The sets that every run has; others are those of features.
_SETS = ("train", "validation", "test")
_KINDS = ("energy", "forces", "stress")


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run: a line of the comparison.

    Attributes:
        name, kind: of the run; the kind is the folder above its own (bits, rank, variant).
        status: ``finished``, ``interrupted``, ``not begun``, or the error it ended with.
        errors: mean absolute errors of the best model, as ``<set>/<target>/<quantity>_mae``, in eV,
            eV/Angstrom and eV/Angstrom^3; energies per atom.
        trainable, adapter_bytes: sizes; None where there is none.
        seconds: of all epochs.
    """

    name: str
    kind: str
    status: str
    errors: dict[str, float]
    trainable: int | None
    adapter_bytes: int | None
    seconds: float


def train_named(
    runs: Sequence[NamedRun],
    source: str | Path,
    *,
    alone: bool,
    check: bool = True,
    rooms: Rooms = NO_ROOMS,
) -> int:
    """Train runs one after the other, each in its folder; or several at once.

    Of several processes (torchrun, srun) each trains a run by itself, and then the next one that is
    left. With ``alone`` they train the one run together.

    A finished run is not run again; an interrupted one goes on where it stopped.

    Args:
        runs: checked.
        source: the file that names them.
        alone: one run was asked for: its error is raised. Else the others are trained, and a
            table compares all, which is written beside the runs as CSV and JSON.
        check: whether each run inspects its data first.
        rooms: what other rooms bring into each run.

    Returns:
        The exit status: 0, 1 if a run failed, 130 if one was interrupted.

    Raises:
        PetFinetuneError: a file that the runs name is missing, or as :func:`~.run.train`.
    """
    check_files(runs)
    begin = partial(train, source=source, check=check, rooms=rooms)
    options = runs[0].loaded.options
    launch = launchers.find_launch(options.training.distributed, options.training.distributed_port)
    device = choose_device(options.device, None if launch is None else launch.local_rank)
    with processes.joined(launch, device):
        setup_logging()
        with nullcontext() if alone else processes.alone():
            status, failed = _train_all(runs, begin, alone)
        found = processes.gathered((status, failed))
        status = max(one for one, _ in found)
        failed = {name: text for _, some in found for name, text in some.items()}
        if not alone and processes.first():
            root = runs[0].folder.parent.parent
            compare(runs, root / Path(source).stem, failed)
    return status


def _dealt(runs: Sequence[NamedRun]) -> Iterator[NamedRun]:
    """The runs in their order; each to whichever of several processes is free first."""
    if processes.everyone() == processes.size():
        yield from runs
        return
    while (number := processes.next_number("runs")) < len(runs):
        yield runs[number]


def _train_all(
    runs: Sequence[NamedRun], begin: Callable[..., TrainOutcome], alone: bool
) -> tuple[int, dict[str, str]]:
    """Train the runs of this process: the exit status, and why those failed that did."""
    failed: dict[str, str] = {}
    for run in _dealt(runs):
        _logger.info("run '%s': %s", run.name, run.folder)
        try:
            with own_folder(run.folder) as path:  # what is there does not change while we look
                if not (_is_finished(run) or _train_rest(run, RunFolder(path), begin)):
                    return 130, failed
        except PetFinetuneError as error:
            if alone:
                raise
            _logger.error("run '%s': %s", run.name, error)
            failed[run.name] = str(error).split("\n", 1)[0]
        finally:
            setup_logging()  # the next run has a log file of its own
    return int(bool(failed)), failed


def _is_finished(run: NamedRun) -> bool:
    """Whether a run is finished; logs this, and changes of its entry."""
    folder = run.folder
    if not (folder / RESULTS).exists():
        return False
    before = read_yaml(folder / OPTIONS) if (folder / OPTIONS).exists() else {}
    for change in changed_options(run.loaded.options, before):
        _logger.warning(
            "run '%s' was trained with %s %s, and its entry says %s now. To train it so, "
            "remove %s or give it another name.",
            run.name, change.name, change.then, change.now, folder,
        )  # fmt: skip
    _logger.info("run '%s' is finished and is not run again", run.name)
    return True


def _train_rest(run: NamedRun, claimed: RunFolder, begin: Callable[..., TrainOutcome]) -> bool:
    """Train one run, or what is left of it; False when it was interrupted."""
    folder = run.folder
    # Of a committee (finetune.ensemble), each member has its own.
    saved = [
        path for path in (folder / LAST, *sorted(folder.glob(f"member_*/{LAST}"))) if path.exists()
    ]
    if not saved:
        RunFiles(folder).start_over()
    restart, notices = saved[0] if saved else None, run.loaded.notices
    return begin(run.loaded.options, claimed, restart=restart, notices=notices).result.finished


def check_files(runs: Sequence[NamedRun]) -> None:
    """Make sure that the files which the runs name exist, before the first of them is trained."""
    problems = []
    for run in runs:
        for setting, path in _files(run.loaded.options):
            if not Path(path).exists() and not (setting == "base_model" and is_address(path)):
                near = [entry.name for entry in Path(path).parent.glob("*")]
                problems.append(
                    f"run '{run.name}': {setting}: '{path}' does not exist."
                    f"{did_you_mean(Path(path).name, near)}"
                )
    if problems:
        raise ConfigError("\n".join(problems), problems)


def _files(options: Options) -> Iterator[tuple[str, str]]:
    if options.finetune.read_from is not None:
        yield "base_model", options.finetune.read_from
    for dataset in options.datasets():
        yield "data", dataset.systems.read_from


def evaluate_named(
    run: NamedRun,
    files: Sequence[str | Path] = (),
    *,
    target: str | None = None,
    device: str | None = None,
    labels: LabelNames,
    how: EvaluationSettings,
) -> EvaluationResult:
    """Errors of a trained run: on files, or on its own validation and test sets.

    Raises:
        ConfigError: the run has no model yet.
    """
    best = run.folder / BEST
    if not best.exists():
        raise ConfigError(
            f"run '{run.name}' has no model yet: there is no {best}. Train it first, with the same "
            "-r and -o: pet-finetune train --config FILE --run-name " + run.name
        )
    if files:
        return evaluate_files(
            best, files, target=target, device=device or "auto", labels=labels, how=how
        )
    options = run.loaded.options
    own = run.folder / OPTIONS
    seed = read_yaml(own).get("seed") if own.exists() else None
    return evaluate_options(options, best, target=target, device=device, seed=seed, how=how)


def compare(
    runs: Sequence[NamedRun], path: Path, failed: dict[str, str] | None = None
) -> list[RunSummary]:
    """Show a table of runs, and write it to ``<path>.csv`` and ``<path>.json``."""
    summaries = [summarize(run, (failed or {}).get(run.name)) for run in runs]
    show(_table(summaries))
    files = RunFiles(path.parent)
    plain = [asdict(summary) for summary in summaries]
    files.write(f"{path.name}.json", json.dumps(plain, indent=2) + "\n")
    rows = [{**row, **summary.errors} for row, summary in zip(plain, summaries, strict=True)]
    for row in rows:
        del row["errors"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(f"{path.name}.csv", text.getvalue())
    _logger.info("the table is in %s.csv and %s.json", path, path)
    return summaries


def summarize(run: NamedRun, error: str | None = None) -> RunSummary:
    """Summary of a run from its files; damaged ones are skipped with a warning."""
    folder = run.folder
    results, errors, sizes = _results(folder / RESULTS)
    begun = (folder / LAST).exists() or (folder / TABLE).exists()
    status = error or ("finished" if results else "interrupted" if begun else "not begun")
    return RunSummary(
        name=run.name,
        kind=folder.parent.name,
        status=status,
        errors=errors,
        trainable=sizes.get("trainable"),
        adapter_bytes=sizes_of(folder).get(ADAPTER),
        seconds=_seconds(folder / TABLE),
    )


def _results(path: Path) -> tuple[bool, dict[str, float], dict[str, int]]:
    """Results of a run: whether there are any, errors by set, target and quantity, parameters."""
    quantities = [f"{kind}_mae" for kind in _KINDS]
    try:
        results = read_object(path)
        errors = {
            f"{name}/{target}/{quantity}": float(value)
            for name, targets in results.get("after", {}).items()
            for target, values in targets.items()
            for quantity, value in values.items()
            if name != "train" and quantity in quantities
        }
        return True, errors, {k: int(v) for k, v in results.get("parameters", {}).items()}
    except FileNotFoundError:
        return False, {}, {}
    except DataError as error:
        _logger.warning("%s", error)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        _logger.warning("'%s' is damaged: it does not hold errors by set (%s)", path, error)
    return True, {}, {}


def _seconds(path: Path) -> float:
    """Sum of the epochs' times in a table; damaged rows do not count."""
    try:
        return round(sum(row.get("seconds", 0.0) for row in read_epochs(path)), 3)
    except FileNotFoundError:
        pass
    except DataError as error:
        _logger.warning("%s", error)
    return 0.0


def _table(summaries: Sequence[RunSummary]) -> Table:
    """Runs as rows; errors of validation and test as they are shown elsewhere."""
    table = Table(title="runs (mean absolute errors of the best model)", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("kind")
    names = dict.fromkeys(name for summary in summaries for name in summary.errors)
    # A line is narrow: of what was forgotten it has the forces, and the files have all.
    columns = [n for n in names if n.startswith(_SETS) or n.endswith("/forces_mae")]
    for name in columns:
        set_name, _, rest = name.partition("/")
        target, _, quantity = rest.rpartition("/")
        kind = quantity.removesuffix("_mae")
        shown = kind if target == "energy" else f"{target} {kind}"
        heading = {"validation": "val."}.get(set_name, set_name)
        table.add_column(f"{heading}\n{shown}\n{SHOWN[kind][1]}", justify="right")
    for heading in ("trained", "adapter", "seconds"):
        table.add_column(heading, justify="right")
    for summary in summaries:
        cells = [
            f"{summary.errors[name] * SHOWN[name.rpartition('/')[2].removesuffix('_mae')][0]:.2f}"
            if name in summary.errors
            else "-"
            for name in columns
        ]
        done = summary.status == "finished"
        table.add_row(
            summary.name if done else f"{summary.name} ({summary.status})",
            summary.kind,
            *cells,
            "-" if summary.trainable is None else f"{summary.trainable:,}",
            "-" if summary.adapter_bytes is None else size_text(summary.adapter_bytes),
            f"{summary.seconds:.1f}",
        )
    return table
