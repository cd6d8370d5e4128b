"""Tables and progress on the terminal, and the handling of Ctrl-C.

Whatever may take long is done while a :class:`Watch` is open: a bar, or a line each minute in a
log. All open ones share one place on the terminal, in which the innermost is seen. Ctrl-C and
SIGTERM are noted, and acted on between two steps.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING

from . import processes
from .log import FILE_ONLY, get_logger, is_terminal, last_line, stderr_console

if TYPE_CHECKING:  # rich takes a while, and --help needs none of it
    from rich.console import RenderableType
    from rich.progress import Progress
    from rich.table import Table

#: The eye needs no more, drawing takes time from the steps, and numbers to show from a GPU's queue.
REDRAWS_PER_SECOND = 4
#: Seconds without a sign after which a bar is drawn, and a line is written.
_SILENCE, _LINE = 1.0, 60.0


def _in_notebook() -> bool:
    """Whether rich can draw a bar in a notebook: under Jupyter, with ipywidgets."""
    if "ipykernel" not in sys.modules:
        return False
    return stderr_console().is_jupyter and find_spec("ipywidgets") is not None


def _draws() -> bool:
    """Whether this process shows bars on stderr."""
    # Of several that a launcher started, before they have met, each takes itself for the leader.
    leads = processes.leader() and os.environ.get("RANK", "0") == "0"
    return leads and (is_terminal(sys.stderr) or _in_notebook())


def _new_bar() -> Progress:
    """A bar between what is done and how far it is, with the time that is left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[words]}", markup=False),
        TimeRemainingColumn(),
        console=stderr_console(),
        transient=True,
        refresh_per_second=REDRAWS_PER_SECOND,
        # What is printed goes above the bar, unless it goes elsewhere.
        redirect_stdout=sys.stdout.isatty(),
    )


