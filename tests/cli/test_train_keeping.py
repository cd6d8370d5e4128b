"""Keeping what the foundation knew: report, replay, anchor and dimer curves of whole runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from models import random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.readers import probe_structures
from pet_finetune.forgetting.retention import RetentionSet
from pet_finetune.training.sets import label_with
from tiny_data import data_section, epochs, molecules, options, write_frames, write_options

FULL = {"method": "full"}


def finetune(training=None, **sections):
    return options({"num_epochs": 2, **(training or {}), "finetune": sections})


def results(folder="run"):
    return json.loads(Path(folder, "results.json").read_text())


def test_the_report_stands_in_log_table_csv_and_results(here, train, reported):
    answer = train(finetune(method="lora"), "-c", "base.ckpt")
    before, after = (results()[name]["retention"]["energy"] for name in ("before", "after"))
    assert before["forces_mae"] < 1e-6 < after["forces_mae"]
    assert before["energy_mae"] < 1e-6 < after["energy_mae"]
    assert f"{1000 * after['forces_mae']:.2f}" in answer.out
    assert answer.out.count("forgetting: ") == 5  # four rows, and what they are of
    rows = epochs("run")
    best = [row for row in rows if row["best"] == "1"][-1]
    assert float(best["retention/energy/forces_mae"]) == pytest.approx(
        after["forces_mae"], rel=1e-3
    )
    log = Path("run/train.log").read_text()
    assert "forgetting: 'energy' of" in log
    assert "(probe) compared with the starting model's own predictions every 1 epochs" in log
    assert log.count("| forgetting energy") == 2


def test_the_report_is_the_error_against_the_foundation(here, train, reported):
    """Computed again from the two checkpoints alone; the baseline's shift does not count."""
    train(finetune({"track_energy_offset": 0}, method="full"), "-c", "base.ckpt")
    base, tuned = (load_checkpoint(name).model for name in ("base.ckpt", "run/best_model.ckpt"))
    moved = tuned.composition.get("energy") - base.composition.get("energy")
    assert float(moved.abs().max()) > 10.0
    base.composition.set("energy", tuned.composition.get("energy"))
    labelled = label_with(base, probe_structures(base.species), ["energy"])
    expected = RetentionSet(labelled, ["energy"], base, 1).errors(tuned)["energy"].as_dict()
    assert results()["after"]["retention"]["energy"] == pytest.approx(expected, rel=1e-4)


def test_rows_between_two_reports_are_empty(here, train):
    content = finetune({"num_epochs": 5}, method="heads", retention={"every": 3})
    train(content, "-c", "base.ckpt")
    cells = [row["retention/energy/energy_mae"] for row in epochs("run")]
    assert [bool(cell) for cell in cells] == [True, False, True, False, False]


def test_a_labelled_file_of_the_foundations_own_kind(here, train):
    write_frames(Path("old.xyz"), molecules(6, seed=3))
    content = finetune(method="heads", retention="old.xyz")
    train(content, "-c", "base.ckpt")
    before = results()["before"]["retention"]["energy"]
    assert before["forces_mae"] > 0.01  # the foundation is not without errors itself
    assert "6 structures (old.xyz) compared with their labels of 'energy'" in (
        Path("run/train.log").read_text()
    )


def test_switched_off_or_impossible(here, train, command):
    answer = train(finetune(method="heads", retention="off"), "-c", "base.ckpt")
    assert "forgetting" not in answer.out + answer.err
    assert "retention" not in results()["before"]
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "other", "-r",
                     "final_eval=false", "-r",
                     "architecture.training.finetune.retention=null")  # fmt: skip
    assert answer.code == 0, answer.err
    assert "retention/energy/forces_mae" in epochs("other")[0]
    found = results("other")
    assert (found["before"], found["after"], "dimers" in found) == ({}, {}, False)
    assert not list(Path("other").glob("dimers*"))


def test_without_structures_of_its_elements_there_is_no_report(here, train, monkeypatch):
    monkeypatch.setattr("pet_finetune.forgetting.retention.probe_structures", lambda species: [])
    answer = train(finetune(method="heads"), "-c", "base.ckpt")
    assert "no forgetting report: no structure of the probe set" in answer.err
    assert "retention" not in results()["before"]


def test_from_scratch_there_is_nothing_to_forget(here, train):
    content = options()
    content["architecture"]["model"] = {"d_pet": 8, "d_node": 8, "d_head": 8, "num_heads": 2,
                                        "d_feedforward": 8, "num_gnn_layers": 1}  # fmt: skip
    answer = train(content)
    assert "forgetting" not in answer.out + answer.err
    assert {"kept.pt", "dimers.csv"}.isdisjoint(p.name for p in Path("run").iterdir())


