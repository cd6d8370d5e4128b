"""Adapter folders: what goes in comes out, and everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import all_structures, random_potential, trained_adapter
from pet_finetune.adapters.base_weights import content_digest, weights_fingerprint
from pet_finetune.adapters.inject import active_adapter, merged_copy
from pet_finetune.adapters.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    from_peft,
    load_adapter,
    own_name,
    read_adapter,
    read_metadata,
    save_adapter,
    write_adapter,
)
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec


@pytest.fixture(scope="module")
def batch():
    return batch_from_atoms(list(all_structures().values()), 3.5)


@pytest.fixture
def folder(tmp_path):
    return save_adapter(trained_adapter(random_potential()), tmp_path / "adapter", "base-1")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_metadata(folder, **changes):
    content = {k: v for k, v in {**read_metadata(folder), **changes}.items() if v is not ...}
    weights = folder / WEIGHTS_FILE
    save_file(load_file(weights), weights, {"pet_finetune": json.dumps(content)})


@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": "all-linear", "dropout": 0.25}, {"modules_to_save": []}],
    ids=["default", "all-linear", "factors only"],
)
def test_a_saved_adapter_predicts_the_same(config, batch, tmp_path):
    adapted = trained_adapter(random_potential(), **config)
    save_adapter(adapted, tmp_path, "base-1")
    model = random_potential()
    loaded = load_adapter(model, tmp_path)
    assert loaded == active_adapter(adapted) == active_adapter(model)
    expected = adapted.predict(batch, stress=True)
    found = model.predict(batch, stress=True)
    assert torch.equal(found.energy, expected.energy)
    assert torch.equal(found.stress, expected.stress)
    assert torch.equal(merged_copy(model).predict(batch).forces, expected.forces)


def test_an_adapter_brings_its_own_target(batch, tmp_path):
    model = random_potential()
    fingerprint = weights_fingerprint(model)
    model.add_target(TargetSpec("energy/pbe", description="PBE"), inherit_from="energy")
    from pet_finetune.adapters.adapter_config import AdapterConfig
    from pet_finetune.adapters.inject import inject

    inject(
        model,
        AdapterConfig(rank=1, targets=["energy/pbe"]),
        fingerprint=fingerprint,
        inherited={"energy/pbe": "energy"},
    )
    save_adapter(model, tmp_path)
    base = random_potential()
    load_adapter(base, tmp_path)
    assert base.targets["energy/pbe"].description == "PBE"
    expected = model.predict(batch, "energy/pbe").energy
    assert torch.equal(base.predict(batch, "energy/pbe").energy, expected)


def test_the_files_are_small_and_in_pefts_names(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    assert all(name.startswith("base_model.model.") for name in tensors)
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert config["base_model_name_or_path"] == "base-1"
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])


def test_another_base_is_refused_and_both_are_named(folder):
    other = random_potential(seed=7)
    made_for = read_metadata(folder)["base_fingerprint"]
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, folder)
    message = str(caught.value)
    assert f"belongs to the base 'base-1' (fingerprint {made_for[:12]})" in message
    assert weights_fingerprint(other)[:12] in message
    assert active_adapter(other) is None


def test_a_model_without_adapter_has_nothing_to_save(tmp_path):
    with pytest.raises(AdapterError, match="carries no adapter"):
        save_adapter(random_potential(), tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="Cannot write the adapter to"):
        save_adapter(trained_adapter(random_potential()), tmp_path / "file" / "adapter")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (CONFIG_FILE, "There is no adapter in .*adapter_config.json is missing"),
        (WEIGHTS_FILE, "Cannot read the adapter weights"),
    ],
)
def test_missing_files(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=message):
        load_adapter(random_potential(), folder)


def test_the_folder_of_a_run_is_told_from_its_adapter(folder):
    with pytest.raises(AdapterError, match=r"Did you mean '.*adapter'\?"):
        load_adapter(random_potential(), folder.parent)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00junk"])
def test_damaged_files(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        load_adapter(random_potential(), folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "eight"},
        {"r": 0},
        {"lora_alpha": None},
        {"target_modules": 3},
        {"target_modules": ...},
        {"modules_to_save": ["nothing"]},
        {"modules_to_save": 1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(folder, changes):
    edit_json(folder / CONFIG_FILE, **changes)
    with pytest.raises(AdapterError):
        load_adapter(random_potential(), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ...},
        {"targets": {"energy": 1.0}},
        {"targets": [{"spec": {"nme": "energy"}}]},
        {"targets": [{"spec": {"name": "energy"}, "composition": [1.0, 2.0], "scale": 1.0}]},
        {"targets": [{"spec": {"name": "energy"}, "composition": list("abcd"), "scale": 1.0}]},
        {"targets": [{"spec": {"name": "energy"}, "composition": None, "scale": "one"}]},
        {"base_fingerprint": 5},
        {"version": "two"},
    ],
    ids=str,
)
def test_metadata_that_makes_no_sense(folder, changes):
    edit_json(folder / CONFIG_FILE, auto_mapping=...)  # without the checksum
    edit_metadata(folder, digest=..., **changes)
    with pytest.raises(AdapterError):
        load_adapter(random_potential(), folder)


def test_an_adapter_of_peft_is_written_again(folder, tmp_path, batch):
    """It names neither targets nor its base, and still does not when we have written it."""
    edit_json(folder / CONFIG_FILE, auto_mapping=...)
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    predictions = []
    for directory in (folder, write_adapter(read_adapter(folder), tmp_path / "again")):
        adapter = read_adapter(directory)
        assert (adapter.targets, adapter.fingerprint) == ((), None)
        model = random_potential()
        assert load_adapter(model, directory).targets == ("energy",)
        predictions.append(model.predict(batch).energy)
    assert torch.equal(*predictions)


def test_a_newer_release_is_named(folder):
    edit_metadata(folder, version=3)
    with pytest.raises(AdapterError, match="version 3 of our format.*Update pet-finetune"):
        load_adapter(random_potential(), folder)


@pytest.mark.parametrize("digest", [True, False], ids=["checksum", "older than checksums"])
def test_files_that_know_one_target_are_read_for_ever(folder, digest, batch):
    """Version 1 wrote what belongs to the target beside everything else."""
    content = read_metadata(folder)
    (target,) = content.pop("targets")
    old = {"version": 1, "target": target.pop("spec"), **target}
    content = {**content, **old}
    del content["digest"]
    peft = json.loads((folder / CONFIG_FILE).read_text())
    if digest:
        # As it was taken then, of settings that had a target of their own.
        settings = asdict(from_peft(peft))
        del settings["targets"]
        tensors = {own_name(n): t for n, t in load_file(folder / WEIGHTS_FILE).items()}
        content["digest"] = content_digest(tensors, [{**settings, "target": "energy"}, content])
    else:
        edit_json(folder / CONFIG_FILE, auto_mapping=...)
    weights = folder / WEIGHTS_FILE
    save_file(load_file(weights), weights, {"pet_finetune": json.dumps(content)})
    model = random_potential()
    assert load_adapter(model, folder).targets == ("energy",)
    expected = trained_adapter(random_potential()).predict(batch)
    assert torch.equal(model.predict(batch).energy, expected.energy)


def test_tensors_that_do_not_fit(folder):
    edit_json(folder / CONFIG_FILE, auto_mapping=...)  # as PEFT writes it
    tensors = load_file(folder / WEIGHTS_FILE)
    first = next(name for name in tensors if "attention.output_linear.lora_A" in name)
    save_file({n: t for n, t in tensors.items() if n != first}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="1 tensors are missing"):
        load_adapter(random_potential(), folder)
    save_file({**tensors, first: torch.zeros(3, 8)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"has the shape \(3, 8\), the model needs \(2, 8\)"):
        load_adapter(random_potential(), folder)
