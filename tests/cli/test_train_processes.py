"""Several processes from the command line: `device: 2`, and what a launcher started."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.cli import main
from tiny_data import options, write_options
from together import together

#: Which rounding errors change little: soap looks for directions where a gradient has none.
ADAMW = {"optimizer": "adamw"}


def of_launcher(launch, *arguments):
    """The command, in a process that torchrun started."""
    os.environ |= {
        "RANK": str(launch.rank), "WORLD_SIZE": str(launch.size), "MASTER_ADDR": launch.address,
        "LOCAL_RANK": str(launch.local_rank), "MASTER_PORT": str(launch.port),
    }  # fmt: skip
    return main([str(argument) for argument in arguments])


def launched(count, *arguments):
    return together(count, of_launcher, *arguments, joins=False)


def weights(folder):
    return load_checkpoint(Path(folder, "last.ckpt")).model.state_dict()


def assert_near(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)


def losses(folder):
    with Path(folder, "train.csv").open() as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def test_one_run_of_two_processes_has_the_files_of_one(here, train):
    train(options(ADAMW), "-c", "base.ckpt")
    Path("run").rename("one")
    assert launched(2, "train", "mine.yaml", "-o", "run", "-c", "base.ckpt") == [0, 0]
    assert losses("run") == pytest.approx(losses("one"), rel=1e-4)
    assert_near("run", "one")
    assert {path.name for path in Path("run").iterdir()} == {p.name for p in Path("one").iterdir()}
    assert Path("run/train.log").read_text().count("epoch 2/2") == 1


def test_members_of_an_ensemble_are_trained_each_by_a_process(here, train):
    content = options({**ADAMW, "finetune": {"ensemble": 3, "config": {"rank": 2, "dropout": 0.2}}})
    train(content, "-c", "base.ckpt")
    Path("run").rename("one")
    assert launched(2, "train", "mine.yaml", "-o", "run", "-c", "base.ckpt") == [0, 0]
    for member in range(3):
        ours, theirs = weights(f"run/member_{member}"), weights(f"one/member_{member}")
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    found, expected = (json.loads(Path(p, "results.json").read_text()) for p in ("run", "one"))
    assert found == expected


def test_named_runs_are_trained_each_by_a_process(here, command):
    defaults = {"base_model": "base.ckpt", "dataset_path": "train.xyz", "num_epochs": 2,
                "batch_size": 3, "lora_r": 2, "seed": 5, **ADAMW, "device": "cpu"}  # fmt: skip
    runs = {"a": {}, "b": {"seed": 6}, "c": {"seed": 7}}
    Path("runs.json").write_text(json.dumps({"defaults": defaults, **runs}))
    every = ("train", "--config", "runs.json", "--all", "--no-check")
    assert command(*every, "-o", "one").code == 0
    assert launched(2, *every, "-o", "two") == [0, 0]
    for name in runs:
        (ours,), (theirs,) = (list(Path(p).glob(f"*/{name}")) for p in ("two", "one"))
        assert losses(ours) == losses(theirs)
    table = json.loads(Path("two/runs.json").read_text())
    assert [row["status"] for row in table] == ["finished"] * 3


def test_one_named_run_is_trained_together(here, command):
    entry = {"base_model": "base.ckpt", "dataset_path": "train.xyz", "num_epochs": 1,
             "batch_size": 3, "seed": 5, **ADAMW, "device": "cpu"}  # fmt: skip
    Path("runs.json").write_text(json.dumps({"defaults": {}, "a": entry}))
    alone = ("train", "--config", "runs.json", "--run-name", "a", "--no-check")
    assert command(*alone, "-o", "one").code == 0
    assert launched(2, *alone, "-o", "two") == [0, 0]
    (ours,), (theirs,) = (list(Path(p).glob("*/a")) for p in ("two", "one"))
    assert_near(ours, theirs)


def test_bad_input_is_told_once(here, capfd):
    write_options(here / "mine.yaml", options({"batch_size": 1}))
    assert launched(2, "train", "mine.yaml", "-o", "run", "-c", "base.ckpt") == [1, 1]
    told = capfd.readouterr().err
    assert told.count("batch_size 1 on 2 processes: each needs a structure") == 1
    assert launched(2, "train", "mine.yaml", "-o", "r2", "-c", "base.ckpt", "-r", "device=3") == [
        1, 1,
    ]  # fmt: skip
    assert capfd.readouterr().err.count("but torchrun has started 2 already") == 1


@pytest.mark.slow
def test_a_number_of_processes_starts_them(here, train, command):
    train(options(ADAMW), "-c", "base.ckpt")
    Path("run").rename("one")
    train(options(ADAMW, device=2), "-c", "base.ckpt", "--no-check")
    assert losses("run") == pytest.approx(losses("one"), rel=1e-4)
    told = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run").err
    assert "holds a run already" in told
    write_options(here / "mine.yaml", options({"batch_size": 1}, device=2))
    told = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "other", "--no-check").err
    assert told.count("error: batch_size 1 on 2 processes") == 1