def new_target(content, name="energy/new"):
    content["training_set"]["targets"] = {name: {"key": "energy", "unit": "eV"}}
    content["test_set"] = 0.1
    return content


def test_full_replay_keeps_the_foundations_head_beside_the_users(here, train):
    content = new_target(finetune(method="full", replay={"structures": ["training", "probe"]}))
    answer = train(content, "-c", "base.ckpt")
    model = load_checkpoint("run/best_model.ckpt").model
    assert list(model.targets) == ["energy", "energy/new"]
    base = load_checkpoint("base.ckpt").model
    assert torch.equal(model.composition.get("energy"), base.composition.get("energy"))
    assert set(results()["after"]["retention"]) == {"energy", "energy/new"}
    assert "labelled by the starting model for 'energy'; 1 beside each batch of 3" in answer.err
    assert "the forgetting report looks at the structures that are replayed" in answer.err


def test_an_adapter_replays_through_the_users_head(here, train):
    content = new_target(finetune(method="lora", replay={"copies": 2, "fraction": 0.5}))
    answer = train(content, "-c", "base.ckpt")
    assert "labelled by the starting model for 'energy/new'; 3 beside each batch" in answer.err
    assert list(load_checkpoint("run/best_model.ckpt").model.targets) == ["energy/new"]
    assert float(epochs("run")[0]["train/replay"]) > 0


def test_real_data_of_the_pre_training_kind(here, train):
    write_frames(Path("old.xyz"), molecules(6, seed=3))
    replay = {"read_from": data_section("old.xyz"), "weight": 0.5}
    answer = train(new_target(finetune(method="full", replay=replay)), "-c", "base.ckpt")
    assert "replay: 6 structures of old.xyz for 'energy'" in answer.err
    assert float(epochs("run")[0]["train/replay"]) > 0


def test_of_large_pools_the_most_different_structures_are_taken(here, train):
    keep = {
        "replay": {"structures": ["training", "probe"], "copies": 3, "max_structures": 7},
        "retention": {"max_structures": 2},
    }
    answer = train(finetune({"num_epochs": 1}, method="full", **keep), "-c", "base.ckpt")
    assert re.search(r"replay: 7 of \d\d structures, the most different ones", answer.err)
    assert "replay: 7 structures (training, probe) labelled by the starting model" in answer.err
    assert "forgetting: 'energy' of 2 structures (probe) compared" in answer.err


def test_replay_and_anchor_reduce_forgetting(here, train, reported):
    """On structures that are not among those replayed."""
    training = {"num_epochs": 5, "batch_size": 2, "learning_rate": 5e-3}
    left = {}
    frames = molecules(12, seed=8, names=("CH4", "CH3CHO", "C2H6", "SiH4"))
    for atoms in frames:
        atoms.calc = None
    write_frames(Path("others.xyz"), frames)
    for name, sections in {
        "none": {},
        "replay": {"replay": {"structures": "others.xyz", "fraction": 0.7}},
        "anchor": {"anchor": {"type": "ewc", "strength": 300.0}},
    }.items():
        content = finetune(training, method="full", **sections)
        train(content, "-c", "base.ckpt", "-r", "final_eval=false")
        left[name] = float(epochs("run")[-1]["retention/energy/forces_mae"])
        Path("run").rename(name)
    assert left["replay"] < 0.8 * left["none"]
    assert left["anchor"] < 0.8 * left["none"]


