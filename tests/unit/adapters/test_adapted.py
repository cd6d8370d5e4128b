"""A base with several adapters: loading, switching, switching off, merging, blending."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import assert_differs, assert_same, predict

from models import METHODS, crystal, ethanol, random_potential, trained_adapter
from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.inject import merged_copy
from pet_finetune.adapters.peft_files import CONFIG_FILE, read_adapter, read_metadata, save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load
from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

FRAMES = [ethanol(), crystal()]


@pytest.fixture
def base() -> Potential:
    return random_potential()


@pytest.fixture
def tuned(base: Potential) -> dict[str, Potential]:
    """Two trained models of one base, of different methods and ranks."""
    return {
        "water": trained_adapter(copy.deepcopy(base), seed=1),
        "ice": trained_adapter(copy.deepcopy(base), seed=2, rank=3, use_dora=True),
    }


@pytest.fixture
def model(base: Potential, tuned: dict[str, Potential], tmp_path) -> AdaptedPotential:
    loaded = AdaptedPotential(copy.deepcopy(base))
    for name, one in tuned.items():
        save_adapter(one, tmp_path / name, "base.ckpt")
        loaded.load_adapter(tmp_path / name, name=name)
    return loaded


def test_the_first_one_loaded_is_active(model: AdaptedPotential, tuned: dict[str, Potential]):
    assert list(model.adapters) == ["water", "ice"]
    assert model.active_adapter == "water"
    assert_same(predict(model.potential, FRAMES), predict(tuned["water"], FRAMES))


@pytest.mark.parametrize("merged", [False, True])
def test_switching_gives_each_model_to_the_last_bit(
    model: AdaptedPotential, base: Potential, tuned: dict[str, Potential], merged: bool
):
    weights = model.potential.network.gnn_layers[0].trans.layers[0].mlp.w_in.weight
    if merged:
        model.merge()
    for name in ("ice", "water", "water", "ice"):
        model.set_adapter(name)
        assert model.merged == merged
        assert_same(predict(model.potential, FRAMES), predict(tuned[name], FRAMES))
    model.disable_adapters()
    assert model.active_adapter is None
    assert_same(predict(model.potential, FRAMES), predict(base, FRAMES))
    model.enable_adapters()
    assert_same(predict(model.potential, FRAMES), predict(tuned["ice"], FRAMES))
    model.unmerge()
    model.disable_adapters()
    assert weights_fingerprint(model.potential) == weights_fingerprint(base)
    now = model.potential.network.gnn_layers[0].trans.layers[0].mlp.w_in.weight
    assert now.data_ptr() == weights.data_ptr()  # the base was not copied on the way


def test_predicting_is_for_the_adapters_target(base: Potential, tmp_path):
    made = copy.deepcopy(base)
    made.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    fingerprint = weights_fingerprint(base)
    from pet_finetune.adapters.adapter_config import AdapterConfig
    from pet_finetune.adapters.inject import inject

    inject(
        made,
        AdapterConfig(rank=1, targets=["energy/pbe"]),
        fingerprint=fingerprint,
        inherited={"energy/pbe": "energy"},
        brought_targets=["energy/pbe"],
    )
    save_adapter(made, tmp_path / "pbe")
    save_checkpoint(tmp_path / "base.ckpt", base)
    model = load(tmp_path / "base.ckpt")
    model.load_adapter(tmp_path / "pbe", name="pbe")
    assert model.targets == ("energy/pbe",)
    assert list(model.potential.targets) == ["energy", "energy/pbe"]
    model.disable_adapters()
    assert list(model.potential.targets) == ["energy"]


def test_a_model_that_carries_an_adapter_brings_it_along(tuned: dict[str, Potential], base):
    expected = predict(tuned["ice"], FRAMES)
    model = AdaptedPotential(tuned["ice"])
    assert model.active_adapter == "default"
    assert_same(predict(model.potential, FRAMES), expected)
    model.delete_adapter("default")
    assert_same(predict(model.potential, FRAMES), predict(base, FRAMES))


def test_what_is_refused_changes_nothing(model: AdaptedPotential, base, tmp_path):
    before = predict(model.potential, FRAMES)
    stranger = save_adapter(trained_adapter(random_potential(seed=5)), tmp_path / "other", "other")
    damaged = save_adapter(trained_adapter(copy.deepcopy(base)), tmp_path / "damaged")
    adapter = read_adapter(damaged)
    adapter.tensors.pop(next(iter(adapter.tensors)))
    with pytest.raises(AdapterError, match="belongs to the base 'other'"):
        model.load_adapter(stranger, name="other")
    with pytest.raises(AdapterError, match="1 tensors are missing"):
        model.add_adapter(adapter, name="damaged")
    with pytest.raises(AdapterError, match="There is an adapter 'ice' already"):
        model.load_adapter(tmp_path / "water", name="ice")
    with pytest.raises(AdapterError, match=r"no adapter 'watr'\. Did you mean 'water'"):
        model.set_adapter("watr")
    assert list(model.adapters) == ["water", "ice"]
    assert_same(predict(model.potential, FRAMES), before)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_saved_again_is_the_same(base: Potential, method: str, tmp_path):
    tuned = trained_adapter(copy.deepcopy(base), **METHODS[method])
    save_adapter(tuned, tmp_path / "one", "base.ckpt")
    model = AdaptedPotential(base)
    model.load_adapter(tmp_path / "one", name="one")
    model.save_adapter("one", tmp_path / "two")
    one, two = (read_adapter(tmp_path / name) for name in ("one", "two"))
    assert (tmp_path / "one" / CONFIG_FILE).read_text() == (
        tmp_path / "two" / CONFIG_FILE
    ).read_text()
    assert read_metadata(tmp_path / "one") == read_metadata(tmp_path / "two")
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(two.tensors[key], value) for key, value in one.tensors.items())


def test_a_blend_becomes_an_adapter(base: Potential, tmp_path):
    parts = {name: trained_adapter(copy.deepcopy(base), seed=seed) for seed, name in
             ((1, "a"), (2, "b"))}  # fmt: skip
    model = AdaptedPotential(copy.deepcopy(base))
    for name, one in parts.items():
        model.load_adapter(save_adapter(one, tmp_path / name), name=name)
    with pytest.raises(AdapterError, match="weights: expected a dictionary"):
        model.add_weighted_adapter(["a", "b"], name="mix")
    model.add_weighted_adapter({"a": 0.5, "b": 0.5}, name="mix", combination="cat")
    assert model.active_adapter == "a"
    model.set_adapter("mix")
    blended = merged_copy(model.potential).network.state_dict()
    halves = [merged_copy(one).network.state_dict() for one in parts.values()]
    for name in dict(base.network.named_parameters()):
        value = blended[name]
        torch.testing.assert_close(value, 0.5 * (halves[0][name] + halves[1][name]), msg=name)
    assert_differs(predict(model.potential, FRAMES), predict(parts["a"], FRAMES))
