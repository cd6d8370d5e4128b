"""Runs named in a file: trained, gone on with, evaluated and compared by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from tiny_data import molecules, write_frames

DEFAULTS = {
    "base_model": "base.ckpt",
    "dataset_path": "train.xyz",
    "test_path": "test.xyz",
    "num_epochs": 2,
    "batch_size": 3,
    "lora_r": 2,
    "seed": 5,
    "device": "cpu",
}
PLAIN, DORA, HEADS = (
    Path("lora_adapters", folder)
    for folder in ("32bits_r2/plain", "32bits_r2_dora/dora", "32bits_heads/heads")
)


@pytest.fixture
def runs(here):
    """Write a file of runs."""

    def write(**entries):
        entries = entries or {
            "plain": {}, "dora": {"peft_use_dora": True}, "heads": {"method": "heads"},
        }  # fmt: skip
        Path("runs.json").write_text(json.dumps({"defaults": DEFAULTS, **entries}))

    write()
    return write


def named(command, *arguments, name="plain"):
    return command("train", "--config", "runs.json", "--run-name", name, *arguments)


def every(command, *arguments):
    return command("train", "--config", "runs.json", "--all", *arguments)


def weights(folder):
    return load_checkpoint(Path(folder, "last.ckpt")).model.state_dict()


def assert_same(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_is_that_of_the_options_it_stands_for(runs, command):
    shown = named(command, "--show-options", name="dora")
    assert shown.code == 0
    assert not Path("lora_adapters").exists()
    Path("dora.yaml").write_text(shown.out)
    assert f"# dora: pet-finetune train options.yaml -o {DORA}" in shown.out
    assert command("train", "dora.yaml", "-o", "by-hand").code == 0
    assert named(command, name="dora").code == 0
    assert_same(DORA, "by-hand")


def test_all_runs_are_trained_compared_and_not_trained_again(runs, command):
    answer = every(command)
    assert answer.code == 0, answer.err
    names = ("plain", "dora", "heads")
    rows = json.loads(Path("lora_adapters/runs.json").read_text())
    assert [row["name"] for row in rows] == list(names)
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert [row["adapter_bytes"] is None for row in rows] == [False, False, True]
    assert rows[0]["trainable"] < rows[1]["trainable"]
    for row, folder in zip(rows, (PLAIN, DORA, HEADS), strict=True):
        assert row["kind"] == folder.parent.name
        assert row["seconds"] > 0
        after = json.loads((folder / "results.json").read_text())["after"]
        for name, value in row["errors"].items():
            part, target, kind = name.split("/")
            assert after[part][target][kind] == value
        assert {"validation/energy/energy_mae", "test/energy/forces_mae"} <= set(row["errors"])
    with Path("lora_adapters/runs.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["name"] for row in table] == list(names)
    assert float(table[1]["test/energy/forces_mae"]) == rows[1]["errors"]["test/energy/forces_mae"]
    assert all(name in answer.out for name in ("32bits_r2_dora", "meV/atom", *names))
    before = {path: path.stat().st_mtime_ns for path in Path("lora_adapters").rglob("last.ckpt")}
    again = every(command)
    assert again.code == 0
    assert again.err.count("is finished and is not run again") == 3
    assert {p: p.stat().st_mtime_ns for p in Path("lora_adapters").rglob("last.ckpt")} == before
    assert answer.out.endswith(again.out)


def test_runs_without_a_seed_are_compared_on_the_same_structures(runs, command):
    """Though a seed may be drawn, if that is what an entry says."""
    shared = {name: value for name, value in DEFAULTS.items() if name != "seed"}
    entries = {"a": {}, "b": {"lora_r": 1}, "c": {"seed": None}}
    Path("runs.json").write_text(json.dumps({"defaults": shared, **entries}))
    shown = {name: named(command, "--show-options", name=name).out for name in "abc"}
    assert "seed: 0" in shown["a"]
    assert "seed: 0" in shown["b"]
    assert "seed: 0" not in shown["c"]


def test_an_interrupted_file_of_runs_goes_on(runs, command, stop):
    assert every(command, "-o", "whole").code == 0
    stop(8)  # within the second run: six steps a run
    answer = every(command)
    assert answer.code == 130
    assert not HEADS.exists()
    rows = json.loads(Path("lora_adapters/runs.json").read_text())
    assert [row["status"] for row in rows] == ["finished", "interrupted", "not begun"]
    assert "heads (not" in answer.out  # the rest is on the next line
    answer = every(command)
    assert answer.code == 0, answer.err
    assert "going on after epoch" in answer.err
    for folder in (PLAIN, DORA, HEADS):
        assert_same(folder, Path("whole", *folder.parts[1:]))


def test_a_run_killed_before_its_first_save_starts_over(runs, command):
    assert named(command, "-o", "whole").code == 0
    assert named(command).code == 0
    for file in ("last.ckpt", "results.json"):
        (PLAIN / file).unlink()
    answer = named(command)
    assert answer.code == 0, answer.err
    assert_same(PLAIN, "whole/32bits_r2/plain")
    with (PLAIN / "train.csv").open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1", "2"]


def test_a_finished_run_whose_entry_changed_is_told(runs, command):
    named(command)
    answer = named(command, "-r", "num_epochs=3")
    assert answer.code == 0
    assert "was trained with architecture.training.num_epochs 2, and its entry says 3" in answer.err
    assert "remove lora_adapters/32bits_r2/plain or give it another name" in answer.err


def test_evaluation_by_name(runs, command):
    answer = command("eval", "--config", "runs.json", "--run-name", "plain")
    assert answer.code == 1
    assert "run 'plain' has no model yet" in answer.err
    assert named(command).code == 0
    own = command("eval", "--config", "runs.json", "--run-name", "plain")
    assert own.code == 0, own.err
    assert "validation (" in own.out
    best = PLAIN / "best_model.ckpt"
    files = command("eval", "--config", "runs.json", "--run-name", "plain", "test.xyz")
    assert files.out == command("eval", best, "test.xyz").out
    assert "test.xyz (4 structures)" in files.out
    # Without a seed in the file, that of the run draws the same sets again.
    assert own.out == command("eval", PLAIN / "options.yaml", "-c", best).out


def test_one_bad_run_does_not_stop_the_others(runs, command):
    write_frames(Path("other.xyz"), molecules(6, names=("NH3",)))
    runs(a={"dataset_path": "other.xyz"}, b={})
    answer = every(command)
    assert answer.code == 1
    assert "run 'a': The structures hold elements that the model does not know:" in answer.err
    rows = json.loads(Path("lora_adapters/runs.json").read_text())
    assert rows[0]["status"].startswith("The structures hold elements")
    assert rows[1]["status"] == "finished"


CONFIG = ("train", "--config", "runs.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (CONFIG, "which run? Give --run-name NAME, or --all. Runs: plain, dora, heads."),
        ((*CONFIG, "--run-name", "dara"), "there is no run 'dara'. Did you mean 'dora'?"),
        ((*CONFIG, "--run-name", "dora", "--all"), "give one of them."),
        ((*CONFIG, "--all", "options.yaml"), "--config runs.json and options.yaml contradict"),
        ((*CONFIG, "--all", "-c", "base.ckpt"), "-c does not go with --config"),
        ((*CONFIG, "--all", "--restart", "auto"), "--restart does not go with --config"),
        (("train", "--run-name", "dora"), "--run-name needs the file that names the runs"),
        (("train", "options.yaml", "--all"), "--all needs the file that names the runs"),
        (("train",), "train: name the options file"),
        (("train", "--config", "rons.json", "--all"), "no such file of runs. In that folder: "),
        (("eval", "--run-name", "dora"), "--run-name needs the file that names the runs"),
        (("eval", "--config", "runs.json"), "which run? Give --run-name NAME. Runs: plain,"),
        (("eval", "options.yaml", "--config", "runs.json"), "give one of them"),
        (("eval",), "eval: name a model and files"),
        ((*CONFIG, "--all", "-r", "lora_r=0"), "run 'plain': lora_r: expected a positive"),
        (
            (*CONFIG, "--all", "-r", "base_model=bose.ckpt"),
            "base_model: 'bose.ckpt' does not exist. Did you mean 'base.ckpt'?",
        ),
        ((*CONFIG, "--all", "-r", "dataset_path=t.xyz"), "data: 't.xyz' does not exist."),
    ],
)
def test_what_cannot_be_meant_is_told_before_any_training(runs, command, arguments, message):
    answer = command(*arguments)
    assert answer.code == 1
    assert message in answer.err
    assert not list(Path("lora_adapters").rglob("*.ckpt"))
