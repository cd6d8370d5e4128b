"""What is shown while something goes on; tables hold the names of files as they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from logs import logging_as_it_was
from pet_finetune import log, terminal
from pet_finetune.log import LastLine, get_logger, setup_logging
from pet_finetune.terminal import Watch, facts_table, show


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    line = LastLine()
    monkeypatch.setattr(log, "last_line", line)
    monkeypatch.setattr(terminal, "last_line", line)
    with logging_as_it_was():
        yield


class Clock:
    """The time that the look of a screen takes it for, second by second, in no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.screen = terminal._Screen()
        monkeypatch.setattr(self.screen, "_run", lambda ended: None)
        monkeypatch.setattr(terminal, "_screen", self.screen)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def pass_by(self, seconds: int) -> None:
        """So many seconds go by."""
        for _ in range(seconds):
            self.now += 1.0
            self.screen._look(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split("INFO")[1].strip() for line in capsys.readouterr().err.splitlines()]


def test_a_log_has_a_line_each_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    with Watch("reading big.xyz", "frames", 5000) as watch:
        for _ in range(300):
            watch.step(10)
            clock.pass_by(1)
    assert lines_of(capsys) == [
        f"reading big.xyz, {600 * k:,} of 5,000 frames, for {60 * k} s" for k in range(1, 6)
    ]


def test_what_is_short_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    with Watch("reading quick.xyz", "frames"):
        clock.pass_by(59)
    assert lines_of(capsys) == []


def test_short_things_one_after_the_other_are_no_silence(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    for number in range(10):
        with Watch(f"part {number}"):
            clock.pass_by(20)
    assert lines_of(capsys) == ["part 2, for 20 s", "part 5, for 20 s", "part 8, for 20 s"]


def test_a_line_of_another_kind_is_a_sign_too(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    with Watch("working"):
        clock.pass_by(50)
        get_logger().info("half")
        clock.pass_by(50)
        assert lines_of(capsys) == ["half"]
        clock.pass_by(10)
    assert lines_of(capsys) == ["working, for 110 s"]


def test_the_innermost_is_told_and_then_what_it_is_part_of(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    with Watch("the whole"):
        with Watch("a part"):
            clock.pass_by(60)
        clock.pass_by(60)
    assert lines_of(capsys) == ["a part, for 60 s", "the whole, for 120 s"]


def test_nothing_is_told_while_other_processes_tell(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    with Watch("waiting"):
        with clock.screen.hidden():
            clock.pass_by(100)
        assert lines_of(capsys) == []


def test_a_thread_shows_and_ends(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    setup_logging()
    monkeypatch.setattr(terminal, "_LINE", 0.01)
    with Watch("reading big.xyz"):
        deadline = time.monotonic() + 30.0
        while "reading big.xyz, for" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "progress" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_shows_what_it_does_itself() -> None:
    code = (
        "import os, sys, time\n"
        "from pet_finetune import terminal\n"
        "with terminal.Watch('outside'):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        with terminal.Watch('inside'):\n"
        "            sys.exit(0 if terminal._screen._thread.is_alive() else 1)\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


_SILENT = """
import sys, time
from pet_finetune import log, terminal
log.setup_logging()
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))
if "watched" in sys.argv:
    with terminal.Watch("the whole"):
        work(0.6)
        for number in range(4):
            with terminal.Watch(f"part {number}", "steps", 10) as watch:
                watch.step(5)
                work(0.6)
else:
    work(2.5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_a_terminal_is_never_silent(tmp_path, watched) -> None:
    from terminal import listen

    command = [sys.executable, "-c", _SILENT, *["watched"] * watched]
    heard = listen(command, tmp_path)
    assert heard.status == 0, heard.text
    assert (heard.longest.processor < 2.0) == watched, heard.longest
    assert ("5 of 10 steps" in heard.text) == watched


def test_names_in_brackets_are_no_markup(capsys):
    text = show(facts_table("[/b] :smile:.xyz", {"[red]": "[/x]"}))
    for said in (text, capsys.readouterr().out):
        assert "[/b] :smile:.xyz" in said
        assert "[red]" in said
        assert "[/x]" in said


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert "name" in show(facts_table("", {"name": "value"}))
