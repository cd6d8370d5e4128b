"""Signals are noted once and act the second time."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from pet_finetune.__main__ import main
from pet_finetune.installation import end_while_importing
from pet_finetune.terminal import InterruptGuard


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_the_first_signal_is_only_noted(name):
    number = signal.Signals[name]
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, usual)  # nohup, for one, starts the tests with another
    with InterruptGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), number)
        assert guard.requested
    assert signal.signal(number, before) == usual


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def at_start(request):
    """As Python is started: in the foreground, or in the background where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_the_script_uses_or_nohup_ignores_is_left_alone():
    used = []
    for number, handler in (
        (signal.SIGUSR1, lambda *_: used.append(1)),
        (signal.SIGHUP, signal.SIG_IGN),
    ):
        before = signal.signal(number, handler)
        with InterruptGuard() as guard:
            os.kill(os.getpid(), number)
        assert not guard.requested
        assert signal.signal(number, before) is handler
    assert used == [1]


def test_a_second_interrupt_acts(at_start):
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert guard.requested
    assert signal.getsignal(signal.SIGINT) == at_start


@pytest.mark.slow
def test_a_second_termination_ends_a_process_that_ignored_it():
    script = (
        "import os, signal\n"
        "from pet_finetune.terminal import InterruptGuard\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with InterruptGuard() as guard:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(guard.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout == "True\n"
    assert run.returncode == -signal.SIGTERM


def test_ctrl_c_ends_the_command_at_once_while_it_imports(at_start, tmp_path, monkeypatch, capfd):
    """NumPy and torch swallow it there, or break."""
    library = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept: pass\n"
    (tmp_path / "library_that_swallows.py").write_text(library)
    monkeypatch.syspath_prepend(tmp_path)
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit())
    end_while_importing()
    importlib.import_module("library_that_swallows")
    heard = at_start != signal.SIG_IGN
    assert ended == ([130] if heard else [])
    assert capfd.readouterr().err == ("interrupted\n" if heard else "")
    if heard:
        monkeypatch.setattr(sys, "argv", ["pet-finetune"])
        monkeypatch.setattr("pet_finetune.cli.main", lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main() == 130


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)

    def fail():
        with InterruptGuard():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert signal.getsignal(signal.SIGINT) == before


def test_in_another_thread_nothing_is_touched():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with InterruptGuard() as guard:
            seen.append((guard.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
