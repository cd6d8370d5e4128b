"""``pet-finetune train``: every way to start, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml

from models import SMALL
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.checkpoint.opening import load_checkpoint, open_potential
from pet_finetune.data.labelled_batch import batch_from_atoms
from tiny_data import epochs, options

TINY = {key: value for key, value in SMALL.items() if key != "num_attention_layers"}


def predictions(model, path="test.xyz", target=None):
    batch = batch_from_atoms(ase.io.read(path, ":"), model.cutoff, model.dtype)
    return model.predict(batch, target or next(iter(model.targets)), stress=True)


def test_lora_from_a_checkpoint(here, command):
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 0
    assert {path.name for path in Path("run").iterdir()} == {
        "adapter", "best_model.ckpt", "dimers.csv", "dimers.svg", "kept.pt", "last.ckpt",
        "options.yaml", "predictions.npz", "report.html", "results.json", "run.json",
        "splits.json", "train.csv", "train.log",
    }  # fmt: skip
    # The table is for the reader of the terminal, once; the file keeps a copy.
    assert answer.out.count("forces MAE") == 2  # on the test set, and what was forgotten
    assert "starting model (after refit)" in answer.out
    assert "4 test structures" in answer.out
    assert "adapter: run/adapter" in answer.out
    assert "forces MAE" not in answer.err
    log = Path("run/train.log").read_text()
    assert log.count("forces MAE") == 2
    for text in (
        "method not given: lora", "seed 5", "8 train, 2 validation, 4 test",
        "baseline of 'energy' (refit)", "parameters train", "epoch 2/2", "best model: epoch",
    ):  # fmt: skip
        assert text in log
        assert text in answer.err


def test_what_the_files_of_a_run_say(here, train):
    base = load_checkpoint("base.ckpt").model
    train(options({"num_epochs": 3}), "-c", "base.ckpt")
    found = epochs("run")
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert all(float(row["validation/energy/forces_mae"]) > 0 for row in found)
    results = json.loads(Path("run/results.json").read_text())
    assert set(results) == {"before", "after", "parameters", "dimers"}
    assert 0 < results["parameters"]["trainable"] < results["parameters"]["total"]
    assert set(results["before"]) == {"train", "validation", "test", "retention"}
    splits = json.loads(Path("run/splits.json").read_text())["sets"]
    assert [splits[name]["structures"] for name in ("train", "validation", "test")] == [8, 2, 4]
    best = load_checkpoint("run/best_model.ckpt")
    provenance = best.provenance
    assert provenance["parent"] == "base"
    assert provenance["parent_fingerprint"] == weights_fingerprint(base)
    assert provenance["options"]["seed"] == 5
    assert provenance["data"]["train"]["structures"] == 8
    assert provenance["versions"]["pet-finetune"]
    best_rows = [row for row in found if row["best"] == "1"]
    assert str(provenance["epoch"]) == best_rows[-1]["epoch"]


def test_the_run_says_of_itself_what_can_be_run_again(here, train, command):
    train(options(), "-c", "base.ckpt")
    answer = command("train", "run/options.yaml", "-o", "again")
    assert answer.code == 0
    first, second = (load_checkpoint(f"{name}/best_model.ckpt").model for name in ("run", "again"))
    assert weights_fingerprint(first) == weights_fingerprint(second)


def test_a_seed_is_drawn_and_written_where_none_is_given(here, train):
    content = options()
    del content["seed"]
    answer = train(content, "-c", "base.ckpt")
    seed = yaml.safe_load(Path("run/options.yaml").read_text())["seed"]
    assert f"seed {seed}," in answer.err


def test_merged_model_and_adapter_are_the_same(here, train):
    train(options(), "-c", "base.ckpt")
    merged, _ = open_potential("run/best_model.ckpt")
    adapted, targets = open_potential("base.ckpt", "run/adapter")
    assert targets == ("energy",)
    assert torch.equal(predictions(merged).forces, predictions(adapted).forces)
    assert torch.equal(predictions(merged).energy, predictions(adapted).energy)


def test_from_scratch(here, train):
    content = options()
    content["architecture"]["model"] = TINY
    answer = train(content)
    model = load_checkpoint("run/best_model.ckpt").model
    assert model.species == (1, 6, 8)
    assert model.hypers.d_pet == 8
    assert "a new model for H, C, O" in answer.err
    assert "untrained (after fit)" in answer.out
    assert not Path("run/adapter").exists()


@pytest.mark.parametrize("method", ["full", "heads"])
def test_other_methods(here, train, method):
    train(options({"finetune": {"method": method}}), "-c", "base.ckpt")
    base = load_checkpoint("base.ckpt").model.network.state_dict()
    tuned = load_checkpoint("run/best_model.ckpt").model.network.state_dict()
    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], tuned[name])}
    heads = {"node_heads", "edge_heads", "node_last_layers", "edge_last_layers"}
    assert changed >= heads
    assert (changed == heads) is (method == "heads")


def test_qlora_says_what_it_saves_and_what_rounding_changes(here, train):
    pytest.importorskip("bitsandbytes")
    answer = train(options({"finetune": {"method": "qlora"}}), "-c", "base.ckpt")
    log = Path("run/train.log").read_text()
    assert "frozen layers are held in 4 bits: the network takes" in log
    assert "changes the predictions of the first batch: energy " in log
    assert "kernels-community" not in answer.err
    merged = open_potential("base.ckpt", "run/adapter")[0]
    torch.testing.assert_close(
        predictions(merged).forces,
        predictions(load_checkpoint("run/best_model.ckpt").model).forces,
    )


def test_training_lowers_the_errors(here, train):
    training = {"num_epochs": 15, "batch_size": 2, "learning_rate": 5e-4}
    content = options({**training, "finetune": {"method": "full"}})
    train(content, "-c", "base.ckpt")
    results = json.loads(Path("run/results.json").read_text())
    before, after = (results[name]["test"]["energy"] for name in ("before", "after"))
    assert after["forces_mae"] < 0.9 * before["forces_mae"]


METATRAIN_FILE = """
device: cpu
base_precision: 32
seed: 42
architecture:
  name: pet
  training:
    num_epochs: 2
    batch_size: 4
    learning_rate: 1.0e-3
    warmup_fraction: 0.01
    num_workers: 0
    log_interval: 1
    finetune:
      method: lora
      read_from: base.ckpt
      config:
        rank: 4
        alpha: 8
      inherit_heads:
        energy/ft: energy
