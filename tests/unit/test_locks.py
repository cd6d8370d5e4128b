"""A lock is one process's, goes with it, and is not taken from a living one on another host."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pet_finetune import locks
from pet_finetune.locks import FileLock

#: Takes the lock argv[1] if it is free, says so, and keeps it until it is killed.
_HOLD = """
import errno, sys, time
from pathlib import Path
from pet_finetune import locks

if sys.argv[2] == "without":
    def flock(file, how):
        raise OSError(errno.ENOSYS, "no locks here")
    locks.fcntl.flock = flock
lock = locks.FileLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print("mine" if lock.acquire() else f"refused {lock.holder}", flush=True)
time.sleep(60)
"""


@pytest.fixture
def processes():
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(path), how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go(process) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(params=["with", "without"])
def flock(request, monkeypatch):
    """With the system's locks, and on a disk that has none."""
    if request.param == "without":

        def fail(file, how):
            raise OSError(errno.ENOSYS, "no locks here")

        monkeypatch.setattr(fcntl, "flock", fail)
    return request.param


def test_one_of_many_processes_gets_it_and_the_others_know_who(processes, flock, tmp_path):
    path = tmp_path / "lock"
    many = [processes(path, flock) for _ in range(6)]
    for process in many:  # all at once
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline().strip() for process in many]
    assert answers.count("mine") == 1
    # Where files are locked, one that asks within the same instant may find the name not written.
    winner = many[answers.index("mine")].pid
    for answer in answers:
        assert answer == "mine" or answer.startswith("refused ")
    lock = FileLock(path)
    assert not lock.acquire()
    assert lock.holder.pid == winner
    assert f"process {winner} on host" in str(lock.holder)


def test_it_is_free_when_its_process_was_killed(processes, flock, tmp_path):
    holder = processes(tmp_path / "lock", flock)
    assert go(holder) == "mine"
    lock = FileLock(tmp_path / "lock")
    assert not lock.acquire()
    kill(holder)
    assert lock.acquire()
    lock.release()
    assert not (tmp_path / "lock").exists()
    again = FileLock(tmp_path / "lock")
    assert again.acquire()
    again.release()


def test_a_lock_that_is_given_back_while_another_opens_it_is_taken_anew(monkeypatch, tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    flock, inode = fcntl.flock, (tmp_path / "lock").stat().st_ino

    def late(file, how):
        if os.fstat(file).st_ino != inode:  # the second finds out whether files can be locked
            return flock(file, how)
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()  # after the second has opened the file that this removes
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert second.acquire()
    assert (tmp_path / "lock").exists()
    assert not FileLock(tmp_path / "lock").acquire()
    second.release()


def test_where_nothing_is_locked_nobody_finds_the_file_empty(monkeypatch, tmp_path):
    """Others would take it for abandoned, and remove that of a faster process in its place."""
    path, link, found = tmp_path / "lock", os.link, []

    def fail(file, how):
        raise OSError(errno.ENOSYS, "no locks here")

    def watched(source, target):
        found.append((path.exists(), json.loads(Path(source).read_text())["pid"]))
        link(source, target)

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(os, "link", watched)
    lock = FileLock(path)
    assert lock.acquire()
    assert found == [(False, os.getpid())]
    lock.release()
    assert not list(tmp_path.iterdir())


def test_after_a_kill_one_of_many_gets_it(processes, flock, tmp_path):
    path = tmp_path / "lock"
    holder = processes(path, flock)
    assert go(holder) == "mine"
    many = [processes(path, flock) for _ in range(4)]
    kill(holder)
    for process in many:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.stdout.readline().strip() for process in many].count("mine") == 1


def test_a_copy_of_a_folder_in_use_is_free(processes, flock, tmp_path):
    holder = processes(tmp_path / "lock", flock)
    assert go(holder) == "mine"
    (tmp_path / "copy").write_bytes((tmp_path / "lock").read_bytes())
    lock = FileLock(tmp_path / "copy")
    assert lock.acquire()
    lock.release()


def test_a_forked_child_does_not_keep_it(tmp_path):
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    (read, write), (there, here) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.write(here, b"x")
        os.read(read, 1)  # until the parent lets go
        os._exit(0)
    try:
        os.read(there, 1)
        lock._close()  # as the end of the process does
        locks._held.discard(lock)
        again = FileLock(tmp_path / "lock")
        assert again.acquire()
        again.release()
    finally:
        os.close(write)
        os.waitpid(child, 0)
        for end in (read, there, here):
            os.close(end)


def test_a_child_that_forks_leaves_it_to_its_parent(tmp_path):
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert not FileLock(tmp_path / "lock").acquire()
    lock.release()


def of_another_host(path: Path) -> None:
    """A lock's file as a process of another host leaves it that ended without a word."""
    path.touch()
    text = {"host": "elsewhere", "pid": 1, "born": "1", "since": "then", "command": "train"}
    path.write_text(json.dumps({**text, "inode": path.stat().st_ino}))


def test_a_living_process_of_another_host_keeps_it(monkeypatch, flock, tmp_path):
    monkeypatch.setattr(locks, "_SECONDS_TO_LOOK", 0.6)
    path = tmp_path / "lock"
    of_another_host(path)
    stop = threading.Event()

    def touch():
        while not stop.wait(0.05):
            os.utime(path)

    other = threading.Thread(target=touch)
    other.start()
    lock = FileLock(path)
    try:
        assert not lock.acquire()
        assert lock.holder.host == "elsewhere"
    finally:
        stop.set()
        other.join()
    assert lock.acquire()  # it gives no sign any more
    lock.release()


def test_a_holder_gives_signs(monkeypatch, tmp_path):
    monkeypatch.setattr(locks, "_SECONDS_BETWEEN_SIGNS", 0.05)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    os.utime(tmp_path / "lock", (1, 1))
    end = time.monotonic() + 5
    while (tmp_path / "lock").stat().st_mtime < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / "lock").stat().st_mtime > 2
    lock.release()


def test_a_damaged_file_is_free(flock, tmp_path):
    (tmp_path / "lock").write_text("{")
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    lock.release()
