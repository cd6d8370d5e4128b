"""Stopping politely: Ctrl-C and SIGTERM are noted, and acted on between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

#: What Python does with a signal unless it is told to ignore it.
_ACTS: dict[signal.Signals, signal._HANDLER] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class InterruptGuard:
    """While open, the first SIGINT or SIGTERM only sets :attr:`requested`; a second one acts.

    A process that was started with these signals ignored (in the background of a script, under
    nohup, by some batch systems) hears them all the same: whoever sends them means this process. It
    ignores them again when the guard is closed.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
