"""Training with the features of all rooms, as the command line begins it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pet_finetune.config.named_run_options import NamedRun
from pet_finetune.config.run_options import Options
from pet_finetune.export.export import check_output_of_run, export_model, export_table
from pet_finetune.inspection.inspection import Preflight, read_checked
from pet_finetune.launchers import find_launch
from pet_finetune.pretraining.stages import pretrained
from pet_finetune.printing import show
from pet_finetune.report.report_file import report_or_warn
from pet_finetune.training import compare_runs, run
from pet_finetune.training.feature import Feature
from pet_finetune.training.prepare import Rooms
from pet_finetune.training.profile import TrainingProfile, profile_run
from pet_finetune.training.records import TrainOutcome
from pet_finetune.training.run_files import BEST

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
    """What each process does that ``device: 4`` started; :mod:`pet_finetune.training.run`."""
    return run.train_as_told(job, train)


def train_named(runs: Sequence[NamedRun], source: str | Path, **settings: Any) -> int:
    """Train named runs; see :func:`pet_finetune.training.compare_runs.train_named`."""
    return compare_runs.train_named(runs, source, rooms=ROOMS, **settings)


def profile(
    options: Options, folder: str | Path | None, steps: int, **settings: Any
) -> TrainingProfile:
    """Time a few steps; see :func:`pet_finetune.training.profile.profile_run`."""
    return profile_run(options, folder, steps, rooms=ROOMS, **settings)
