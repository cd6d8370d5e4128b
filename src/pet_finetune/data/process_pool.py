"""A pool of processes that work for a function, whose results come back in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any, TypeVar

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], inputs: Iterable[T], workers: int) -> Generator[R]:
    """What a function gives for each input, in their order, computed by several processes.

    They begin with an empty memory (``spawn``), end with this process however it ends, and do not
    hear Ctrl-C, which this one acts on. What they log is logged here.

    Args:
        function: can be pickled.
        inputs: taken a few ahead of the results.
        workers: number of processes; below 2 this one computes.

    Raises:
        DataError: a process was killed.
    """
    if workers < 2:
        yield from map(function, inputs)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _begin)
    waiting: deque[Future[tuple[R, list[logging.LogRecord]]]] = deque()
    try:
        for one in inputs:
            waiting.append(_submitted(pool, function, one))
            if len(waiting) > 2 * workers:
                yield _told(waiting.popleft())
        while waiting:
            yield _told(waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError(
            "A process that prepares frames was killed, probably by the system because memory ran "
            "out. Go on with the same command and fewer processes (--workers 1)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, function: Callable[[T], R], one: T) -> Future[Any]:
    """Hand work out; a process that starts for it inherits that SIGINT is blocked."""
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(_heard, function, one)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_heard, function, one)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _told(future: Future[tuple[R, list[logging.LogRecord]]]) -> R:
    """The result, once what the process logged is logged here."""
    result, records = future.result()
    for record in records:
        logger = get_logger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    return result


#: What was logged in a process of the pool, until it is asked for.
_said: SimpleQueue[logging.LogRecord] = SimpleQueue()


def _begin() -> None:
    """Prepare a process of the pool."""
    root = get_logger()
    root.addHandler(QueueHandler(_said))
    root.setLevel(logging.INFO)
    root.propagate = False
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _heard(function: Callable[[T], R], one: T) -> tuple[R, list[logging.LogRecord]]:
    result = function(one)
    return result, [_said.get() for _ in range(_said.qsize())]