def test_dimer_curves_before_and_after(here, train, reported):
    answer = train(finetune(method="full"), "-c", "base.ckpt")
    with Path("run/dimers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["pair"] for row in rows} == {"H-H", "H-C", "H-O", "C-C", "C-O", "O-O"}
    assert (rows[0]["distance"], rows[110]["distance"]) == ("0.5", "6")
    assert any(row["before"] != row["after"] for row in rows)
    assert Path("run/dimers.svg").read_text().startswith("<?xml")
    verdicts = results()["dimers"]
    assert set(verdicts) == {row["pair"] for row in rows}
    assert set(verdicts.values()) <= {"kept", "lost", "gained", "absent"}
    assert "repulsion at short distances (run/dimers.svg): " in answer.err


def test_a_wall_of_its_own_is_kept(here, train):
    model = random_potential(dtype=torch.float32, zbl=True)
    model.scale.set("energy", 1e-4)
    save_checkpoint("base.ckpt", model)
    train(finetune(method="heads"), "-c", "base.ckpt")
    assert results()["dimers"]["C-O"] == "kept"


def failing(command, *arguments):
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run", *arguments)
    assert answer.code == 1
    assert answer.err.count("error:") == 1
    assert not Path("run/train.csv").exists()
    return answer.err.split("error:", 1)[1]


def bare(path="bare.xyz"):
    frames = molecules(3)
    for atoms in frames:
        atoms.calc = None
    write_frames(Path(path), frames)


def foreign(path="foreign.xyz"):
    frames = molecules(3, names=("HF",))
    write_frames(Path(path), frames)


BAD = {
    "replay file missing": ({"replay": {"read_from": "oldd.xyz"}},
                            ("'oldd.xyz' does not exist",)),
    "unlabelled file missing": ({"replay": {"structures": "bore.xyz"}},
                                ("'bore.xyz' does not exist", "Did you mean 'bare.xyz'?")),
    "replay without labels": ({"replay": {"read_from": "bare.xyz"}}, ("bare.xyz", "'energy'")),
    "retention without labels": ({"retention": "bare.xyz"}, ("bare.xyz", "'energy'")),
    "species of the retention set": ({"retention": "foreign.xyz"},
                                     ("F (Z=9)", "foreign.xyz", "The model knows: H C O Si")),
    "species of replay": ({"replay": {"structures": "foreign.xyz"}}, ("F (Z=9)", "foreign.xyz")),
    "no such energy": (
        {"replay": {"read_from": {"systems": "train.xyz",
                                  "targets": {"energi": {"key": "energy", "quantity": "energy"}}}}},
        ("the starting model has no energy 'energi'", "Did you mean 'energy'?", "`key`")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_training(here, command, case):
    bare()
    foreign()
    sections, words = BAD[case]
    write_options(Path("mine.yaml"), finetune(method="full", **sections))
    message = failing(command)
    for word in words:
        assert word in message


def test_a_head_that_is_gone_cannot_be_replayed(here, command):
    two = random_potential(targets=("energy", "energy/b"), dtype=torch.float32)
    save_checkpoint("base.ckpt", two)
    replay = {"read_from": {"systems": "train.xyz", "targets": {"energy/b": {"key": "energy"}}}}
    write_options(Path("mine.yaml"), finetune(method="lora", replay=replay))
    assert "the head of 'energy/b' is not part of the new model" in failing(command)
    write_options(Path("mine.yaml"), new_target(finetune(method="lora", replay={})))
    assert "no head of the new model begins as one of the foundation's" in failing(command)
    write_options(Path("mine.yaml"), new_target(finetune(method="lora", anchor="ewc")))
    assert "no trained head begins as one" in failing(command)


def test_a_run_goes_on_with_what_it_kept_though_the_options_changed(here, command, train):
    content = finetune({"num_epochs": 1}, method="full", anchor="l2sp", replay={})
    train(content, "-c", "base.ckpt")
    plain = yaml.safe_load(Path("mine.yaml").read_text())
    plain["architecture"]["training"]["num_epochs"] = 2
    for name in ("anchor", "replay"):
        del plain["architecture"]["training"]["finetune"][name]
    write_options(Path("mine.yaml"), plain)
    answer = command("train", "mine.yaml", "--restart", "run")
    assert answer.code == 0, answer.err
    last = epochs("run")[-1]
    assert float(last["train/anchor"]) > 0
    assert float(last["train/replay"]) > 0


def test_a_run_without_its_kept_file_says_so(here, command, train):
    train(finetune({"num_epochs": 1}, method="heads"), "-c", "base.ckpt")
    Path("run/kept.pt").unlink()
    answer = command("train", "mine.yaml", "--restart", "run")
    assert answer.code == 1
    assert "'run/kept.pt', which holds what the run keeps" in answer.err


def test_heads_that_begin_at_random_are_not_anchored(here, train):
    two = random_potential(targets=("energy", "energy/b"), dtype=torch.float32)
    save_checkpoint("base.ckpt", two)
    training = {"num_epochs": 1, "finetune": {"method": "full", "anchor": "l2sp"}}
    train(new_target(options(training)), "-c", "base.ckpt")
    reference = torch.load("run/kept.pt", weights_only=True)["anchor"]["reference"]
    assert "edge_embedder.weight" in reference
    assert not [name for name in reference if "energy/new" in name]
