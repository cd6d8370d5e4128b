"""The outcome of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .records import TrainingResult
from .resume import Errors


@dataclass(frozen=True)
class TrainOutcome:
    """What a run gave.

    Attributes:
        folder: its files.
        result: how it ended; of an ensemble, how its last member did.
        before, after: errors of the starting model and the best one (or the committee), by set and
            target; empty for an interrupted run, or without ``final_eval``.
        table: of these errors, as it was printed; None where there are none.
    """

    folder: Path
    result: TrainingResult
    before: Errors
    after: Errors
    table: Table | None = None
