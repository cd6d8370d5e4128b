"""A folder in use is refused, whichever command wants it; a new run always finds one of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest

from pet_finetune.runs import RunFolder
from tiny_data import molecules, options, write_frames, write_options

REFUSED = re.compile(rf"The folder '[^']*' is in use by process {os.getpid()} on host '")


def refused(answer):
    assert answer.code == 1
    assert REFUSED.search(answer.err), answer.err
    return answer.err


@pytest.fixture
def stopped(here, command, stop):
    """The folder of a run that was stopped."""
    stop(2)
    assert command("train", "options.yaml", "-c", "base.ckpt", "-o", "run").code == 130
    return Path("run")


def test_a_folder_in_use_is_refused_and_nothing_in_it_is_touched(stopped, command):
    before = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    with RunFolder.take(stopped):
        holding = (stopped / ".lock").read_bytes()
        train = ("train", "options.yaml")
        assert "choose another folder with -o FOLDER" in refused(command(*train, "-o", "run"))
        refused(command(*train, "--restart", "run"))
        refused(command(*train, "--restart", "auto", "-o", "run"))
        refused(command(*train, "--restart", "run", "-o", "copy"))
        refused(command(*train, "-c", "base.ckpt", "--profile", "1", "-o", "run"))
        after = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    assert after == {**before, stopped / ".lock": holding}
    assert command(*train, "--restart", "run").code == 0


def test_so_is_that_of_a_named_run_of_an_ensemble_and_of_a_simulation(here, command):
    runs = {"defaults": {"base_model": "base.ckpt", "dataset_path": "train.xyz"}, "one": {}}
    Path("runs.json").write_text(json.dumps(runs))
    folder = Path(command("train", "--config", "runs.json", "--run-name", "one", "--show-options")
                  .out.split("-o ")[1].split()[0])  # fmt: skip
    with RunFolder.take(folder):
        (folder / "train.csv").write_text("the other process writes this")
        refused(command("train", "--config", "runs.json", "--run-name", "one"))
        assert (folder / "train.csv").read_text() == "the other process writes this"
    two = ("-r", "architecture.training.finetune.ensemble=2")
    with RunFolder.take(Path("both")):
        refused(command("train", "options.yaml", "-c", "base.ckpt", *two, "-o", "both"))
    molecule = molecules(1)[0]
    ase.io.write("one.xyz", molecule)
    steps = ("--steps", 2, "--every", 1, "--device", "cpu")
    with RunFolder.take(Path("md")):
        refused(command("md", "base.ckpt", "one.xyz", *steps, "-o", "md"))
    assert command("md", "base.ckpt", "one.xyz", *steps, "-o", "md").code == 0
    with RunFolder.take(Path("md")):
        refused(command("md", "--restart", "md", "--steps", 4))
    assert command("md", "--restart", "md", "--steps", 4).code == 0


def test_two_commands_started_together_write_two_runs(here):
    """Cases of users: the jobs of an array, or of a loop in the shell."""
    write_frames(Path("train.xyz"), molecules(6))
    script = (
        "import datetime, sys, types\n"
        "from pet_finetune import runs as folder\n"
        "class Clock(datetime.datetime):\n"
        "    now = classmethod(lambda cls, tz=None: cls(2026, 1, 2, 3, 4, 5, tzinfo=tz))\n"
        "folder.datetime = types.SimpleNamespace(datetime=Clock, timezone=datetime.timezone)\n"
        "from pet_finetune.cli import main\n"
        "given = ['train', 'options.yaml', '-c', 'base.ckpt', '-r', 'seed=' + sys.argv[1]]\n"
        "sys.exit(main(given))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, seed], stderr=subprocess.PIPE, text=True)
        for seed in "12"
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    day = Path("outputs/2026-01-02")
    assert sorted(path.name for path in day.iterdir()) == ["03-04-05", "03-04-05.1"]
    seeds = set()
    for folder in day.iterdir():
        rows = (folder / "train.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2"]
        seeds.add(re.search(r"^seed: (\d+)$", (folder / "options.yaml").read_text(), re.M)[1])
    assert seeds == {"1", "2"}


def test_auto_starts_a_first_run_and_goes_on_with_the_right_one_of_a_copy(
    here, command, stop, monkeypatch
):
    finetune = {"method": "lora", "read_from": "base.ckpt"}
    write_options(Path("options.yaml"), options({"finetune": finetune}))
    theirs = Path("outputs/2025-01-01/00-00-00")
    theirs.mkdir(parents=True)
    (theirs / "options_restart.yaml").touch()
    answer = command("train", "options.yaml", "--restart", "auto")
    shutil.rmtree(theirs.parent)
    assert answer.code == 0, answer.err
    assert "there is no run below 'outputs' yet; a new one is started" in answer.err
    assert f"'{theirs}' is a run of metatrain" in answer.err
    (first,) = Path("outputs").glob("*/*")
    stop(2)
    assert command("train", "options.yaml").code == 130
    (second,) = set(Path("outputs").glob("*/*")) - {first}
    Path("copy").mkdir()
    for path in ("outputs", "options.yaml", "train.xyz", "test.xyz", "base.ckpt"):
        shutil.move(path, "copy")
    monkeypatch.chdir("copy")
    for path in Path("outputs").rglob("*"):  # what was first is newest, as in some copies
        os.utime(path, (1_000_000_000, 1_000_000_000 + (first.name in path.parts)))
    stop(10**6)
    answer = command("train", "options.yaml", "--restart", "auto")
    assert answer.code == 0, answer.err
    assert f"going on with '{second}'" in answer.err
    assert (second / "results.json").exists()


def test_auto_goes_on_in_the_folder_that_is_named(here, command, stop):
    train = ("train", "options.yaml", "-r", "architecture.training.finetune.read_from=base.ckpt")
    stop(2)
    assert command(*train, "--restart", "auto", "-o", "run").code == 130
    stop(10**6)
    answer = command(*train, "--restart", "auto", "-o", "run")
    assert answer.code == 0, answer.err
    assert "going on with 'run'" in answer.err
    assert not Path("outputs").exists()
