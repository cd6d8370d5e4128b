"""Our format: nothing is lost, nothing but plain values is in it, and it is written whole."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from checkpoint_files import small_model

from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import active_adapter, eject, inject, merge
from pet_finetune.checkpoint import native
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import CheckpointError
from pet_finetune.keys import TargetSpec


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value, two[name]), name
    assert first.hypers == second.hypers
    assert first.species == second.species
    assert first.targets == second.targets


def adapted(seed=1, **config):
    """A model with an adapter that has been moved away from its start, heads and all."""
    model = small_model()
    inject(model, AdapterConfig(rank=2, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.composition.set("energy", model.composition.get("energy") + 1.0)
    model.scale.set("energy", 0.5)
    return model


@pytest.fixture
def batch():
    from ase.build import molecule

    return batch_from_atoms([molecule("CH3OH"), molecule("H2O")], 3.0, torch.float32)


@pytest.mark.parametrize(
    "hypers",
    [
        {},
        {"featurizer_type": "residual", "transformer_type": "PostLN", "normalization": "LayerNorm"},
        {"activation": "SiLU", "num_neighbors_adaptive": 4.5, "cutoff_function": "Cosine"},
        {"zbl": True, "system_conditioning": True, "max_charge": 2},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saving_and_loading_loses_nothing(tmp_path, hypers, dtype):
    model = small_model(targets=("energy", "energy/other"), **hypers).to(dtype)
    provenance = {"parent": "x.ckpt", "options": {"seed": 1, "list": [1.5, None]}}
    path = save_checkpoint(tmp_path / "new" / "m.ckpt", model, provenance=provenance)
    loaded = load_checkpoint(path)
    same(model, loaded.model)
    assert (loaded.kind, loaded.path, loaded.training) == ("pet-finetune", path, None)
    assert loaded.provenance == provenance
    assert not loaded.model.training


def test_descriptions_of_targets_are_kept(tmp_path):
    model = small_model()
    spec = TargetSpec("forces", "", "eV/A", "vector", True, 3, "direct", "forces___0")
    model.add_target(spec)
    path = save_checkpoint(tmp_path / "m.ckpt", model)
    assert load_checkpoint(path).model.targets["forces"] == spec


def test_the_file_is_plain_and_opens_with_weights_only(tmp_path):
    path = save_checkpoint(tmp_path / "m.ckpt", small_model())
    content = torch.load(path, weights_only=True)
    assert (content["format"], content["version"]) == ("pet-finetune", 1)
    assert content["species"] == [1, 6, 8]
    assert content["hypers"]["d_pet"] == 8
    assert content["targets"]["energy"]["unit"] == "eV"
    assert content["composition"]["energy"].dtype == torch.float64
    assert "edge_embedder.weight" in content["weights"]


def test_views_bring_only_their_own_numbers(tmp_path):
    model = small_model()
    large = torch.randn(10_000_000)
    model.network.edge_embedder.weight.data = large[:24].view(3, 8)
    path = save_checkpoint(tmp_path / "m.ckpt", model)
    assert path.stat().st_size < 1_000_000
    same(model, load_checkpoint(path).model)


def test_training_state_comes_back(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    training = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "history": [{"loss": float("inf")}],
        "numpy": np.float64(1.5),
        "path": tmp_path,
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path / "m.ckpt", model, training=training))
    assert loaded.training is not None
    fresh = torch.optim.AdamW(loaded.model.parameters())
    fresh.load_state_dict(loaded.training["optimizer"])
    for old, new in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert torch.equal(old["exp_avg"], new["exp_avg"])
    assert torch.equal(loaded.training["random"], training["random"])
    assert loaded.training["history"] == [{"loss": float("inf")}]
    assert loaded.training["numpy"] == 1.5
    assert loaded.training["path"] == str(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"provenance": {"a": [1, object()]}}, "provenance.a[1] is of type builtins.object"),
        ({"provenance": {(1, 2): 3}}, "provenance has the key (1, 2)"),
        ({"provenance": {"w": torch.ones(1, 2)}}, "provenance.w is of type torch.Tensor"),
        ({"training": {"rng": np.zeros(3)}}, "training.rng is of type numpy.ndarray"),
    ],
)
def test_values_that_are_not_plain_are_refused_by_name(tmp_path, values, named):
    path = tmp_path / "m.ckpt"
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(path, small_model(), **values)
    assert named in str(caught.value)
    assert not path.exists()


def test_endless_values_are_refused(tmp_path):
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="nested"):
        save_checkpoint(tmp_path / "m.ckpt", small_model(), provenance={"a": endless})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_earlier_file_whole(tmp_path, monkeypatch, error):
    path = save_checkpoint(tmp_path / "m.ckpt", small_model(seed=0))
    before = path.read_bytes()

    def stop_midway(content, file, **ignored):
        file.write(b"half of the new file")
        raise error

    monkeypatch.setattr(native.torch, "save", stop_midway)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected) as caught:
        save_checkpoint(path, small_model(seed=1))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.ckpt"]
    same(load_checkpoint(path).model, small_model(seed=0))
    if expected is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert "as it was" in str(caught.value)


def test_places_that_cannot_be_written_are_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "m.ckpt", tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            save_checkpoint(path, small_model())
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def broken(tmp_path, **changes):
    path = save_checkpoint(tmp_path / "m.ckpt", small_model())
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value(content[name])
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": lambda v: 2}, "version 2 of our format"),
        ({"weights": None}, "'weights'"),
        ({"species": None}, "'species'"),
        ({"species": lambda s: "HCO"}, "damaged"),
        ({"species": lambda s: [1, 6, 6]}, "chemical elements is damaged"),
        ({"species": lambda s: [1, 6]}, "do not fit the hyperparameters"),
        ({"hypers": lambda h: {**h, "d_pet": 16}}, "do not fit the hyperparameters"),
        ({"hypers": lambda h: {**h, "d_peet": 16}}, "d_peet"),
        ({"hypers": lambda h: {**h, "num_gnn_layers": 3}}, "lacks weights"),
        ({"hypers": lambda h: {**h, "num_gnn_layers": 1}}, "has weights that no PET"),
        ({"hypers": lambda h: {**h, "d_head": 10**15}}, "fewer than its hyperparameters"),
        ({"hypers": lambda h: {**h, "num_gnn_layers": 10**15}}, "fewer than its hyperparameters"),
        ({"targets": lambda t: {"energy": 3}}, "damaged"),
        ({"composition": lambda c: {"energy": torch.zeros(7)}}, "damaged"),
        (
            {"weights": lambda w: {n: v.double() if "mlp" in n else v for n, v in w.items()}},
            "types",
        ),
    ],
)
def test_files_that_contradict_themselves_are_one_clear_line(tmp_path, changes, expected):
    path = broken(tmp_path, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_a_later_release_may_add_to_targets_are_passed_over(tmp_path):
    path = broken(tmp_path, targets=lambda t: {"energy": {**t["energy"], "new": 1}})
    assert load_checkpoint(path).model.targets["energy"] == TargetSpec("energy")


def test_loading_leaves_the_random_state_alone(tmp_path):
    path = save_checkpoint(tmp_path / "m.ckpt", small_model())
    torch.manual_seed(5)
    load_checkpoint(path)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_is_merged_into_a_file_that_stands_alone(tmp_path, batch, merged):
    model = adapted()
    expected = model.predict(batch)
    if merged:
        merge(model)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "m.ckpt", model)).model
    assert active_adapter(loaded) is None
    assert not any("lora" in name for name in loaded.state_dict())
    assert torch.equal(loaded.predict(batch).energy, expected.energy)
    assert torch.equal(loaded.predict(batch).forces, expected.forces)
    assert active_adapter(model) is not None


@pytest.mark.parametrize("merged", [False, True])
def test_the_adapter_of_a_run_that_can_go_on_is_kept_apart(tmp_path, batch, merged):
    model = adapted()
    expected, base = model.predict(batch), small_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if merged:
        merge(model)
    path = save_checkpoint(tmp_path / "last.ckpt", model, training={"epoch": 1})
    resumed = load_checkpoint(path, keep_adapter=True).model
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert state.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert active_adapter(resumed) == active_adapter(model)
    assert resumed.adapter.fingerprint == model.adapter.fingerprint
    eject(resumed)
    assert torch.equal(resumed.predict(batch).energy, base.predict(batch).energy)
    plain = load_checkpoint(path)
    assert active_adapter(plain.model) is None
    assert plain.training == {"epoch": 1}
    assert torch.equal(plain.model.predict(batch).energy, expected.energy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_have_diverged_are_refused(tmp_path, value):
    model = small_model()
    name, weights = next(iter(model.network.named_parameters()))
    with torch.no_grad():
        weights.view(-1)[-1] = value
    path = save_checkpoint(tmp_path / "m.ckpt", model)
    with pytest.raises(CheckpointError, match=f"weights .{re.escape(name)}. are NaN or infinite"):
        load_checkpoint(path)
