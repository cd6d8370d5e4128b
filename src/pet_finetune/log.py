"""Logging of the package: one tree of loggers, pretty on a terminal, plain anywhere else.

What repeats is said once: see :class:`_Folding`.
"""

from __future__ import annotations

import io
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from . import processes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: As ``extra`` of a message: it goes to the log file but not to stderr, because the user is shown
#: it in another way.
FILE_ONLY = {"file_only": True}

_ROOT = "pet_finetune"
_PLAIN_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


#: Numbers of a message (of a frame, say), and lists of them; not those inside names of files.
_NUMBERS = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\w)", re.I)
_LISTS = re.compile(r"#(?:, #)+")
#: What messages call files that are made of structures in memory.
shown_names: dict[str, str] = {}
#: So much of a message is repeated where the others like it are counted.
_SHOWN = 60


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Return the logger ``pet_finetune.<name>``; a full module name is taken as it stands."""
    inside = name == _ROOT or name.startswith(f"{_ROOT}.")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")


def setup_logging(level: int | str = "INFO", file: str | Path | None = None) -> logging.Logger:
    """Send the package's log to stderr and, if given, to a file. May be called again.

    Python's warnings go the same way, in one line each. Of warnings that repeat the first is
    written, and the others are counted. Of several processes the first one talks to the user, and
    the one that writes the files of a run writes its log.

    Args:
        level: the lowest level shown, as a name (``"INFO"``) or number.
        file: a log file to append to; its folder is made when missing.

    Raises:
        OSError: if the log file cannot be opened.
    """
    root = logging.getLogger(_ROOT)
    targets: list[logging.Handler] = []
    if processes.leader():
        targets.append(_stream_handler())
        targets[0].addFilter(lambda record: not getattr(record, "file_only", False))
    if file is not None and processes.first():
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _LogFile(path, encoding="utf-8")
        to_file.setFormatter(logging.Formatter(_PLAIN_FORMAT, _DATE_FORMAT))
        targets.append(to_file)
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(_Folding(targets))
    root.setLevel(level.upper() if isinstance(level, str) else level)
    # An application with its own root handler would print every line twice otherwise.
    root.propagate = False
    warnings.showwarning = _log_warning
    return root


class _LogFile(logging.FileHandler):
    """A log file that ends with one line on stderr where the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that the log ends, once, and why."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        if self.filter(record):
            reason = error.strerror or error
            print(f"The log {self.baseFilename} ends here: {reason}.", file=sys.stderr)
            self.addFilter(lambda _: False)

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with suppress(OSError):
            super().close()


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """A warning of Python's (of a library, mostly) as a line of the log."""
    text = " ".join(str(message).split())
    get_logger("warnings").warning("%s: %s (%s:%d)", category.__name__, text, filename, lineno)


@dataclass
class LastLine:
    """Time of the latest log line, in seconds of ``time.monotonic``."""

    #: To stderr, and anywhere.
    shown: float = -math.inf
    any: float = -math.inf


#: The one of this process.
last_line = LastLine()


@dataclass
class _Repeats:
    """Number of repetitions of a message."""

    #: Of which the user knows.
    told: int = 1
    #: Held back since then.
    held: int = 0
    #: The latest of these.
    latest: logging.LogRecord | None = None


class _Folding(logging.Handler):
    """Hands records on to other handlers, but of warnings that repeat only the first and a count.

    A file of a thousand frames makes a thousand warnings that differ in the number of the frame.
    The first is written at once; how many more there were is written before the next message that
    is no warning, and at the end. If a message keeps coming back (once an epoch, say), the count
    is written when it has doubled.
    """

    def __init__(self, targets: Sequence[logging.Handler]) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self._repeats: dict[tuple[str, str], _Repeats] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        if record.levelno != logging.WARNING:
            self._tell(all_of_it=False)
            self._hand_on(record)
            return
        text = _LISTS.sub("#", _NUMBERS.sub("#", record.getMessage()))
        repeats = self._repeats.get((record.name, text))
        if repeats is None:
            self._repeats[record.name, text] = _Repeats()
            self._hand_on(record)
        else:
            repeats.held += 1
            repeats.latest = record

    def close(self) -> None:
        """Write what is held back, then close the handlers."""
        self._tell(all_of_it=True)
        for target in self.targets:
            target.close()
        super().close()

    def _tell(self, *, all_of_it: bool) -> None:
        """Write how many records were held back."""
        for repeats in self._repeats.values():
            latest = repeats.latest
            if latest is None or not (all_of_it or repeats.held >= repeats.told):
                continue
            if repeats.held > 1:
                text = latest.getMessage()
                shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN].rstrip()}..."
                message = {"msg": "%d more warnings like this: %s", "args": (repeats.held, shown)}
                latest = logging.makeLogRecord({**latest.__dict__, **message})
            self._hand_on(latest)
            repeats.told += repeats.held
            repeats.held, repeats.latest = 0, None

    def _hand_on(self, record: logging.LogRecord) -> None:
        last_line.any = now = time.monotonic()
        if not getattr(record, "file_only", False):
            last_line.shown = now
        for path, name in shown_names.items():
            if path in (text := record.getMessage()):
                changed = {"msg": text.replace(path, name), "args": ()}
                record = logging.makeLogRecord({**record.__dict__, **changed})
        for target in self.targets:
            target.handle(record)


@cache
def stderr_console() -> Console:
    """The shared rich console of stderr, so that log lines and progress bars do not collide."""
    from rich.console import Console

    return Console(stderr=True)


def html_of(content: RenderableType) -> str:
    """Output of rich as HTML for a notebook."""
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=110, markup=False, emoji=False)
    console.print(content)
    style = "line-height: 1.2; font-family: monospace; background: #fff; color: #000"
    return console.export_html(
        inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>'
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; a program without a console has none."""
    return stream is not None and stream.isatty()


def _stream_handler() -> logging.Handler:
    """A rich handler when stderr is a terminal, plain lines otherwise (files, batch queues)."""
    if is_terminal(sys.stderr):
        from rich.logging import RichHandler

        rich_handler = RichHandler(
            console=stderr_console(), show_path=False, markup=False, rich_tracebacks=True
        )
        rich_handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
        return rich_handler
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter(_PLAIN_FORMAT, _DATE_FORMAT))
    return plain