training_set:
  systems:
    read_from: train.xyz
    reader: ase
    length_unit: angstrom
  targets:
    energy/ft:
      quantity: energy
      read_from: train.xyz
      reader: ase
      key: energy
      unit: eV
      per_atom: false
      forces:
        read_from: train.xyz
        key: forces
validation_set: 0.2
test_set: 0.1
"""


def test_a_metatrain_users_file_runs_unchanged(here, command):
    Path("mine.yaml").write_text(METATRAIN_FILE)
    answer = command("train", "mine.yaml", "-o", "run")
    assert answer.code == 0, answer.err
    model = load_checkpoint("run/best_model.ckpt").model
    assert list(model.targets) == ["energy/ft"]
    assert "starts with the heads of 'energy'" in answer.err
    assert "without effect here: architecture.training.num_workers" in answer.err
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    # The adapter opens on the base, which has no such target yet.
    answer = command(
        "eval", "base.ckpt", "test.xyz", "--adapter", "run/adapter", "--target", "energy/ft"
    )
    assert answer.code == 0, answer.err


def test_a_new_target_alone_inherits_from_the_only_energy(here, train):
    content = options(test_set=0.1)
    content["training_set"]["targets"] = {"energy/new": {"key": "energy", "unit": "eV"}}
    answer = train(content, "-c", "base.ckpt")
    assert "'energy/new' is new and starts with the heads of 'energy'" in answer.err
    assert "'energy' is not trained and is dropped" in answer.err


def test_the_spellings_of_years_ago_each_tell_todays(here, train):
    answer = train(options({"LORA_RANK": 3, "LORA_ALPHA": 6}), "-c", "base.ckpt")
    assert answer.err.count("is an older spelling; today:") == 3
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)


def test_lora_switched_off_the_old_way_trains_everything(here, train):
    train(options({"USE_LORA_PEFT": False}), "-c", "base.ckpt")
    assert not Path("run/adapter").exists()


def test_the_oldest_start_runs(here, train):
    model = load_checkpoint("base.ckpt").model
    state = {f"module.{n}": w for n, w in model.network.state_dict().items()}
    torch.save(state, "model_state_dict")
    np.save("all_species.npy", np.array(model.species))
    np.save("self_contributions.npy", model.composition.get("energy").numpy())
    content = options({
        "MODEL_TO_START_WITH": "model_state_dict",
        "ALL_SPECIES_PATH": "all_species.npy",
        "SELF_CONTRIBUTIONS_PATH": "self_contributions.npy",
        "finetune": {"method": "heads"},
    })  # fmt: skip
    content["architecture"]["model"] = {"cutoff": 3.5, "num_heads": 2}
    answer = train(content)
    assert answer.err.count("is an older spelling; today:") == 3
    tuned = load_checkpoint("run/best_model.ckpt").model
    assert torch.equal(
        tuned.network.gnn_layers[0].compress[0].weight,
        model.network.gnn_layers[0].compress[0].weight,
    )


def test_overrides(here, command):
    name = "architecture.training.num_epochs"
    answer = command(
        "train", "options.yaml", "-c", "base.ckpt", "-o", "run", "-r", f"{name}=3", "-r",
        "architecture.training.finetune.config.rank=2",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert len(epochs("run")) == 3
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["r"] == 2


def test_two_runs_in_one_process_keep_their_logs_apart(here, command):
    for name in ("one", "two"):
        assert command("train", "options.yaml", "-c", "base.ckpt", "-o", name).code == 0
    for name, other in (("one", "two"), ("two", "one")):
        log = Path(name, "train.log").read_text()
        assert log.count("epoch 1/2") == 1
        assert f"{name}/best_model.ckpt" in log
        assert other not in log


def test_no_warnings_of_libraries_reach_the_user(here, command, recwarn):
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run")
    assert "Warning" not in answer.err
    assert [str(warning.message) for warning in recwarn] == []
