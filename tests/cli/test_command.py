"""The command itself: help at once, versions, tracebacks only when asked for."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

import pet_finetune
from pet_finetune.cli import main
from pet_finetune.errors import CheckpointError

HEAVY = ("torch", "ase", "numpy", "rich", "pydantic", "omegaconf", "vesin")


@pytest.mark.parametrize("arguments", [[], ["train"], ["eval"], ["info"]], ids=str)
def test_help_is_instant_because_it_imports_next_to_nothing(arguments):
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from pet_finetune.cli import main\n"
        f"try: main({[*arguments, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(f'{time.perf_counter() - start} {loaded}', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stderr.split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.5
    assert done.stdout.startswith("usage: pet-finetune")


def test_running_the_module_is_the_command():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pet_finetune", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"pet-finetune {pet_finetune.__version__}"
    assert time.perf_counter() - start < 5.0  # generous: a loaded machine starts Python slowly


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for text in ("train", "eval", "info", "--debug", "--version"):
        assert text in printed


def test_without_a_command(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(here):
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        main(["--debug", "info", "nothing.ckpt"])


@pytest.mark.parametrize(
    "failure",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
    ids=["python", "torch"],
)
def test_too_little_memory_is_one_line(here, command, monkeypatch, failure):
    def greedy(*ignored):
        raise failure

    monkeypatch.setattr("pet_finetune.api.describe_checkpoint", greedy)
    answer = command("info", "base.ckpt")
    assert answer.code == 1
    assert answer.err.startswith("error: The memory is not enough")
    assert answer.err.count("\n") == 1


def test_other_failures_of_torch_are_not_called_memory(here, command, monkeypatch):
    def broken(*ignored):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("pet_finetune.api.describe_checkpoint", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        command("info", "base.ckpt")


def test_what_the_system_refuses_is_one_line_too(here, command, monkeypatch):
    def full(*ignored):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("pet_finetune.api.describe_checkpoint", full)
    answer = command("info", "base.ckpt")
    assert answer.code == 1
    assert answer.err == "error: somewhere: No space left on device\n"


def test_an_interrupt_outside_training(here, command, monkeypatch):
    def interrupt(*ignored, **also_ignored):
        raise KeyboardInterrupt

    monkeypatch.setattr("pet_finetune.api.train", interrupt)
    answer = command("train", "options.yaml", "-c", "base.ckpt")
    assert (answer.code, answer.err) == (130, "interrupted\n")


def test_every_name_of_a_file_can_be_printed(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert stream.errors == "backslashreplace"


def test_a_current_folder_that_was_removed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["info", "model.ckpt"]) == 1
    assert "current folder was removed" in capsys.readouterr().err


def test_a_reader_that_has_gone_ends_nothing():
    code = (
        "import sys; from pet_finetune.terminal import facts_table, show\n"
        "sys.stdin.read(); print(show(facts_table('a', {'b': 'c'})), file=sys.stderr)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as run:
        run.stdout.close()
        run.stdin.close()
        assert b"b" in run.stderr.read()
    assert run.returncode == 0


def test_standard_error_may_be_closed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["eval", str(tmp_path / "a.ckpt"), str(tmp_path / "a.xyz")]) == 1
    assert sys.stderr.name == "/dev/null"
    sys.stderr.close()
