"""``pet-finetune inspect``, and the same look at the data before ``train``."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.load import load_options
from tiny_data import data_section, molecules, options, write_frames, write_options


@pytest.fixture
def molecules_here(here: Path, repository: Path) -> Path:
    """The shipped molecules without nitrogen, beside the other files."""
    for name in ("train", "val"):
        frames = ase.io.read(repository / "datasets" / f"molecules_pbe0_{name}.xyz", ":")
        kept = [atoms for atoms in frames if "N" not in atoms.symbols]
        write_frames(here / f"real_{name}.xyz", kept)
    return here


def report(command, *arguments) -> dict:
    answer = command("inspect", *arguments, "--json")
    content = json.loads(answer.out)
    assert answer.code == int(any(f["severity"] == "error" for f in content["findings"]))
    return content


def codes(content: dict) -> list[str]:
    return [finding["code"] for finding in content["findings"]]


def test_a_file_alone(molecules_here, command):
    answer = command("inspect", "real_train.xyz")
    assert answer.code == 0
    assert "122, 1038" in answer.out
    assert "H (122), C (122), O (122)" in answer.out
    assert "findings: none" in answer.out
    assert "from scratch" in answer.out


def test_everything_as_json(molecules_here, command):
    content = report(command, "real_train.xyz", "--validation", "real_val.xyz", "-c", "base.ckpt")
    assert content["compared"] == 152
    assert content["facts"]["sets"]["validation"]["structures"] == 30
    assert content["facts"]["sets"]["train"]["forces"] == 122
    assert [one["method"] for one in content["estimates"]] == ["full", "lora", "heads"]
    assert content["load"]["neighbours"] > 3
    # The foundation is random, and the labels are right: the data's own evidence wins.
    assert "units" not in codes(content)


def test_findings_name_frames(molecules_here, command):
    frames = ase.io.read("real_train.xyz", ":")
    validation = ase.io.read("real_val.xyz", ":")
    write_frames(Path("leaky.xyz"), [*validation, frames[11]])
    answer = command("inspect", "real_train.xyz", "--validation", "leaky.xyz")
    assert answer.code == 0
    for words in ("warning leak: 1 of 31", "leaky.xyz: frame 30", "why: ", "do: "):
        assert words in answer.out


def test_errors_are_listed_together(here, command):
    frames = molecules(6)
    frames[2].calc = SinglePointCalculator(frames[2], energy=np.nan)
    frames[3].calc = None
    write_frames(here / "train.xyz", frames)
    content = report(command, "train.xyz")
    assert {"not-finite-energy", "missing-energy"} <= set(codes(content))
    answer = command("train", "options.yaml", "-o", "run")
    assert answer.code == 1
    assert "The data have 2 problems" in answer.err
    assert "not-finite-energy" in answer.err
    assert "missing-energy" in answer.err


def test_suggested_options_train(here, command, monkeypatch):
    answer = command("inspect", "train.xyz", "-c", "base.ckpt", "--write-options", "new.yaml")
    assert answer.code == 0, answer.err
    loaded = load_options("new.yaml")
    assert loaded.options.finetune.read_from == "base.ckpt"
    assert not loaded.notices
    short = "architecture.training.num_epochs=1"
    answer = command("train", "new.yaml", "-o", "run", "-r", short)
    assert answer.code == 0, answer.err
    again = command("inspect", "train.xyz", "--write-options", "new.yaml")
    assert "is not overwritten" in again.err


def test_suggested_options_convert_units(molecules_here, command):
    factor = 23.0605
    frames = ase.io.read("real_train.xyz", ":")
    for atoms in frames:
        results = {name: value * factor for name, value in atoms.calc.results.items()}
        atoms.calc = SinglePointCalculator(atoms, **results)
    write_frames(Path("kcal.xyz"), frames)
    command("inspect", "kcal.xyz", "--write-options", "new.yaml")
    target = load_options("new.yaml").options.training_set[0].targets["energy"]
    assert target.unit == "kcal/mol"
    assert "units" not in codes(report(command, "new.yaml"))


def test_the_sets_of_an_options_file(here, command):
    content = report(command, "options.yaml", "-c", "base.ckpt")
    counts = {name: own["structures"] for name, own in content["facts"]["sets"].items()}
    assert counts == {"train": 8, "validation": 2, "test": 4}
    other = report(command, "options.yaml", "test.xyz", "-r", "validation_set=0.5")
    counts = {name: own["structures"] for name, own in other["facts"]["sets"].items()}
    assert counts == {"train": 2, "validation": 2, "test": 4}
    assert "leak" in codes(other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.yaml", "b.yaml"), "one options file, not 2"),
        (("options.yaml", "--test", "test.xyz"), "names the sets"),
        (("train.xyz", "-r", "seed=1"), "no options file is given"),
        (("trian.xyz",), "Did you mean 'train.xyz'?"),
    ],
)
def test_arguments_that_do_not_fit(here, command, arguments, words):
    answer = command("inspect", *arguments)
    assert answer.code == 1
    assert words in answer.err


class TestBeforeTraining:
    """What ``train`` does with the findings."""

    def content(self) -> dict:
        held_out = {"validation_set": data_section("leaky.xyz"), "test_set": 0.0}
        return options({"num_epochs": 1}, **held_out)

    @pytest.fixture(autouse=True)
    def _leak(self, here):
        write_frames(here / "leaky.xyz", ase.io.read("train.xyz", ":3"))

    def test_warnings_are_printed_and_logged(self, train):
        answer = train(self.content(), "-c", "base.ckpt")
        assert "data: leak: 3 of 3 validation frames" in answer.err
        assert "data: leak: 3 of 3" in Path("run/train.log").read_text("utf-8")

    def test_not_on_demand(self, train):
        answer = train(self.content(), "-c", "base.ckpt", "--no-check")
        assert "data: " not in answer.err

    def test_not_when_a_run_goes_on(self, train, command, stop):
        write_options(Path("mine.yaml"), self.content())
        stop(2)
        first = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
        assert first.code == 130
        again = command("train", "mine.yaml", "--restart", "run")
        assert again.code == 0, again.err
        assert "data: leak" in first.err
        assert "data: " not in again.err

    def test_the_run_is_the_same(self, train):
        weights = []
        for arguments in ((), ("--no-check",)):
            train(self.content(), "-c", "base.ckpt", *arguments)
            weights.append(load_checkpoint("run/best_model.ckpt").model.state_dict())
            Path("run").rename(f"run{len(weights)}")
        first, second = weights
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_several_errors_stop_it_with_one_message(self, here, command):
        frames = molecules(6, names=("CH3OH", "NH3"))
        frames[0].positions[1] = frames[0].positions[0]
        write_frames(here / "train.xyz", frames)
        answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run")
        assert answer.code == 1
        assert "The data have 2 problems" in answer.err
        assert "same-place" in answer.err
        assert "N (Z=7)" in answer.err
        assert not Path("run/best_model.ckpt").exists()
