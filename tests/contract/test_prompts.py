"""Prompts as adapters: where they go, what their files say, and what they cannot do."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import laws
import pytest
import torch
from safetensors.torch import load_file

from models import (
    all_structures,
    crystal,
    ethanol,
    lone_atom,
    random_potential,
    slab,
    trained_adapter,
)
from models import apart as far_apart
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject, merged_copy, trainable_report
from pet_finetune.adapters.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.committee import Committee
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError

FRAMES = list(all_structures().values())
LAYERS = [f"gnn_layers.{gnn}.trans.layers.0.attention" for gnn in range(2)]


@pytest.fixture
def prompted():
    return trained_adapter(random_potential(num_neighbors_adaptive=4.0), num_prompts=3)


def test_every_attention_layer_gets_tokens_and_a_gate_a_head():
    model = random_potential()
    inject(model, AdapterConfig(num_prompts=3, modules_to_save=[]))
    trained = {n: tuple(p.shape) for n, p in model.network.named_parameters() if p.requires_grad}
    expected = {f"{path}.prompt.adaption_prompt": (3, 8) for path in LAYERS}
    expected |= {f"{path}.prompt.adaption_gate": (2,) for path in LAYERS}
    assert trained == expected
    assert trainable_report(model).groups == {"prompts": 2 * (3 * 8 + 2)}


def test_the_laws_of_physics(prompted):
    laws.forces_are_finite_differences(prompted, ethanol())
    laws.stress_is_finite_differences(prompted, crystal())
    laws.alone_equals_in_a_batch(prompted, FRAMES)
    laws.atoms_without_neighbors_work(prompted, lone_atom(), far_apart())
    for make in (ethanol, crystal, slab):
        laws.energy_is_extensive(prompted, make())
        laws.translation_changes_nothing(prompted, make())
        laws.permutation_changes_nothing(prompted, make())
    laws.periodic_images_change_nothing(prompted, crystal())


def test_energies_are_smooth_at_the_cutoff(prompted):
    """An atom that crosses it changes neither energies nor forces by a step."""
    pair = crystal()[:2]
    pair.pbc, pair.cell = False, None
    inside, outside = pair.copy(), pair.copy()
    for frame, sign in ((inside, -1), (outside, 1)):
        frame.positions[1] = frame.positions[0] + [0, 0, prompted.cutoff + sign * 1e-7]
    laws.assert_close(laws.predict(prompted, [inside]), laws.predict(prompted, [outside]), 1e-9)
    near = pair.copy()
    near.positions[1] = near.positions[0] + [0, 0, 0.8 * prompted.cutoff]
    gap = laws.predict(prompted, [near]).energy - laws.predict(prompted, [outside]).energy
    assert gap.abs() > 1e-3


@pytest.mark.slow
def test_the_folder_has_pefts_names(prompted, tmp_path):
    save_adapter(prompted, tmp_path, "base-1")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["peft_type"] == "ADAPTION_PROMPT"
    assert config["adapter_len"] == 3
    assert len(config["modules_to_save"]) > 0
    names = load_file(tmp_path / WEIGHTS_FILE).keys()
    for path in LAYERS:
        assert f"base_model.model.{path}.adaption_prompt" in names
        assert f"base_model.model.{path}.adaption_gate" in names
    peft = pytest.importorskip("peft")
    assert peft.AdaptionPromptConfig.from_pretrained(str(tmp_path)).adapter_len == 3


def test_a_merged_model_needs_nothing_beside_it(prompted, tmp_path):
    save_checkpoint(tmp_path / "merged.ckpt", prompted)
    again = load_checkpoint(tmp_path / "merged.ckpt").model
    assert again.adapter is None
    assert again.hypers.num_prompts == 3
    laws.assert_same(laws.predict(again, FRAMES), laws.predict(prompted, FRAMES))


def test_a_second_prompt_is_refused_and_another_method_is_not(prompted, tmp_path):
    merged = merged_copy(prompted)
    with pytest.raises(AdapterError, match="has 3 prompt tokens in each layer already"):
        inject(copy.deepcopy(merged), AdapterConfig(num_prompts=2))
    before = laws.predict(merged, FRAMES)
    adapted = trained_adapter(copy.deepcopy(merged))
    laws.saving_an_adapter_loses_nothing(adapted, merged, FRAMES, tmp_path)
    laws.resuming_loses_nothing(adapted, FRAMES, tmp_path)
    laws.ejected_is_the_base(adapted, merged, FRAMES)
    laws.assert_same(laws.predict(merged, FRAMES), before)


def test_members_of_a_committee_may_have_prompts(prompted):
    merged = merged_copy(prompted)
    models = [merged_copy(trained_adapter(copy.deepcopy(merged), seed=seed)) for seed in (1, 2)]
    committee = Committee([copy.deepcopy(model) for model in models], "energy")
    batch = batch_from_atoms(FRAMES, merged.cutoff, merged.dtype)
    found = committee.predict(batch, "energy", stress=True).members
    for index, model in enumerate(models):
        expected = laws.predict(model, FRAMES)
        torch.testing.assert_close(found.energy[index], expected.energy)
        torch.testing.assert_close(found.forces[index], expected.forces)


def test_another_number_of_tokens_is_named(prompted, tmp_path):
    save_adapter(prompted, tmp_path, "base-1")
    adapter = read_adapter(tmp_path)
    write_adapter(replace(adapter, config=replace(adapter.config, num_prompts=5)), tmp_path)
    base = random_potential(num_neighbors_adaptive=4.0)
    with pytest.raises(AdapterError, match=r"has the shape \(3, 8\), the model needs \(5, 8\)"):
        load_adapter(base, tmp_path)
    assert base.hypers.num_prompts == 0
    assert not any("adaption" in name for name in base.network.state_dict())


def test_an_old_checkpoint_without_the_hyperparameter_loads(tmp_path):
    model = random_potential()
    path = save_checkpoint(tmp_path / "old.ckpt", model)
    content = torch.load(path, weights_only=True)
    del content["hypers"]["num_prompts"]
    torch.save(content, path)
    laws.assert_same(laws.predict(load_checkpoint(path).model, FRAMES), laws.predict(model, FRAMES))
