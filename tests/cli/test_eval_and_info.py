"""``pet-finetune eval`` and ``info``: what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from ase.data import chemical_symbols

from models import SMALL, random_potential
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from tiny_data import crystals, molecules, options, write_frames, write_options


@pytest.fixture
def run(here, command):
    """A finished LoRA run in the folder ``run``."""
    assert command("train", "options.yaml", "-c", "base.ckpt", "-o", "run").code == 0
    return Path("run")


def number(answer, row, title=""):
    """The figure in a row of a printed table."""
    table = answer.out[answer.out.index(title) :]
    (line,) = [line for line in table.splitlines() if f" {row} " in line][:1]
    return float(line.split("│")[-2])


def test_a_model_on_files(run, command):
    answer = command("eval", "run/best_model.ckpt", "test.xyz", "train.xyz")
    assert answer.code == 0, answer.err
    assert "test.xyz (4 structures)" in answer.out
    assert "train.xyz (10 structures)" in answer.out
    expected = json.loads((run / "results.json").read_text())["after"]["test"]["energy"]
    assert number(answer, "forces MAE") == pytest.approx(1000 * expected["forces_mae"], abs=0.006)
    assert number(answer, "energy RMSE") == pytest.approx(1000 * expected["energy_rmse"], abs=0.006)
    titles = ("test.xyz (4", "train.xyz (10", "2 files together")
    test, train, both = (number(answer, "energy MAE", title) for title in titles)
    assert both == pytest.approx((4 * test + 10 * train) / 14, abs=0.011)  # all are rounded


def test_orientations_are_compared_where_asked_for(run, command):
    plain = command("eval", "run/best_model.ckpt", "test.xyz")
    answer = command("eval", "run/best_model.ckpt", "test.xyz", "--rotations", "3")
    assert answer.code == 0, answer.err
    assert "orientations" not in plain.out + plain.err
    text = answer.out + answer.err
    found = re.search(r"3 random orientations: energy ([\d.]+) meV/atom, forces ([\d.]+)", text)
    assert float(found[2]) > 0.01
    assert "% of their MAE" in text
    wrong = command("eval", "run/best_model.ckpt", "test.xyz", "--rotations", "1")
    assert wrong.code != 0
    assert "Give 2 or more" in wrong.err


def test_the_sets_of_an_options_file(run, command):
    results = json.loads((run / "results.json").read_text())["after"]
    for file in ("options.yaml", "run/options.yaml"):
        answer = command("eval", file, "-c", "run/best_model.ckpt")
        assert answer.code == 0, answer.err
        for name, size in (("validation", 2), ("test", 4)):
            title = f"{name} ({size} structures)"
            found = number(answer, "forces MAE", title)
            expected = 1000 * results[name]["energy"]["forces_mae"]
            assert found == pytest.approx(expected, abs=0.006)


def test_base_and_adapter_give_the_merged_models_errors(run, command):
    merged = command("eval", "run/best_model.ckpt", "test.xyz")
    adapted = command("eval", "base.ckpt", "test.xyz", "--adapter", "run/adapter")
    assert adapted.out == merged.out
    assert command("eval", "base.ckpt", "test.xyz").out != merged.out


def test_options_can_be_overridden_and_narrowed(run, command):
    answer = command(
        "eval", "options.yaml", "-c", "run/best_model.ckpt", "-r", "test_set=0.3", "--device",
        "cpu", "--target", "energy",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "test (3 structures)" in answer.out


def test_sets_drawn_without_a_seed_are_not_those_of_training(run, command):
    content = options()
    del content["seed"]
    write_options(Path("mine.yaml"), content)
    answer = command("eval", "mine.yaml", "-c", "base.ckpt")
    assert answer.code == 0
    assert "no seed in the options" in answer.err


def test_older_spellings_are_told_here_too(run, command):
    write_options(Path("mine.yaml"), options({"LORA_RANK": 4}))
    answer = command("eval", "mine.yaml", "-c", "base.ckpt")
    assert answer.code == 0
    assert "LORA_RANK is an older spelling; today:" in answer.err


def test_a_model_with_one_energy_of_another_name(here, command):
    save_checkpoint("other.ckpt", random_potential(targets=("energy/pbe",)))
    answer = command("eval", "other.ckpt", "test.xyz")
    assert answer.code == 0, answer.err
    assert "forces MAE" in answer.out


def test_stress_is_compared_where_there_is_one(here, command):
    write_frames(Path("si.xyz"), [*crystals(2), *molecules(1)])
    answer = command("eval", "base.ckpt", "si.xyz")
    assert number(answer, "stress MAE") > 0


def test_info_of_a_run(run, command):
    answer = command("info", "run/best_model.ckpt", "run/last.ckpt")
    assert answer.code == 0
    model = load_checkpoint("run/best_model.ckpt").model
    for text in (
        "best_model.ckpt", "5,222 (float32)", "H C O Si", "3.5 A (Bump, 0.5 A wide)", "d_pet 8",
        "energy", "lora", "base", weights_fingerprint(model), "8 structures",
        "pet-finetune, can be resumed",
    ):  # fmt: skip
        assert text in answer.out
    assert answer.err == ""


def test_info_of_a_bare_model(here, command):
    answer = command("info", "base.ckpt")
    assert "not recorded in the file" in answer.out
    assert "can be resumed" not in answer.out


def test_info_of_a_universal_model_has_its_elements_side_by_side(here, command):
    options = ModelOptions.model_validate(SMALL)
    model = Potential(options, range(1, 90), [TargetSpec("energy")])
    model.composition.set("energy", torch.arange(1.0, 90.0, dtype=torch.float64))
    save_checkpoint("universal.ckpt", model)
    table = command("info", "universal.ckpt").out.partition("baseline per species")[2]
    table = table.partition("family tree")[0]
    for number in range(1, 90):
        assert re.search(rf"\b{chemical_symbols[number]} *│ *{number}\.0000 ", table), number
    assert len(table.splitlines()) < 40


def test_info_of_a_long_line_of_ancestors_fits_a_screen(here, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    provenance: dict = {"format": "metatrain", "format_version": 16}
    for number in range(20):
        provenance = {
            "parent": f"model-{number}",
            "parent_fingerprint": "f" * 64,
            "parent_provenance": provenance,
            "options": {"architecture": {"training": {"finetune": {"method": "lora"}}}},
            "data": {"train": {"structures": 1000 + number, "fingerprint": "a" * 64}},
            "written": "2026-11-29 16:18:51",
            "epoch": number,
            "note": "a note [with brackets] " * 9,
        }
    save_checkpoint(here / "old.ckpt", random_potential(), provenance=provenance)
    answer = command("info", "old.ckpt")
    tree = answer.out[answer.out.index("family tree") :].rstrip().splitlines()
    assert len(tree) <= 40
    assert max(map(len, tree)) <= 80
    assert "this file: lora, 1,019 structures, epoch 19, 2026-11-29" in answer.out
    assert "└ model-19: lora, 1,018 structures" in answer.out
    assert "and 9 earlier ones (--json lists all)" in answer.out
    assert "parent_provenance" not in answer.out
    facts = json.loads(command("info", "--json", "old.ckpt").out)[0]
    depth, own = 0, facts["provenance"]
    while own.get("parent_provenance"):
        depth, own = depth + 1, own["parent_provenance"]
    assert depth == 20
