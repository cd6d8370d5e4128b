"""Training on a set that stays on disk gives what training in memory gives, and can be stopped."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.cli import main
from pet_finetune.data import metatrain_sets
from pet_finetune.data.frame_files import forget_files
from tiny_data import data_section, molecules, options, write_folder, write_options
from together import together

ADAMW = {"optimizer": "adamw"}


@pytest.fixture
def stored(here, monkeypatch):
    """A folder of 12 structures, which stays on disk."""
    write_folder(Path("set"), molecules(12))
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 3)
    yield
    forget_files()


def content(training=None, **top):
    return options({**ADAMW, **(training or {})}, training_set=data_section("set"),
                   test_set=0.2, **top)  # fmt: skip


def trained(folder):
    return load_checkpoint(Path(folder, "last.ckpt")).training["trainer"]["trained"]


def rows(folder):
    with Path(folder, "train.csv").open(newline="") as stream:
        return [
            {k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(stream)
        ]


@pytest.mark.parametrize("sizes", [{}, {"max_atoms_per_batch": 14}])
def test_a_run_is_that_of_memory(stored, train, monkeypatch, sizes):
    assert train(content(sizes), "-c", "base.ckpt").code == 0
    Path("run").rename("disk")
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 1000)
    forget_files()
    assert train(content(sizes), "-c", "base.ckpt").code == 0
    for name, value in trained("run").items():
        torch.testing.assert_close(value, trained("disk")[name])
    assert rows("run") == rows("disk")
    one, other = (json.loads(Path(f, "results.json").read_text()) for f in ("run", "disk"))
    assert one == other


def test_baselines_and_errors_of_a_large_set_come_from_a_part(stored, train, monkeypatch):
    monkeypatch.setattr("pet_finetune.data.structure_sets.SAMPLE", 4)
    monkeypatch.setattr("pet_finetune.data.loader.SAMPLE", 4)
    monkeypatch.setattr("pet_finetune.data.structure_sets.OF_ELEMENT", 1)
    assert train(content(), "-c", "base.ckpt").code == 0
    text = Path("run/train.log").read_text()
    assert re.search(r"errors of the training set: from [4-7] of 8 structures", text)
    assert re.search(r"the look at the train set: [4-7] of 8 structures stand for all", text)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_stopped_run_ends_as_if_it_had_not_been(stored, command, stop, steps):
    write_options(Path("mine.yaml"), content({"batch_size": 2}))
    stop(0)
    assert command("train", "mine.yaml", "-c", "base.ckpt", "-o", "whole").code == 0
    stop(steps)
    assert command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part").code == 130
    forget_files()
    assert command("train", "mine.yaml", "--restart", "part").code == 0
    for name, value in trained("part").items():
        assert torch.equal(value, trained("whole")[name]), name
    assert rows("part") == rows("whole")


def of_launcher(launch, *arguments):
    os.environ |= {
        "RANK": str(launch.rank), "WORLD_SIZE": str(launch.size), "MASTER_ADDR": launch.address,
        "LOCAL_RANK": str(launch.local_rank), "MASTER_PORT": str(launch.port),
    }  # fmt: skip
    metatrain_sets.MOST_IN_MEMORY = 3
    return main([str(argument) for argument in arguments])


def test_two_processes_give_the_run_of_one(stored, train):
    assert train(content(), "-c", "base.ckpt").code == 0
    Path("run").rename("one")
    arguments = ("train", "mine.yaml", "-o", "run", "-c", "base.ckpt")
    assert together(2, of_launcher, *arguments, joins=False) == [0, 0]
    for name, value in trained("run").items():
        torch.testing.assert_close(value, trained("one")[name], rtol=1e-3, atol=1e-5)


def test_convert_and_train(here, command, train, monkeypatch):
    answer = command("convert", "train.xyz", "set")
    assert answer.code == 0, answer.err
    assert "set holds 10 structures with energy, forces" in answer.err
    assert "is there already" in command("convert", "train.xyz", "set").err
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 3)
    assert train(content(), "-c", "base.ckpt").code == 0
    answer = command("convert", "absent.xyz", "other")
    assert answer.code == 1
    assert "absent.xyz" in answer.err
