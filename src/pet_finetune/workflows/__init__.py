"""What the commands do, as functions that a script can call."""

from __future__ import annotations

from .evaluate import EvaluationResult, evaluate_files, evaluate_options
from .export import export_model
from .info import describe_checkpoint
from .outcome import TrainOutcome
from .profile import profile_run
from .report import write_report
from .train import train

__all__ = [
    "EvaluationResult",
    "TrainOutcome",
    "describe_checkpoint",
    "evaluate_files",
    "evaluate_options",
    "export_model",
    "profile_run",
    "train",
    "write_report",
]
