"""A committee says what its members say one by one, and nothing that does not belong together."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from models import all_structures, apart, ethanol, lone_atom, random_potential, trained_adapter
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.inject import inject, merged_copy
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.committee import committee
from pet_finetune.committee.committee import Calibration, Committee
from pet_finetune.committee.committee_files import (
    COMMITTEE_FILE,
    load_committee,
    read_committee,
    write_committee,
)
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential

# Widths that the fused kernels take, beside those of `random_potential`, which they do not.
WIDE = {"d_pet": 32, "d_node": 48, "d_head": 16, "d_feedforward": 32}
KINDS = {
    "narrow": {"num_neighbors_adaptive": 4.0, "zbl": True, "num_attention_layers": 2},
    "wide": WIDE,
    "post norm": {**WIDE, "transformer_type": "PostLN", "featurizer_type": "residual"},
    "equal widths": {**WIDE, "d_node": 32, "normalization": "LayerNorm", "activation": "SiLU"},
    "conditioned": {**WIDE, "system_conditioning": True},
}
QUANTITIES = ("energy", "atom_energies", "forces", "stress")


def members_of(base, count=3, **config):
    """Merged models with adapters of different ranks, baselines and scales."""
    models = []
    for index in range(count):
        adapted = trained_adapter(copy.deepcopy(base), seed=index, rank=1 + index, **config)
        adapted.composition.set("energy", adapted.composition.get("energy") + index)
        adapted.scale.set("energy", (1.0 + 0.1 * index) * adapted.scale.get("energy"))
        models.append(merged_copy(adapted))
    return models


def assert_says_what_its_members_say(models, frames, tolerance, one_pass=True):
    batch = batch_from_atoms(frames, models[0].cutoff, models[0].dtype)
    expected = [model.predict(batch, stress=True) for model in models]
    joint = Committee(copy.deepcopy(models), "energy")
    assert joint.one_pass == one_pass
    found = joint.predict(batch, "energy", stress=True)
    for name in QUANTITIES:
        each = torch.stack([getattr(one, name).detach() for one in expected])
        size = each.abs().max().clamp_min(1.0)
        ours = getattr(found.members, name)
        torch.testing.assert_close(ours / size, each / size, atol=tolerance, rtol=0, msg=name)
        torch.testing.assert_close(getattr(found, name), ours.mean(0))
        torch.testing.assert_close(found.spread(name), ours.std(0))
    assert float(found.spread("energy").min()) > 1e-3


@pytest.mark.few(10)
@pytest.mark.parametrize("hypers", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_one_pass_equals_the_members_one_by_one(hypers, targets, both_ways):
    config = {} if targets is None else {"target_modules": targets}
    models = members_of(random_potential(**hypers), **config)
    assert_says_what_its_members_say(models, list(all_structures().values()), 1e-12)


@pytest.mark.parametrize("edges", [1, 140])
def test_large_structures_take_several_passes(edges, both_ways, monkeypatch):
    """One member, or two of three, at a time."""
    monkeypatch.setitem(committee._MOST_EDGES, "cpu", edges)
    passes = []
    predict = Potential.predict
    monkeypatch.setattr(Potential, "predict", lambda *a, **k: passes.append(1) or predict(*a, **k))
    models = members_of(random_potential(**WIDE))
    assert_says_what_its_members_say(models, [ethanol()], 1e-12)
    count = len(models) + {1: 3, 140: 2}[edges]
    assert len(passes) == count


def test_one_pass_equals_the_members_in_single_precision(both_ways):
    models = members_of(random_potential(dtype=torch.float32, **WIDE))
    assert_says_what_its_members_say(models, [ethanol(), apart()], 1e-5)


@pytest.mark.parametrize("frames", [[lone_atom()], [lone_atom(), ethanol()]], ids=["one", "two"])
def test_atoms_without_neighbours(frames, both_ways):
    assert_says_what_its_members_say(members_of(random_potential(**WIDE), 2), frames, 1e-12)


def test_members_that_train_embeddings_or_norms_are_evaluated_one_by_one():
    models = members_of(random_potential(), modules_to_save=["node_embedders.0", "norm_mlp"])
    assert_says_what_its_members_say(models, [ethanol()], 1e-12, one_pass=False)


def test_members_of_other_kinds_are_merged_like_any():
    """What an adapter is made of matters only until it is merged."""
    base = random_potential(**WIDE)
    kinds = ({"use_dora": True}, {"use_rslora": True}, {"rank": 3})
    models = [
        merged_copy(trained_adapter(copy.deepcopy(base), seed=i, **kind))
        for i, kind in enumerate(kinds)
    ]
    assert_says_what_its_members_say(models, [ethanol()], 1e-12)


def members_from(base, layer, count=3):
    """Models that differ in the heads and, from some GNN layer on, in all linear layers."""
    parts = (*HEAD_GROUPS, *(f"gnn_layers.{i}" for i in range(layer, len(base.network.gnn_layers))))
    models = [copy.deepcopy(base) for _ in range(count)]
    for index, model in enumerate(models):
        torch.manual_seed(index)
        for path, module in model.network.named_modules():
            if path.startswith(parts) and isinstance(module, torch.nn.Linear):
                module.weight.data += 0.1 * torch.randn_like(module.weight)
    return models


@pytest.mark.few(10)
@pytest.mark.parametrize("hypers", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layer", [1, 2])
def test_layers_before_the_first_difference_are_shared(hypers, layer, both_ways, monkeypatch):
    monkeypatch.setitem(committee._FEWEST_EDGES, "cpu", 0)
    base = random_potential(**hypers)
    models = members_from(base, layer)
    assert Committee(copy.deepcopy(models), "energy")._first.network.shared_layers.count == layer
    assert_says_what_its_members_say(models, list(all_structures().values()), 1e-12)
    assert_says_what_its_members_say(models, [lone_atom()], 1e-12)


@pytest.mark.parametrize("edges", [1, 140, 1000])
def test_shared_layers_are_computed_once(edges, both_ways, monkeypatch):
    """Whether the members take turns after them or not, and with derivatives or without."""
    monkeypatch.setitem(committee._FEWEST_EDGES, "cpu", 0)
    monkeypatch.setitem(committee._MOST_EDGES, "cpu", edges)
    models = members_from(random_potential(**WIDE), 1)
    assert_says_what_its_members_say(models, [ethanol()], 1e-12)
    joint = Committee(models, "energy")
    rows = []
    for layer in joint._first.network.gnn_layers:
        layer.register_forward_hook(lambda _, arrived, __: rows.append(len(arrived[0])))
    batch = batch_from_atoms(ethanol(), joint.cutoff)
    for forces in (True, False):
        rows.clear()
        joint.predict(batch, "energy", forces=forces)
        alone = [1, {1: 1, 140: 2, 1000: 3}[edges]]
        assert rows[:2] == [count * batch.num_atoms for count in alone]
        assert sum(rows) == 4 * rows[0]
    assert not joint._first.network.shared_layers.active  # nothing of the structures is kept
    rows.clear()
    monkeypatch.setitem(committee._FEWEST_EDGES, "cpu", 10_000)
    joint.predict(batch, "energy")
    assert rows[::2] == rows[1::2]  # so little is quicker done again


@pytest.mark.parametrize("edges", [1, 1000])
@pytest.mark.parametrize("featurizer", ["feedforward", "residual"])
def test_the_mean_alone_goes_back_through_shared_layers_once(
    featurizer, edges, both_ways, monkeypatch
):
    monkeypatch.setitem(committee._MOST_EDGES, "cpu", edges)
    models = members_from(random_potential(featurizer_type=featurizer, **WIDE), 1)
    batch = batch_from_atoms(list(all_structures().values()), models[0].cutoff)
    joint = Committee(models, "energy")
    expected = joint.predict(batch, "energy", stress=True)
    seen = []
    shared = joint._first.network.shared_layers
    through = shared._through
    monkeypatch.setattr(shared, "_through", lambda grads: seen.append(1) or through(grads))
    found = joint.predict(batch, "energy", stress=True, spread=False)
    assert len(seen) == 1
    for name in QUANTITIES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    assert found.members.forces is None
    torch.testing.assert_close(found.uncertainty("energy"), expected.uncertainty("energy"))
    energies = joint.predict(batch, "energy", forces=False, spread=False)
    torch.testing.assert_close(energies.energy, expected.energy)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", None),
        ("mlp.w_in", None),
        (r"gnn_layers\.1.*w_in", 1),
        ("combination_mlps.1.0", 1),
    ],
)
def test_where_members_part(targets, layers):
    joint = Committee(members_of(random_potential(), target_modules=targets), "energy")
    shared = joint._first.network.shared_layers
    assert (None if shared is None else shared.count) == layers


def test_what_no_member_adapts_is_held_once():
    base = random_potential()
    models = members_of(base, 4, target_modules="mlp.w_in", modules_to_save=[])
    committee = Committee(models, "energy")
    numbers = sum(value.numel() for value in committee.state_dict().values())
    assert numbers < 2 * sum(value.numel() for value in base.state_dict().values())


def test_models_of_different_make_are_no_committee():
    with pytest.raises(AdapterError, match="one architecture"):
        Committee([random_potential(), random_potential(d_head=8)], "energy")
    with pytest.raises(AdapterError, match="at least two members, got 1"):
        Committee([random_potential()], "energy")


def test_a_committee_predicts_what_its_adapters_are_for():
    committee = Committee(members_of(random_potential(targets=("energy", "energy/b"))), "energy")
    with pytest.raises(AdapterError, match="are for 'energy', not 'energy/b'"):
        committee.predict(batch_from_atoms(ethanol(), 3.5), "energy/b")


# Files ------------------------------------------------------------------------------------------


@pytest.fixture
def base():
    return random_potential()


@pytest.fixture
def folders(base, tmp_path):
    made = []
    for index in range(3):
        adapted = trained_adapter(copy.deepcopy(base), seed=index, rank=1 + index)
        made.append(save_adapter(adapted, tmp_path / f"member_{index}" / "adapter", "base-1"))
    return made


def test_adapter_folders_make_a_committee_and_leave_the_base_alone(base, folders):
    before = weights_fingerprint(base)
    committee = load_committee(base, folders)
    batch = batch_from_atoms(ethanol(), base.cutoff)
    again = [committee.predict(batch, "energy").members.energy for _ in range(2)]
    assert torch.equal(again[0], again[1])
    assert committee.size == 3
    assert weights_fingerprint(base) == before


def test_the_calibration_comes_with_the_folder_of_a_run(base, folders, tmp_path):
    calibration = Calibration(energy=2.0, forces=3.0)
    write_committee(tmp_path, [f"member_{i}/adapter" for i in range(3)], calibration)
    assert read_committee(tmp_path) == (folders, calibration)
    found = load_committee(base, tmp_path).predict(batch_from_atoms(ethanol(), 3.5), "energy")
    assert torch.equal(found.uncertainty("energy"), 2.0 * found.spread("energy"))
    assert torch.equal(found.uncertainty("forces"), 3.0 * found.spread("forces"))
    plain = load_committee(base, folders).predict(batch_from_atoms(ethanol(), 3.5), "energy")
    assert torch.equal(plain.uncertainty("forces"), plain.spread("forces"))


def test_too_few_adapters(base, folders):
    with pytest.raises(AdapterError, match="at least two members, got 1.*use `adapter`"):
        load_committee(base, folders[:1])


def test_adapters_of_another_base_are_named_with_both_bases(base, folders, tmp_path):
    other = trained_adapter(random_potential(seed=9))
    stranger = save_adapter(other, tmp_path / "stranger")
    fingerprints = [weights_fingerprint(m)[:12] for m in (base, random_potential(seed=9))]
    with pytest.raises(AdapterError) as caught:
        load_committee(base, [*folders, stranger])
    for word in (str(folders[0]), str(stranger), *fingerprints):
        assert word in str(caught.value)


def test_adapters_of_another_target_are_named(base, folders, tmp_path):
    fingerprint = weights_fingerprint(base)
    base.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    config = AdapterConfig(rank=1, targets=["energy/pbe"])
    inject(base, config, fingerprint=fingerprint, inherited={"energy/pbe": "energy"})
    other = save_adapter(base, tmp_path / "pbe")
    with pytest.raises(AdapterError, match="share an energy.*'energy'.*pbe' for 'energy/pbe'"):
        load_committee(random_potential(), [*folders, other])


def test_a_committee_of_adapters_of_several_energies_is_of_one(base, tmp_path):
    base.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    base.add_target(TargetSpec("charges", "charge", "e", per_atom=True))
    batch = batch_from_atoms(ethanol(), base.cutoff)
    tuned, folders = {}, {}
    for name, targets in {
        "a": ["energy", "energy/pbe", "charges"],
        "b": ["energy/pbe", "energy"],
        "c": ["energy/pbe", "charges"],
    }.items():
        tuned[name] = trained_adapter(copy.deepcopy(base), seed=ord(name), targets=targets)
        folders[name] = save_adapter(tuned[name], tmp_path / name)
    for names, wanted, energy in (
        ("ab", None, "energy"), ("ab", "energy/pbe", "energy/pbe"), ("abc", None, "energy/pbe")
    ):  # fmt: skip
        committee = load_committee(base, [folders[name] for name in names], wanted)
        assert committee.target == energy
        found = committee.predict(batch, energy).members.energy
        expected = torch.stack([tuned[name].predict(batch, energy).energy for name in names])
        torch.testing.assert_close(found, expected.detach())
        assert all(list(part.targets) == [energy] for part in committee.parts)
    with pytest.raises(AdapterError, match="are for energy/pbe, not energy"):
        load_committee(base, list(folders.values()), "energy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no committee in .*finetune.ensemble"),
        ("{", "Cannot read the committee"),
        (json.dumps({"format": "pet-finetune committee", "version": 2}), "committee 2"),
        (json.dumps({"format": "pet-finetune committee", "version": 1}), "'factors'"),
    ],
)
def test_a_folder_without_a_sound_committee(content, message, base, tmp_path):
    if content is not None:
        (tmp_path / COMMITTEE_FILE).write_text(content)
    with pytest.raises(AdapterError, match=message):
        load_committee(base, tmp_path)


def test_a_missing_adapter_folder(base, folders, tmp_path):
    with pytest.raises(AdapterError, match="There is no adapter in .*gone"):
        load_committee(base, [*folders, tmp_path / "gone"])
