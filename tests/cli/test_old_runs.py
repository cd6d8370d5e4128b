"""A run that an earlier release stopped (before features had a place of their own) goes on here."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.checkpoint.opening import load_checkpoint

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-before-features"
TIMES = ("seconds", "structures_per_second")


def table(path):
    """The rows of a run's table, without what depends on the machine."""
    with Path(path).open(newline="") as stream:
        return [
            {name: float(value) for name, value in row.items() if not name.startswith(TIMES)}
            for row in csv.DictReader(stream)
        ]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder as it was left after 5 of 8 steps: LoRA with replay, anchor, retention and EMA."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")


def test_it_ends_as_that_release_would_have_ended_it(stopped, command):
    answer = command("train", "mine.yaml", "--restart", "run")
    assert answer.code == 0, answer.err
    found = json.loads(Path("run/results.json").read_text())
    expected = json.loads(Path("expected_results.json").read_text())
    assert found["parameters"] == expected["parameters"]
    for name in ("before", "after"):
        assert found[name].keys() == expected[name].keys()
        for set_name, targets in expected[name].items():
            for target, errors in targets.items():
                # Other processors sum in another order.
                assert found[name][set_name][target] == pytest.approx(errors, rel=1e-3, abs=1e-6)


def test_the_epochs_that_were_left_are_those_of_that_release(stopped, command):
    """Validated with averaged weights, replay and anchor in the loss: all of them went on."""
    assert "features" not in load_checkpoint("run/last.ckpt").training["trainer"]
    assert command("train", "mine.yaml", "--restart", "run").code == 0
    found, expected = table("run/train.csv"), table("expected_train.csv")
    assert len(found) == len(expected) == 4
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_its_adapter_and_checkpoint_open(stopped):
    assert read_adapter("run/adapter").config.rank == 2
    assert load_checkpoint("run/best_model.ckpt").model.targets.keys() == {"energy"}