class Watch:
    """Something that may take long, shown while it is open.

    It is shown once nothing has been said for a second; what is done before shows nothing.

    Args:
        what: what is done, e.g. ``reading train.xyz``; where that changes, a function of nothing.
        unit: what is counted, e.g. ``frames``.
        total: how many there are, where that is known.
    """

    def __init__(
        self, what: str | Callable[[], str], unit: str = "", total: int | None = None
    ) -> None:
        self._what, self._unit, self.total = what, unit, total
        self.done = 0
        self._began = time.monotonic()

    def __enter__(self) -> Watch:
        self._began = time.monotonic()
        _screen.open(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _screen.close(self)

    def step(self, count: int = 1) -> None:
        """Count more steps as done."""
        self.done += count

    @property
    def what(self) -> str:
        """Name of the work."""
        return self._what if isinstance(self._what, str) else self._what()

    @property
    def counts(self) -> str:
        """Count of the done steps; empty if nothing is counted."""
        if not self._unit:
            return ""
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{self.done:,}{of} {self._unit}"

    @property
    def seconds(self) -> float:
        """Since it was opened."""
        return time.monotonic() - self._began


class _Screen:
    """Shows the innermost open watch, from a thread of its own.

    So a call that takes long is seen too.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: list[Watch] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Progress | None = None
        #: How often the terminal was given away.
        self._hidden = 0
        #: When the last sign was given, and when the last watch of a row of them was closed.
        self._signed = self._left = -math.inf
        #: When a row of watches began, and when a line was written of it.
        self._since = self._wrote = -math.inf

    def open(self, watch: Watch) -> None:
        """Show a watch in place of those that are open."""
        with self._lock:
            self._open.append(watch)
            if len(self._open) > 1:
                return
            now = time.monotonic()
            if now - self._left > _SILENCE:  # else the silence before goes on
                self._since = now
            self._ended = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(self._ended,), name="progress", daemon=True
            )
            self._thread.start()

    def close(self, watch: Watch) -> None:
        """Show it no more."""
        with self._lock:
            if watch in self._open:  # not where this process was forked since
                self._open.remove(watch)
            if self._open or self._thread is None:
                return
            self._left = time.monotonic()
            self._ended.set()
            thread, self._thread = self._thread, None
            self.clear()
        thread.join()

    def clear(self) -> None:
        """Take what watches draw from the terminal, before something is printed."""
        with self._lock:
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave the terminal to other processes while the context is open."""
        with self._lock:
            self.clear()
            self._hidden += 1
        try:
            yield
        finally:
            with self._lock:
                self._hidden -= 1
                self._signed = time.monotonic()

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(1 / REDRAWS_PER_SECOND):
            with self._lock:
                if not ended.is_set():
                    self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Draw, or write a line, if it is time."""
        if self._hidden:
            return
        watch = self._open[-1]
        draws = _draws()
        if draws:
            said = max(self._signed, self._since, last_line.shown)
            if self._bar is not None or now - said >= _SILENCE:
                self._draw(watch)
        if now - max(self._wrote, self._since, last_line.any) >= _LINE:
            words = [watch.what, watch.counts, f"for {watch.seconds:.0f} s"]
            extra = FILE_ONLY if draws else None
            self._wrote = now  # also where no log is kept
            get_logger().info("%s", ", ".join(word for word in words if word), extra=extra)

    def _draw(self, watch: Watch) -> None:
        from rich.errors import LiveError

        if self._bar is None:
            bar = _new_bar()
            try:
                bar.start()
            except LiveError:  # the caller draws something
                return
            self._bar, self._task = bar, bar.add_task("", total=None, words="")
            self._drawn: Watch | None = None
        if self._drawn is not watch:
            self._drawn = watch
            self._bar.reset(self._task, total=watch.total)
        self._signed = time.monotonic()
        shown = watch.counts or f"{watch.seconds:.0f} s"
        self._bar.update(
            self._task, total=watch.total, description=watch.what, completed=watch.done, words=shown
        )


_screen = _Screen()
clear, handed_over = _screen.clear, _screen.hidden

if hasattr(os, "register_at_fork"):  # in the child there is no thread, and nothing is drawn
    os.register_at_fork(after_in_child=lambda: vars(_screen).update(vars(_Screen())))


#: What Python does with a signal unless it is told to ignore it.
_ACTS: dict[signal.Signals, signal._HANDLER] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


#: What batch systems are asked to send before the end (SLURM's --signal), and what a terminal sends
#: that is closed. A script may have a use of its own for them; nohup ignores the last.
_WARNINGS = [
    getattr(signal, name) for name in ("SIGUSR1", "SIGXCPU", "SIGHUP") if hasattr(signal, name)
]


class InterruptGuard:
    """While open, the first SIGINT or SIGTERM only sets :attr:`requested`; a second one acts.

    So do SIGUSR1, SIGXCPU and SIGHUP where they would end the process.

    A process that was started with the first two ignored (in the background of a script, under
    nohup, by some batch systems) handles them too while the guard is open, because they are sent
    to this process on purpose.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            deadly = [n for n in _WARNINGS if signal.getsignal(n) == signal.SIG_DFL]
            for number in (signal.SIGINT, signal.SIGTERM, *deadly):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore(deaf=False)

    def _restore(self, deaf: bool = True) -> None:
        """Give the handlers back; those that ignore a signal only if ``deaf``."""
        for number, handler in self._before.items():
            acts = deaf or handler != signal.SIG_IGN
            signal.signal(number, handler if acts else _ACTS[signal.Signals(number)])

    def __exit__(self, *exception: object) -> None:
        self._restore()


_WIDTH = 110  # where there is no terminal


def table_text(table: Table) -> str:
    """A table as plain lines."""
    from rich.console import Console

    console = Console(width=_WIDTH, no_color=True, force_terminal=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def print_rich(content: RenderableType) -> None:
    """Print a table or the like to standard output, names in brackets as they are."""
    if sys.stdout is None:  # it was closed
        return
    from rich.console import Console

    clear()
    width = None if is_terminal(sys.stdout) else _WIDTH
    for column in getattr(content, "columns", ()):  # of a table: no name is cut off
        column.overflow = "fold"
    with suppress(SystemExit):  # rich's, where the reader has gone (| head): it ends no run
        Console(file=sys.stdout, width=width, markup=False, emoji=False).print(content)


def show(table: Table) -> str:
    """Print a table to standard output, once of several processes; return it as plain text."""
    if processes.leader():
        print_rich(table)
    return table_text(table)


def facts_table(title: object, facts: Mapping[str, str]) -> Table:
    """Table of bold names and their values."""
    from rich.table import Table

    table = Table(title=str(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(name, text)
    return table
