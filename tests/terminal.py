"""Commands on a terminal: when they said something, and how long they were silent."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Silence:
    """A time in which a command said nothing.

    Attributes:
        seconds: by the clock.
        processor: seconds of processor time of the command, children that ended included: what is
            left of a silence on a machine where other things run.
        after, before: what was said last, and next.
    """

    seconds: float
    processor: float
    after: str
    before: str


@dataclass(frozen=True)
class Heard:
    """What a command on a terminal did."""

    status: int
    text: str
    silences: tuple[Silence, ...]

    @property
    def longest(self) -> Silence:
        """The silence that took most processor time."""
        return max(self.silences, key=lambda silence: silence.processor)


def listen(command: Sequence[str], cwd: Path, timeout: float = 300.0) -> Heard:
    """Run a command with stdout and stderr on a terminal of its own, and note when it writes."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=cwd, env=environment
    )
    os.close(theirs)
    began = last = time.monotonic()
    used, said, words = 0.0, b"", "the start"
    silences = []
    try:
        while True:
            if not select.select([ours], [], [], 0.1)[0]:
                assert time.monotonic() - began < timeout, f"still running after {timeout} s"
                continue
            try:
                new = os.read(ours, 65536)
            except OSError:  # Linux says so that nobody holds the other end any more
                new = b""
            now, using = time.monotonic(), _processor_time(process.pid)
            next_words = _plain(new)[-60:] or "the end"
            silences.append(Silence(now - last, max(0.0, using - used), words, next_words))
            if not new:
                break
            said, last, used, words = said + new, now, max(using, used), next_words
    finally:
        process.kill()
        os.close(ours)
    return Heard(process.wait(), _plain(said), tuple(silences))


def _plain(said: bytes) -> str:
    return _CONTROL.sub(b"", said).decode(errors="replace").strip()


def _processor_time(pid: int) -> float:
    """Seconds that a process and those of its children that have ended took; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
