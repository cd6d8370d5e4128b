"""``pet-finetune train --profile``: what it writes and says, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_data import options, write_options


def test_a_profile_of_a_run(here, command):
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run", "--profile", 2)
    assert answer.code == 0, answer.err
    # Nothing that could be taken for a run that finished, or be gone on with.
    assert {path.name for path in Path("run").iterdir()} == {
        "options.yaml", "profile.json", "profile_trace.json", "splits.json", "train.log",
    }  # fmt: skip
    content = json.loads(Path("run/profile.json").read_text())
    assert content["steps"] == len(content["step_seconds"]) == 2
    assert content["device"] == "cpu"
    assert content["versions"]["torch"]
    for text in (
        "a training step, mean of 2 (cpu, float32", *content["stages"], "structures/s",
        "neighbours an atom", "epoch: 3 steps and validation", "at the peak",
        "the most expensive operations", content["operations"][0]["name"][6:][-20:],
        "all numbers: run/profile.json",
        "timeline: run/profile_trace.json", "ui.perfetto.dev", "chrome://tracing",
    ):  # fmt: skip
        assert text in answer.out, text
        assert text in Path("run/train.log").read_text(), text
    assert "traceEvents" in json.loads(Path("run/profile_trace.json").read_text())
    # The same folder is free for the run itself.
    assert command("train", "options.yaml", "-c", "base.ckpt", "-o", "run").code == 0


def test_ten_steps_are_timed_where_no_number_is_given(here, command):
    assert command("train", "options.yaml", "-c", "base.ckpt", "--profile").code == 0
    (written,) = Path("outputs").rglob("profile.json")
    assert len(json.loads(written.read_text())["step_seconds"]) == 10


def test_a_run_of_one_step_can_be_profiled(here, command):
    content = options({"num_epochs": 1, "batch_size": 8, "ema": 0.9})
    write_options(here / "mine.yaml", content)
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "--profile", "1", "-o", "run")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("steps", ["0", "-2"])
def test_fewer_than_one_step_is_refused_before_anything_is_written(here, command, steps):
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run", f"--profile={steps}")
    assert answer.code == 1
    assert "at least 1 step must be timed" in answer.err
    assert not Path("run").exists()


def test_what_is_no_number_is_explained(here, command, capsys):
    with pytest.raises(SystemExit) as caught:
        command("train", "--profile", "options.yaml", "-c", "base.ckpt")
    assert caught.value.code == 2
    assert "'options.yaml' is no number of steps" in capsys.readouterr().err


def test_a_run_that_goes_on_is_not_profiled(here, command):
    answer = command("train", "options.yaml", "--restart", "auto", "--profile")
    assert answer.code == 1
    assert "leave --restart out" in answer.err


def test_the_folder_of_a_run_stays_as_it_is(here, command):
    assert command("train", "options.yaml", "-c", "base.ckpt", "-o", "run").code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run", "--profile", "1")
    assert answer.code == 1
    assert "holds a run already" in answer.err
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
