"""The processes of a run: rank, communication, and a common end.

Several processes train one model (see :mod:`pet_finetune.training.step`). A launcher starts
them: torchrun, SLURM's srun, or this package itself for ``device: 4``. Outside of :func:`joined`
there is one process, and every function here does nothing.

A process that fails says so in a store that all of them see; one that is killed no longer counts
there. A thread in each of the others looks, says what happened, and ends its process: none waits
for ever for one that is gone.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, PetFinetuneError, TrainingError
from .launchers import Launch

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: Where a process that this package started leaves the text of its error for who started it.
ERROR_FILE = "PET_FINETUNE_ERROR_FILE"

_logger = logging.getLogger("pet_finetune.processes")
_BEAT, _SILENCE, _SUSPICIOUS_SILENCE = 2.0, 40.0, 12.0  # seconds
_TO_MEET = 300.0
_FIRST_GONE = "process 0 is gone"
#: So long the process that failed, and then the first one, have to say why.
_TO_TELL = 1.0
# Nothing that all processes do together takes longer; those that are gone are noticed otherwise.
_TO_WAIT = 6 * 3600.0


class _World:
    """The processes that train together, as one of them sees them."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        import torch
        from torch import distributed
        from torch.distributed import (  # type: ignore[attr-defined]
            PrefixStore,
            TCPStore,
            rendezvous,
        )

        self.launch = launch
        self.alone = False
        os.environ |= {
            "MASTER_ADDR": launch.address, "MASTER_PORT": str(launch.port),
            "RANK": str(launch.rank), "WORLD_SIZE": str(launch.size),
        }  # fmt: skip
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            found = rendezvous("env://", timeout=timedelta(seconds=_TO_MEET))
            store, rank, size = next(iter(found))
            distributed.init_process_group(
                backend, store=store, rank=rank, world_size=size,
                timeout=timedelta(seconds=_TO_WAIT),
            )  # fmt: skip
            # A connection of its own: a call that waits would hold back the other's.
            own = TCPStore(
                launch.address, launch.port, is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=_TO_MEET),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"Process {launch.rank} of {launch.size}, started by {launch.by}, did not meet "
                f"the others at {launch.address}:{launch.port} within {_TO_MEET:.0f} s: {error}. "
                "Look whether all of them were started, whether the port is free "
                "(distributed_port), and whether the hosts reach each other."
            ) from error
        self.store = PrefixStore("pet_finetune", own)
        self.watch = _Watch(self)
        self.watch.start()

    def leave(self) -> None:
        """End the common work of all: nobody goes before all are done."""
        from torch import distributed

        distributed.barrier()
        self.watch.stop()
        distributed.barrier()
        distributed.destroy_process_group()


class _Watch(threading.Thread):
    """Gives signs of life, and ends the process when another one is gone."""

    def __init__(self, world: _World) -> None:
        super().__init__(daemon=True, name="watch")
        self._world, self._stopped = world, threading.Event()
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        #: Set while the process's own error is told.
        self.failing = threading.Event()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def run(self) -> None:
        """Look every two seconds."""
        while not self._stopped.wait(_BEAT):
            try:
                found = self._look()
            except (RuntimeError, OSError) as error:  # the store went with the process that had it
                if self._stopped.wait(2 * _BEAT):
                    return
                found = f"{_FIRST_GONE} ({str(error).splitlines()[0]})"
            if found:
                self._end(found)

    def _look(self) -> str:
        """Failure of another process, or None."""
        world, launch = self._world, self._world.launch
        store = world.store
        self._beats += 1
        store.set(f"beat/{launch.rank}", str(self._beats))
        if store.check(["failed"]):
            return str(store.get("failed").decode())
        if launch.rank == 0:
            self._count_silence()
        return ""

    def _count_silence(self) -> None:
        """Declare processes dead that have not given a sign for long."""
        launch, store, now = self._world.launch, self._world.store, time.monotonic()
        limit = _SUSPICIOUS_SILENCE if store.check(["suspicion"]) else _SILENCE
        for rank in range(1, launch.size):
            key = f"beat/{rank}"
            beat = store.get(key) if store.check([key]) else b""
            last, since = self._seen.get(rank, (None, now))
            self._seen[rank] = (beat, since if beat == last else now)
            if now - self._seen[rank][1] > limit:
                declare(
                    store,
                    f"process {rank} of {launch.size} gives no sign of life any more: it was "
                    "killed (by the system where memory ran out), or its host is gone",
                )

    def _end(self, found: str) -> None:
        """Say what happened, once, and end this process."""
        # Its own error may be the same, and is told better.
        wait = _TO_TELL if leader() else 4 * _TO_TELL
        if self._stopped.wait(wait) or self.failing.is_set():
            return
        if leader():
            _logger.error("all processes end: %s", found)
            leave_error(found)
            _quietly(self._world.store.set, "told", "1")
        elif found.startswith(_FIRST_GONE):  # which else tells it
            print(f"error: {found}", file=sys.stderr)
        logging.shutdown()
        os._exit(1)


