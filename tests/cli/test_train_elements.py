"""Fine-tuning on elements that the starting model lacks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from models import SPECIES
from pet_finetune import PETCalculator
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.layers import ROWS
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.training.loggers import RunDisplay
from tiny_data import molecules, options, write_frames, write_options

METHODS = ("full", "heads", "lora", "prompt")
ROUTES = [f"{part}.weight" for part in ("edge_embedder", "gnn_layers.1.neighbor_embedder")]


@pytest.fixture
def nitrogen(here):
    """Data with nitrogen, which base.ckpt lacks."""
    write_frames(here / "train.xyz", molecules(12, names=("NH3", "CH3OH", "H2O")))
    write_frames(here / "test.xyz", molecules(4, seed=1, names=("NH3", "HCN")))
    return here


def content(method, new_elements, **training):
    finetune = {"method": method, "read_from": "base.ckpt", "new_elements": new_elements}
    return options({**training, "finetune": finetune})


def failing(command, finetune_new):
    write_options(Path("mine.yaml"), content("full", finetune_new))
    answer = command("train", "mine.yaml", "-o", "run")
    assert answer.code == 1
    assert not Path("run/best_model.ckpt").exists()
    return answer.err.split("error: ", 1)[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_new_element_is_learnt(nitrogen, train, command, method):
    answer = train(content(method, "nearest", weight_decay=0.1, ema=0.9))
    assert "element N is new and starts with the embeddings of C" in answer.err
    assert ("embeddings of new elements 28" in answer.err) == (method != "full")
    base, model = load_checkpoint("base.ckpt"), load_checkpoint("run/best_model.ckpt")
    assert model.model.species == (1, 6, 7, 8, 14)
    assert model.provenance["new_elements"] == {"N": "C"}
    assert model.provenance["parent_fingerprint"] == weights_fingerprint(base.model)
    rows, known = model.model.network.state_dict(), base.model.network.state_dict()
    for name in ROUTES:
        moved = (rows[name][[0, 1, 3, 4]] != known[name]).any()
        assert bool(moved) == (method == "full"), name
        assert not torch.equal(rows[name][2], known[name][1])
    nh3 = molecules(1, names=("NH3",))[0]
    nh3.calc = PETCalculator("run/best_model.ckpt")
    forces = nh3.get_forces()
    assert abs(forces).max() > 0
    if method in ("lora", "prompt"):
        nh3.calc = PETCalculator("base.ckpt", adapter="run/adapter")
        assert (nh3.get_forces() == forces).all()
    told = command("info", "run/best_model.ckpt").out
    assert "H C N O Si" in told
    assert "new elements N" in told


def test_random_and_named_starts(nitrogen, train):
    answer = train(content("full", "random"))
    assert "element N is new and starts at random" in answer.err


def test_a_named_start(nitrogen, train):
    answer = train(content("full", {"N": "O", "Br": "H"}))
    assert "element N is new and starts with the embeddings of O" in answer.err
    assert "no structure holds Br; it is not added" in answer.err


def test_nothing_new_changes_nothing(here, train):
    train(content("heads", "nearest"))
    assert load_checkpoint("run/best_model.ckpt").model.species == SPECIES


def test_without_the_option_the_error_says_how(nitrogen, command):
    message = failing(command, None)
    assert "N (Z=7): " in message
    assert "set finetune.new_elements: nearest" in message


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"N": "C", "O": "H"}, "finetune.new_elements.O: the model knows it already. Remove it."),
        ({"N": "P"}, "finetune.new_elements.N: the model lacks P too. It knows H, C, O, Si; the "
         "nearest to N is C."),
        ({"Br": "O"}, "the structures hold N too, which the model lacks. Add N: C"),
    ],
)  # fmt: skip
def test_mappings_that_cannot_be_meant(nitrogen, command, new, message):
    assert message in failing(command, new)


def test_an_element_that_no_training_structure_holds(here, command):
    write_frames(here / "test.xyz", molecules(4, names=("NH3",)))
    assert "N: in validation or test structures only" in failing(command, "nearest")


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_as_if_it_had_not_been(nitrogen, command, monkeypatch, method):
    write_options(Path("mine.yaml"), content(method, "random", ema=0.9))
    assert command("train", "mine.yaml", "-o", "whole").code == 0
    left = [4]

    def step(self, *ignored):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunDisplay, "step_ended", step)
    assert command("train", "mine.yaml", "-o", "part").code == 130
    assert command("train", "mine.yaml", "--restart", "part").code == 0
    for file in ("last.ckpt", "best_model.ckpt"):
        whole, part = (load_checkpoint(Path(run, file)) for run in ("whole", "part"))
        first, second = whole.model.state_dict(), part.model.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    trained = load_checkpoint("part/last.ckpt").training["trainer"]["trained"]
    assert any(name.endswith(ROWS) for name in trained) == (method != "full")
