"""Workers: processes that measure when they are asked to, and otherwise sleep.

A request is a line of JSON on the worker's stdin, ``{"do": METHOD, ...arguments}``, the answer a
line of JSON on its stdout. Whatever the measured tool prints goes to the worker's log instead.
A worker that waits is blocked on reading, so it takes nothing from the one that measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_LOG_LINES_SHOWN = 25


def serve(target: object) -> None:
    """Answer requests with the methods of ``target`` until stdin ends."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # prints go where the log goes
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(target, request.pop("do"))(**request)
            answers.write(json.dumps(answer) + "\n")


class WorkerError(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """The parent's end of a worker; a context manager that ends it.

    Args:
        command: starts the worker.
        environment: of the worker.
        folder: the worker's working directory.
        log: takes what the worker prints.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        self._log = log
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            env=environment,
            cwd=folder,
            text=True,
            bufsize=1,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the worker's method ``do`` returns.

        Raises:
            WorkerError: the worker failed; with the end of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            end = "\n".join(self._log.read_text().splitlines()[-_LOG_LINES_SHOWN:])
            raise WorkerError(f"The worker ended with {code} at '{do}'; {self._log}:\n{end}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # a request that a dead worker never took
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