def declare(store: Any, text: str) -> bool:
    """Record in the store that the run failed; returns whether this process is the first."""
    said: bytes = store.compare_set("failed", "", text)
    return said.decode() == text


def leave_error(text: str) -> None:
    """Leave the text of an error for the process that started this one."""
    path = os.environ.get(ERROR_FILE)
    if path and not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _quietly(function: Any, *arguments: Any) -> Any:
    """Call what may fail because another process is gone."""
    try:
        return function(*arguments)
    except (RuntimeError, OSError):
        return None


_world: _World | None = None


@contextmanager
def joined(launch: Launch | None, device: torch.device) -> Iterator[None]:
    """Work together with the other processes while the context is open.

    Nothing happens without a launch, or where the processes work together already. An error in one
    of them ends all.

    Raises:
        TrainingError: the processes do not meet.
    """
    global _world
    if launch is None or _world is not None:
        yield
        return
    _world = world = _World(launch, device)
    try:
        yield
        world.leave()
    except BaseException as error:
        world.watch.failing.set()
        _fail(world, error)
        raise
    finally:
        _world = None


def _fail(world: _World, error: BaseException) -> None:
    """Report an error to the other processes; the first process shows it to the user."""
    launch, store = world.launch, world.store
    text = str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|Connection|peer", text):
        # Another process is gone; the one that knows the cause reports it.
        world.watch.failing.clear()
        _quietly(store.set, "suspicion", "1")
        time.sleep(_SILENCE + 5.0)
        world.watch.failing.set()
    known = isinstance(error, (PetFinetuneError, OSError, KeyboardInterrupt))
    if not known:
        text = f"{type(error).__name__}: {text}"
        traceback.print_exc()
    whose = f"process {launch.rank} of {launch.size}: " if launch.rank else ""
    _quietly(declare, store, whose + text)
    if launch.rank == 0:
        leave_error(text)
        _quietly(store.set, "told", "1")
        return
    for _ in range(20):
        if _quietly(store.check, ["told"]) in (True, None):  # None: the first one has gone already
            logging.shutdown()
            os._exit(1)
        time.sleep(0.5)
    leave_error(whose + text)
    print(f"process {launch.rank} of {launch.size}:", file=sys.stderr)


@contextmanager
def alone() -> Iterator[None]:
    """Work by itself while the context is open, as if there were no other processes."""
    if _world is None or _world.alone:
        yield
        return
    _world.alone = True
    try:
        yield
    finally:
        _world.alone = False


def num_cores() -> int:
    """Cores that this process may use: those of its affinity, at most ``OMP_NUM_THREADS``."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def size() -> int:
    """Number of processes that train the same model."""
    return 1 if _world is None or _world.alone else _world.launch.size


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _world is None or _world.alone else _world.launch.rank


def first() -> bool:
    """Whether this is the process that writes the files of its run."""
    return rank() == 0


def leader() -> bool:
    """Whether this is the process that talks to the user, also while each works by itself."""
    return _world is None or _world.launch.rank == 0


def local_rank() -> int | None:
    """Rank of the process on its host; None for a single process."""
    return None if _world is None else _world.launch.local_rank


def everyone() -> int:
    """Number of processes, also while each works alone."""
    return 1 if _world is None else _world.launch.size


def gathered(value: T) -> list[T]:
    """Values of all processes, in their order, on each; plain values."""
    if size() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """Value of the first process on all of them; a plain value."""
    if size() == 1:
        return value
    from torch import distributed

    found: list[Any] = [value]
    distributed.broadcast_object_list(found, src=0)
    first_one: T = found[0]
    return first_one


def barrier() -> None:
    """Wait until all processes are here: what the first one wrote is there for the others."""
    from_first(None)


def next_number(name: str) -> int:
    """0, 1, 2...: each number is given once, to whichever process asks for it first."""
    assert _world is not None, "one process needs nobody to deal work out"
    return int(_world.store.add(name, 1)) - 1


def check_distinct(devices: list[tuple[str, str]]) -> None:
    """Make sure that no two processes have the same GPU, by host and identity (empty: none)."""
    seen: dict[tuple[str, str], int] = {}
    for number, (host, identity) in enumerate(devices):
        other = seen.setdefault((host, identity), number)
        if identity and other != number:
            raise ConfigError(
                f"device: processes {other} and {number} on host '{host}' have the same GPU. Start "
                "as many processes on each host as there are GPUs."
            )


def identity(device: torch.device) -> tuple[str, str]:
    """Host and identity of the GPU of this process; the latter empty for a CPU."""
    if device.type != "cuda":
        return socket.gethostname(), ""
    import torch

    return socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
