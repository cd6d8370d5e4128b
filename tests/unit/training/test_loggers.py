"""The progress bar is not redrawn at every step, but always at an epoch's end; lines in between."""

from __future__ import annotations

import io
import logging
from contextlib import closing

import pytest
from rich.console import Console

from pet_finetune import log
from pet_finetune.training import loggers
from pet_finetune.training.loggers import RunDisplay
from pet_finetune.training.step import StepProgress


@pytest.fixture
def display(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(log, "stderr_console", lambda: console)
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True)
    with closing(RunDisplay(num_epochs=2, log_interval=1)) as made:
        yield made


def completed(display):
    return display._bar.tasks[0].completed


def test_the_bar_moves_a_few_times_a_second_and_to_the_end_of_an_epoch(display, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now)
    display.step_ended(StepProgress(1, 4, 0.5, {}, 10.0))
    assert completed(display) == 1
    display.step_ended(StepProgress(2, 4, 0.5, {}, 10.0))  # too soon
    assert completed(display) == 1
    now += 1.0
    display.step_ended(StepProgress(3, 4, 0.5, {}, 10.0))
    assert completed(display) == 3
    display.step_ended(StepProgress(4, 4, 0.5, {}, 10.0))  # soon, but the last one
    assert completed(display) == 4


def test_without_a_terminal_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: False)
    with closing(RunDisplay(num_epochs=2, log_interval=1)) as made:
        made.step_ended(StepProgress(1, 4, 0.5, {}, 10.0))
    assert made._bar is None


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_epoch_writes_a_line_each_minute(monkeypatch, caplog, terminal):
    monkeypatch.setattr(logging.getLogger("pet_finetune"), "propagate", True)
    now = 1000.0
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now)
    if terminal:
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        monkeypatch.setattr(log, "stderr_console", lambda: console)
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: terminal)
    with caplog.at_level("INFO"), closing(RunDisplay(num_epochs=10, log_interval=1)) as made:
        for batch in range(1, 121):
            now += 1.5
            made.step_ended(StepProgress(batch, 120, 0.5, {}, 10.0))
    assert [record.message for record in caplog.records] == [
        "epoch  1/10, batch  40 of 120 | loss 0.5 | train  | 10 structures/s",
        "epoch  1/10, batch  80 of 120 | loss 0.5 | train  | 10 structures/s",
    ]
    # The bar says it already; the log file has no bar.
    assert {getattr(record, "file_only", False) for record in caplog.records} == {terminal}
