"""Locks on files that end with their process: one process per folder, one to compile kernels.

With ``flock`` (local disks, NFS) the operating system frees the lock when its process ends. Without
it (Lustre without the option, some network disks) the file itself is the lock: one process creates
it, and another takes it over when that process is gone. The file names its holder. Processes of
other hosts cannot be checked directly, so each holder touches its file every few seconds, and
others watch whether this continues. This also guards disks whose ``flock`` other hosts do not see.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .log import get_logger

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_logger = get_logger(__name__)
_SECONDS_BETWEEN_SIGNS = 5.0
#: After so long without a sign the holder on another host is taken for dead.
_SECONDS_TO_LOOK = 12.0
#: Between finding a lock abandoned and removing its file no process should take so long.
_SECONDS_TO_SETTLE = 0.5
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, from its file.

    Attributes:
        host, pid: which process.
        born: when it began, in the system's own count; tells it from a later one of the same pid.
        since: when it took the lock, local time.
        command: its command line.
        inode: of the lock's file, which a copied file does not have.
    """

    host: str
    pid: int
    born: str
    since: str
    command: str
    inode: int = 0

    @classmethod
    def me(cls) -> Holder:
        """This process, now."""
        since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        return cls(socket.gethostname(), os.getpid(), _born(os.getpid()), since, command)

    def lives(self) -> bool:
        """Whether the process lives; only valid on its own host."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # there, but another user's
            pass
        return _born(self.pid) == self.born

    def __str__(self) -> str:
        return f"process {self.pid} on host '{self.host}' ({self.command}), since {self.since}"


class FileLock:
    """A lock that one process holds at a time.

    Args:
        path: its file, which is there while the lock is held, and may stay behind a killed process.

    Attributes:
        path: as given.
        holder: the holder at the last failed attempt of this process, from the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder: Holder | None = None
        self._file: int | None = None
        self._stop = threading.Event()
        self._signs: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free.

        Raises:
            OSError: the file cannot be made or written.
        """
        assert self._file is None, "this lock is held already"
        file = self._open() if self._has_flock() else self._open_alone()
        if file is None:
            return False
        self._file, self.holder = file, None
        try:
            _write(file, replace(Holder.me(), inode=os.fstat(file).st_ino))
        except OSError as error:  # a full disk, which names no file
            self.release()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        _held.add(self)
        self._stop = threading.Event()
        self._signs = threading.Thread(target=_give_signs, args=(file, self._stop), daemon=True)
        self._signs.start()
        return True

    def wait(self) -> None:
        """Take the lock as soon as it is free."""
        while not self.acquire():
            time.sleep(0.5)

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is None:
            return
        self._stop.set()
        if self._signs is not None:
            self._signs.join()  # its file may be another one as soon as it is closed
        _held.discard(self)
        # What cannot be removed any more (a folder that is gone) is free as soon as it is closed.
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)

    def _own_path(self) -> Path:
        """Path in the lock's folder that no other process uses."""
        return self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}")

    def _has_flock(self) -> bool:
        """Whether the folder's file system supports ``flock``, tried on a private file.

        The lock's own file is not made for that: empty, it would look abandoned.
        """
        if fcntl is None:
            return False
        own = self._own_path()
        file = os.open(own, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # other threads of ours may try too
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
        finally:
            os.close(file)
            own.unlink(missing_ok=True)
        return True

    def _open(self) -> int | None:
        """The open file of a lock that is ours now, or None."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = isinstance(error, BlockingIOError) or error.errno == errno.EACCES
            self.holder = _read_living(file) if taken else None
            os.close(file)
            if taken:
                return None
            raise
        if _inode(self.path) != os.fstat(file).st_ino:  # given back, and removed, meanwhile
            os.close(file)
            return self._open()
        found = _read(file)
        if found is None or found.host == socket.gethostname() or not self._lives(found, file):
            return file
        os.close(file)
        return None

    def _open_alone(self) -> int | None:
        """:meth:`_open` without locks of the file system: the creator of the file holds it."""
        while True:
            new = self._own_path()
            file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            # Written before it gets its name, so that nobody finds it empty and takes it for free.
            _write(file, replace(Holder.me(), inode=os.fstat(file).st_ino))
            try:
                os.link(new, self.path)
            except FileExistsError:
                os.close(file)
            else:
                # A process that had found an abandoned file may be about to remove this one.
                time.sleep(_SECONDS_TO_SETTLE)
                if _inode(self.path) == os.fstat(file).st_ino:
                    return file
                os.close(file)
            finally:
                new.unlink(missing_ok=True)
            if not self._remove_abandoned():
                return None

    def _remove_abandoned(self) -> bool:
        """Remove the file of a process that is gone; False where it is not."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:  # open to the end, so that no other file gets its inode
            inode, found = os.fstat(file).st_ino, _read(file)
            if found is not None and self._lives(found, file):
                return False
            aside = self.path.with_name(f"{self._own_path().name}.old")
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, aside)
                if aside.stat().st_ino != inode:  # another process was faster: this is its file
                    with contextlib.suppress(FileExistsError):
                        os.link(aside, self.path)
                aside.unlink()
        finally:
            os.close(file)
        return True

    def _lives(self, holder: Holder, file: int) -> bool:
        """Whether the process named in a lock file still holds it."""
        if holder.inode != os.fstat(file).st_ino:
            return False  # a copy of a folder in use, which nobody uses
        here = holder.host == socket.gethostname()
        lives = holder.lives() if here else self._gives_signs(holder)
        self.holder = holder if lives else None
        return lives

    def _gives_signs(self, holder: Holder) -> bool:
        """Whether a process on another host touches its file while we wait."""
        _logger.info("looking for %.0f s whether %s lives: its file", _SECONDS_TO_LOOK, holder)
        first, end = self._touched(), time.monotonic() + _SECONDS_TO_LOOK
        while time.monotonic() < end:
            time.sleep(min(1.0, _SECONDS_TO_LOOK / 4))
            if self._touched() != first:
                return self._touched() is not None
        return False

    def _touched(self) -> int | None:
        """Modification time of the file; opened again, because NFS asks the server only then."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Make a file or folder in one process only; others wait, with a notice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    if not lock.acquire():
        _logger.info("%s is being made by %s; waiting", path, lock.holder or "another process")
        lock.wait()
    try:
        yield
    finally:
        lock.release()


def _give_signs(file: int, stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_SIGNS):
        with contextlib.suppress(OSError):
            os.utime(file)


def _write(file: int, holder: Holder) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(holder)).encode(), 0)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _read(file: int) -> Holder | None:
    """Content of a lock's file; None if it is empty or foreign."""
    try:
        return Holder(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _read_living(file: int) -> Holder | None:
    """Content of the file of a held lock, which may still be written."""
    found = None
    for _ in range(10):
        found = _read(file)
        if found is not None and (found.host != socket.gethostname() or found.lives()):
            break
        time.sleep(0.05)
    return found


def _born(pid: int) -> str:
    """Start time of a process on Linux; empty elsewhere or if it has ended."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else numbers[18]


#: The locks of this process. A forked child is another process: it holds none of them, and must not
#: keep their files open beyond the parent's end.
_held: set[FileLock] = set()


def _forget_in_child() -> None:
    for lock in _held:
        lock._close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
