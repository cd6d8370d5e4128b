"""Stopping a run and going on: exactly, anywhere, or not at all."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.training.loggers import RunDisplay
from tiny_data import molecules, options, write_frames, write_options

# Eight training structures in batches of three: three steps an epoch.
METHODS = {
    "lora": ({"ema": 0.9, "finetune": {"config": {"dropout": 0.2}}}, ("-c", "base.ckpt")),
    "qlora": ({"finetune": {"method": "qlora"}}, ("-c", "base.ckpt")),
    "prompt": (
        {"ema": 0.9, "finetune": {"method": "prompt", "config": {"num_prompts": 2}}},
        ("-c", "base.ckpt"),
    ),
    "dora": ({"finetune": {"method": "dora", "config": {"rank": 2}}}, ("-c", "base.ckpt")),
    "rslora": (
        {"finetune": {"config": {"rank": 2, "use_rslora": True}}},
        ("-c", "base.ckpt"),
    ),
    "heads": ({"finetune": {"method": "heads"}}, ("-c", "base.ckpt")),
    "unfreezing": (
        {
            "swa": {"start": 0.4},
            "finetune": {"method": "full", "unfreeze": 1, "config": {"layer_decay": 0.8}},
        },
        ("-c", "base.ckpt"),
    ),
    "full": ({"finetune": {"method": "full"}}, ("-c", "base.ckpt")),
    "replay": (
        {
            "finetune": {
                "method": "full",
                "replay": {"fraction": 0.5},
                "anchor": "ewc",
                "retention": {"every": 2},
            }
        },
        ("-c", "base.ckpt"),
    ),
    "scratch": ({}, ()),
}
TIMES = ("seconds", "structures_per_second")


def write(training=None, **top):
    content = options({"num_epochs": 3, **(training or {})}, **top)
    content["architecture"]["model"] = {"d_pet": 8, "d_node": 8, "d_head": 8, "d_feedforward": 8,
                                        "num_heads": 2, "num_gnn_layers": 1}  # fmt: skip
    write_options(Path("mine.yaml"), content)


def _average(trainer):
    return trainer["features"].get("average", {}).get("average", {})


def outcome(folder):
    """All that must be the same however often a run was stopped."""
    last = load_checkpoint(Path(folder, "last.ckpt")).training["trainer"]
    best = load_checkpoint(Path(folder, "best_model.ckpt"))
    with Path(folder, "train.csv").open(newline="") as stream:
        table = [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(stream)]
    tensors = {**last["trained"], **{f"average {n}": v for n, v in _average(last).items()}}
    tensors |= {f"best {n}": v for n, v in best.model.state_dict().items()}
    results = json.loads(Path(folder, "results.json").read_text())
    return tensors, (table, results, best.provenance["epoch"])


_WHOLE = {}


@pytest.fixture
def assert_whole(command, stop):
    """Compare a folder with the same run that was never stopped, which is made once only."""

    def check(folder, method):
        if method not in _WHOLE:
            training, start = METHODS[method]
            write(training)
            stop(0)
            assert command("train", "mine.yaml", *start, "-o", "whole").code == 0
            _WHOLE[method] = outcome("whole")
        assert_same(folder, _WHOLE[method])

    return check


def assert_same(folder, expected):
    (first, first_facts), (second, second_facts) = outcome(folder), expected
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first_facts == second_facts


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("lora", 2),
        ("lora", 3),
        ("lora", 7),
        ("qlora", 4),
        ("prompt", 4),
        ("dora", 4),
        ("rslora", 4),
        ("heads", 4),
        ("unfreezing", 2),
        ("unfreezing", 7),
        ("full", 4),
        ("scratch", 5),
        ("replay", 2),
        ("replay", 4),
    ],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(here, command, stop, assert_whole, method, steps):
    training, start = METHODS[method]
    write(training)
    stop(steps)
    answer = command("train", "mine.yaml", *start, "-o", "part")
    assert answer.code == 130
    assert answer.out == ""
    assert not Path("part/results.json").exists()
    # The options file alone, without -c: the run knows where it came from.
    answer = command("train", "mine.yaml", "--restart", "part")
    assert answer.code == 0, answer.err
    assert f"going on after epoch {steps // 3 if steps % 3 else steps // 3 - 1}" in answer.err
    assert "until now the run had" not in answer.err
    assert_whole("part", method)


def test_it_says_how_to_go_on_and_that_works(here, command, stop, assert_whole):
    write(METHODS["lora"][0])
    stop(4)
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part")
    assert "interrupted; the state is saved" in answer.err
    told = answer.err.strip().rsplit("Go on with: pet-finetune ", 1)[1].split()
    answer = command(*told)
    assert answer.code == 0
    assert "has no effect" not in answer.err
    assert_whole("part", "lora")


def test_overrides_of_the_run_are_kept_in_what_it_says(here, command, stop):
    write()
    override = ("-r", "architecture.training.learning_rate=0.01", "-r", "seed=8")
    command("train", "mine.yaml", *override, "-o", "whole")
    stop(4)
    answer = command("train", "mine.yaml", *override, "-o", "part")
    told = answer.err.strip().rsplit("Go on with: pet-finetune ", 1)[1].split()
    assert command(*told).code == 0
    assert_same("part", outcome("whole"))


def test_auto_takes_the_newest_run(here, command, stop, assert_whole):
    write()
    older = Path("outputs/2020-01-01/12-00-00/last.ckpt")
    older.parent.mkdir(parents=True)
    older.write_text("")
    stop(5)
    assert command("train", "mine.yaml").code == 130
    os.utime(older, (2**32, 2**32))  # file times are those of the last copy
    answer = command("train", "mine.yaml", "--restart", "auto")
    assert answer.code == 0, answer.err
    (part,) = set(Path("outputs").glob("*/*")) - {older.parent}
    assert_whole(part, "scratch")


def test_stopped_again_and_again(here, command, stop, assert_whole):
    write(METHODS["lora"][0])
    stop(1)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part")
    answer = None
    for _ in range(20):
        stop(3)
        answer = command("train", "mine.yaml", "--restart", "part/last.ckpt")
        if answer.code == 0:
            break
    stop(0)  # never again
    assert answer.code == 0
    assert_whole("part", "lora")


def test_going_on_in_another_folder(here, command, stop, assert_whole):
    write(METHODS["lora"][0])
    stop(7)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part")
    before = {path: path.read_bytes() for path in Path("part").iterdir() if path.is_file()}
    answer = command("train", "mine.yaml", "--restart", "part", "-o", "other")
    assert answer.code == 0, answer.err
    assert_whole("other", "lora")
    assert {p: p.read_bytes() for p in Path("part").iterdir() if p.is_file()} == before
    assert Path("other/options.yaml").exists()
    assert Path("other/adapter").is_dir()


def test_a_finished_run_only_shows_its_table_again(here, command):
    write()
    first = command("train", "mine.yaml", "-o", "run")
    again = command("train", "mine.yaml", "--restart", "run")
    assert again.code == 0, again.err
    assert again.out == first.out
    assert "epoch 1/3" not in again.err


def test_more_epochs_are_a_change_that_is_told(here, command):
    write()
    command("train", "mine.yaml", "-o", "run")
    name = "architecture.training.num_epochs"
    answer = command("train", "mine.yaml", "--restart", "run", "-r", f"{name}=5")
    assert answer.code == 0, answer.err
    assert f"{name} is 5; until now the run had 3" in answer.err
    with Path("run/train.csv").open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1", "2", "3", "4", "5"]


def test_each_option_that_changed_is_told_the_seed_too(here, command, stop):
    write(METHODS["lora"][0])
    stop(3)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    training = "architecture.training"
    changes = {
        "seed": 9,
        "final_eval": "false",
        f"{training}.scheduler": "constant",
        f"{training}.finetune.config.dropout": 0.1,
        f"{training}.log_interval": 7,
    }
    overrides = [word for name, value in changes.items() for word in ("-r", f"{name}={value}")]
    answer = command("train", "mine.yaml", "--restart", "run", *overrides)
    assert answer.code == 0, answer.err
    told = re.findall(r"--restart: (.*)", answer.err)
    begun = "as it began"
    assert told == [
        f"{training}.finetune.config.dropout is 0.1; the run goes on with 0.2, {begun}",
        f"{training}.scheduler is constant; until now the run had cosine",
        "final_eval is False; until now the run had True",
        f"seed is 9; the run goes on with 5, {begun}",
    ]
    assert "seed 5," in answer.err


def test_final_evaluation_switched_on_later(here, command, stop):
    write(final_eval=False)
    stop(2)
    command("train", "mine.yaml", "-o", "run")
    answer = command("train", "mine.yaml", "--restart", "run", "-r", "final_eval=true")
    assert answer.code == 0, answer.err
    assert "forces MAE" in answer.out


def failing(command, *arguments):
    answer = command("train", "mine.yaml", *arguments)
    assert answer.code == 1
    assert answer.err.count("error:") == 1
    return answer.err.split("error:", 1)[1]


def test_other_data_are_refused(here, command, stop):
    write()
    stop(2)
    command("train", "mine.yaml", "-o", "run")
    write_frames(Path("train.xyz"), molecules(10, seed=5))
    message = failing(command, "--restart", "run")
    assert "is not the one that run/splits.json was written for" in message
    assert "Start a new run" in message


def test_other_batches_are_refused_within_an_epoch(here, command, stop):
    write()
    stop(2)
    command("train", "mine.yaml", "-o", "run")
    name = "architecture.training.batch_size"
    message = failing(command, "--restart", "run", "-r", f"{name}=2")
    assert f"{name} is 2, but the run stopped within an epoch" in message
    assert command("train", "mine.yaml", "--restart", "run").code == 0


def test_what_cannot_be_gone_on_with(here, command):
    write()
    command("train", "mine.yaml", "-o", "run")
    assert "holds a model but no run" in failing(command, "--restart", "run/best_model.ckpt")
    command("export", "base.ckpt", "--format", "metatrain", "-o", "theirs.ckpt")
    message = failing(command, "--restart", "theirs.ckpt")
    assert "theirs.ckpt is a checkpoint of metatrain" in message
    assert "-c theirs.ckpt -r architecture.training.finetune.method=full" in message
    assert "there is no file 'nowhere'" in failing(command, "--restart", "nowhere")
    assert "give one of them" in failing(command, "--restart", "run", "-c", "base.ckpt")
    assert "holds a run already" in failing(command, "-o", "run")
    assert "holds a run already" in failing(command, "-c", "base.ckpt", "-o", "run")
    Path("run/best_model.ckpt").unlink()
    assert "the best model of this run so far, is gone" in failing(command, "--restart", "run")


def test_a_second_interrupt_stops_at_once(here, command, monkeypatch, assert_whole):
    def twice(self, *ignored):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    display = RunDisplay.step_ended
    monkeypatch.setattr(RunDisplay, "step_ended", twice)
    write()
    answer = command("train", "mine.yaml", "-o", "run")
    assert answer.code == 130
    assert answer.err.endswith("interrupted\n")
    monkeypatch.setattr(RunDisplay, "step_ended", display)
    assert command("train", "mine.yaml", "-o", "run", "--restart", "auto").code == 0
    assert_whole("run", "scratch")
