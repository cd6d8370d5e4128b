"""Fine-tuning with the features of all rooms, and its result for a script."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.adapters.at_rest import Adapter
from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.calculator import PETCalculator
from pet_finetune.checkpoint.opening import load, open_committee
from pet_finetune.committee.committee import Committee
from pet_finetune.config.run_options import Options
from pet_finetune.errors import CheckpointError, ConfigError
from pet_finetune.export.export import check_output_of_run, export_model, export_table
from pet_finetune.inspection.inspection import Preflight, read_checked
from pet_finetune.launchers import find_launch
from pet_finetune.log import get_logger, html_of
from pet_finetune.pretraining.stages import pretrained
from pet_finetune.report.curves import curves_html, plot_curves
from pet_finetune.report.report_file import report_or_warn
from pet_finetune.report.run_record import RunRecord, read_run
from pet_finetune.terminal import show
from pet_finetune.training import compare_runs, run
from pet_finetune.training.feature import Feature
from pet_finetune.training.prepare import Rooms
from pet_finetune.training.profile import profile_run
from pet_finetune.training.resume import plain_errors
from pet_finetune.training.run_files import ADAPTER, BEST
from pet_finetune.training.step import TrainOutcome

# Packages with features of training that no other code names: deleting one takes its features away.
_FEATURE_ROOMS = ("pet_finetune.forgetting",)


def features_of_rooms() -> list[Feature]:
    """The features of the rooms above training, as far as they are there."""
    there = [name for name in _FEATURE_ROOMS if importlib.util.find_spec(name) is not None]
    return [one for name in there for one in importlib.import_module(name).features()]


#: What takes part in every run that is begun here.
ROOMS = Rooms(
    features=features_of_rooms,
    inspect=lambda: [Preflight()],
    read=read_checked,
    report=report_or_warn,
    start=pretrained,
)


def train(
    options: Options,
    folder: str | Path | None = None,
    *,
    output: Path | None = None,
    **settings: Any,
) -> TrainOutcome:
    """Train as the options say; see :func:`pet_finetune.training.run.train`.

    Args:
        options: checked ones.
        folder: of the run.
        output: a file to export the model to at the end, ``model.pt``, or
            ``model.ckpt`` for metatrain.
        settings: more arguments of that function.

    Raises:
        PetFinetuneError: any bad input; of ``output`` before the run starts.
    """
    if output is not None:
        check_output_of_run(options, output)
    outcome = run.train(options, folder, rooms=ROOMS, **settings)
    launch = find_launch(options.training.distributed, options.training.distributed_port)
    if output is not None and outcome.result.finished and (launch is None or launch.rank == 0):
        together = options.is_committee
        source = options.finetune.read_from if together else outcome.folder / BEST
        written = export_model(source or "", output, adapter=outcome.folder if together else None)
        show(export_table(written))
    return outcome


def train_as_told(job: Path) -> TrainOutcome:
    """Training in each process of ``device: 4``; see :mod:`pet_finetune.training.run`."""
    return run.train_as_told(job, train)


train_named = partial(compare_runs.train_named, rooms=ROOMS)
profile = partial(profile_run, rooms=ROOMS)


_logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """Result of fine-tuning. A notebook shows its table of errors and learning curves.

    Attributes:
        model: the best model, adapter merged; of an ensemble, the committee.
        adapter: its adapter; None for methods without one, and for an ensemble.
        table: errors of the starting and the best model, for printing; None without any.
        errors: the same as numbers in eV, Å and the targets' units, ``"before"`` and ``"after"``,
            by set, target and name: ``errors["after"]["test"]["energy"]["forces_mae"]``.
        history: the columns of ``train.csv`` over the epochs, NaN where a cell is empty: a pandas
            ``DataFrame`` if pandas is installed, else a dictionary of arrays ``[n_epochs]``. The
            members of an ensemble follow each other and have a column ``member``.
        finished: False if the run was interrupted; the model is then the best one so far.
        folder: folder of the run's files; None if removed.
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

    def plot(self) -> Any:
        """The learning curves as a matplotlib ``Figure``: loss, errors, learning rate.

        Raises:
            PetFinetuneError: matplotlib is not installed.
        """
        return plot_curves(self._record)

    def _repr_html_(self) -> str:
        """The table and the curves, for notebooks."""
        table = "" if self.table is None else html_of(self.table)
        return table + curves_html(self._record)


def result_of(outcome: TrainOutcome, options: Options, folder: Path | None) -> FinetuneResult:
    """Result of a run, read from its files.

    Args:
        outcome: of the run.
        options: of the run.
        folder: what the caller keeps of it; None where the files will be removed.

    Raises:
        ConfigError: an ensemble was interrupted.
        CheckpointError: the run was interrupted before there was a model.
    """
    place = outcome.folder
    errors = {"before": plain_errors(outcome.before), "after": plain_errors(outcome.after)}
    record = read_run(place)
    adapter = None
    if options.is_committee:
        if not outcome.result.finished:
            raise ConfigError(f"finetune: interrupted; the members so far are in '{place}'.")
        base = options.finetune.read_from or ""
        found: AdaptedPotential | Committee = open_committee(base, place)
        calculator = partial(PETCalculator, base, adapters=place)
    else:
        if not (place / BEST).exists():
            raise CheckpointError(
                "finetune: interrupted before the first epoch; there is no model."
            )
        found = load(place / BEST)
        adapter = read_adapter(place / ADAPTER) if (place / ADAPTER).is_dir() else None
        calculator = partial(PETCalculator, found)
    if folder is None:
        _logger.info("The run had no folder of its own (folder=...): its files are removed now.")
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
