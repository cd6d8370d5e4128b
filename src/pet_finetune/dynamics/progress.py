"""Showing how a simulation goes: a bar on a terminal, a line every tenth of it elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import TextColumn

from pet_finetune.log import get_logger
from pet_finetune.progress import REDRAWS_PER_SECOND, progress_bar, start_bar, stop_bar

from .measure import Measurement

__all__ = ["MDDisplay"]

_logger = get_logger(__name__)
_LINES = 10


class MDDisplay:
    """Shows steps of a simulation.

    Args:
        steps: in all.
        done: where a run that goes on begins.
        atoms: how many there are.
    """

    def __init__(self, steps: int, done: int, atoms: int) -> None:
        self._steps, self._done, self._atoms = steps, done, atoms
        self._first: float | None = None
        self._began = self._moved = time.monotonic()
        self._bar = progress_bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[words]}"),
        )

    def __enter__(self) -> MDDisplay:
        if self._bar is not None:
            start_bar(self._bar)
            self._task = self._bar.add_task("md", total=self._steps, completed=self._done, words="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            stop_bar(self._bar)

    def step(self, row: Measurement) -> None:
        """Show a step, unless one was shown only just now."""
        if row.conserved is not None and self._first is None:
            self._first = row.conserved
        now = time.monotonic()
        last = row.step >= self._steps
        if self._bar is not None and (last or now - self._moved > 1 / REDRAWS_PER_SECOND):
            self._moved = now
            self._bar.update(self._task, completed=row.step, words=self._words(row, now))
        tenth = self._steps // _LINES
        if last or (tenth and row.step % tenth == 0 and row.step > self._done):
            _logger.info("step %d/%d | %s", row.step, self._steps, self._words(row, now))

    def _words(self, row: Measurement, now: float) -> str:
        parts = [f"{row.temperature:.0f} K"]
        if row.conserved is not None and self._first is not None:
            drift = 1000.0 * (row.conserved - self._first) / self._atoms
            parts.append(f"conserved energy {drift:+.2f} meV/atom")
        if row.volume is not None and row.pressure is not None:
            parts.append(f"{row.volume:.0f} A^3, {row.pressure:.2f} GPa")
        if row.forces_uncertainty is not None:
            parts.append(f"uncertainty {1000.0 * row.forces_uncertainty:.0f} meV/A")
        elif row.energy_uncertainty is not None:
            sure = 1000.0 * row.energy_uncertainty / self._atoms
            parts.append(f"uncertainty {sure:.1f} meV/atom")
        rate = (row.step - self._done) / max(now - self._began, 1e-9)
        parts.append(f"{rate:.1f} steps/s")
        return " | ".join(parts)
