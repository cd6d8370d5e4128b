"""A run that an earlier release stopped (before features had a place of their own) goes on here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pet_finetune.adapters import read_adapter
from pet_finetune.checkpoint import load_checkpoint

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-before-features"


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


def test_what_keeps_the_average_is_read(stopped, command):
    """Without the average of the old state, EMA would begin anew: another model at the end."""
    last = load_checkpoint("run/last.ckpt").training["trainer"]
    assert last["average_updates"] == 5
    assert "features" not in last


def test_its_adapter_and_checkpoint_open(stopped):
    assert read_adapter("run/adapter").config.rank == 2
    assert load_checkpoint("run/best_model.ckpt").model.targets.keys() == {"energy"}
