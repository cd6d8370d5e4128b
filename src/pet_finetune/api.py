"""The Python door: what the command line calls, and what a script or a notebook can call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pet_finetune.checkpoint.info import describe_checkpoint
from pet_finetune.config import Options
from pet_finetune.config.named_runs import NamedRun
from pet_finetune.export.export import export_model
from pet_finetune.forgetting import forgetting_features
from pet_finetune.inspection.preflight import Preflight, read_checked
from pet_finetune.report.write import report_or_warn, write_report
from pet_finetune.training import named_runs, profile_run, run
from pet_finetune.training.evaluate import (
    EvaluationResult,
    EvaluationSettings,
    LabelNames,
    evaluate_datasets,
    evaluate_files,
    evaluate_options,
)
from pet_finetune.training.outcome import TrainOutcome
from pet_finetune.training.prepare import Rooms
from pet_finetune.training.profile import TrainingProfile

__all__ = [
    "ROOMS",
    "EvaluationResult",
    "EvaluationSettings",
    "LabelNames",
    "TrainOutcome",
    "describe_checkpoint",
    "evaluate_datasets",
    "evaluate_files",
    "evaluate_options",
    "export_model",
    "profile",
    "train",
    "train_named",
    "write_report",
]

#: What takes part in every run that is begun here.
ROOMS = Rooms(
    features=forgetting_features,
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
