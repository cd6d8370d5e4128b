"""What the commands ``train`` and ``eval`` do, as functions that a script can call."""

from __future__ import annotations

from .evaluate import (
    EvaluationResult,
    EvaluationSettings,
    LabelNames,
    evaluate_datasets,
    evaluate_files,
    evaluate_options,
)
from .outcome import TrainOutcome
from .profile import profile_run
from .train import train

__all__ = [
    "EvaluationResult",
    "EvaluationSettings",
    "LabelNames",
    "TrainOutcome",
    "evaluate_datasets",
    "evaluate_files",
    "evaluate_options",
    "profile_run",
    "train",
]
