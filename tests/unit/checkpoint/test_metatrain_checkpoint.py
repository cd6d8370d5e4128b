"""Reading metatrain's files (made here, without metatrain): values, choices and refusals."""

from __future__ import annotations

import sys
import zipfile

import pytest
import torch
from checkpoint_files import (
    composition_buffer,
    metatrain_content,
    scale_buffer,
    small_model,
    target_info,
    write_metatrain,
)

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.checkpoint.safe_pickle import Inert
from pet_finetune.checkpoint.stored_targets import _spec, read_tensor_map
from pet_finetune.errors import CheckpointError
from pet_finetune.keys import TargetSpec


@pytest.fixture
def model():
    return small_model()


def load(tmp_path, content):
    return load_checkpoint(write_metatrain(tmp_path / "m.ckpt", content))


def refusal(tmp_path, content):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "m.ckpt"))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hypers", [{}, {"system_conditioning": True}, {"zbl": True}])
def test_the_model_comes_back_exactly(tmp_path, dtype, hypers):
    model = small_model(targets=("energy", "mtt::other"), **hypers).to(dtype)
    read = load(tmp_path, metatrain_content(model))
    one, two = model.state_dict(), read.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)
    assert read.model.hypers == model.hypers
    assert read.model.targets["energy"] == TargetSpec(
        "energy", description="made up", block="energy___0"
    )
    assert (read.kind, read.training, read.notices) == ("metatrain", None, ())
    assert read.provenance == {
        "format": "metatrain",
        "format_version": 16,
        "epoch": 3,
        "best_epoch": 2,
        "best_metric": 0.5,
        "metadata": {"name": "tiny"},
    }


def test_neither_metatrain_nor_metatomic_is_imported(tmp_path, model, monkeypatch):
    path = write_metatrain(tmp_path / "m.ckpt", metatrain_content(model))
    for name in [n for n in sys.modules if n.split(".")[0] in ("metatrain", "metatomic")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("metatrain", "metatomic"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_checkpoint(path).model.species == model.species


def test_the_best_epochs_weights_are_used_and_else_the_last_ones(tmp_path, model):
    content = metatrain_content(model)
    worse = small_model(seed=7)
    content["model_state_dict"] = metatrain_content(worse)["model_state_dict"]
    read = load(tmp_path, content)
    assert torch.equal(read.model.network.edge_embedder.weight, model.network.edge_embedder.weight)
    content["best_model_state_dict"] = None
    read = load(tmp_path, content)
    assert torch.equal(read.model.network.edge_embedder.weight, worse.network.edge_embedder.weight)
    assert "last epoch" in read.notices[0]


def test_energies_in_other_units_are_converted(tmp_path, model):
    content = metatrain_content(model)
    content["model_data"]["dataset_info"].targets["energy"] = target_info(unit="kcal/mol")
    read = load(tmp_path, content).model
    factor = 0.0433641042
    assert float(read.scale.get("energy")) == pytest.approx(0.25 * factor, rel=1e-6)
    expected = model.composition.get("energy") * factor
    assert torch.allclose(read.composition.get("energy"), expected, rtol=1e-6)
    assert read.targets["energy"].unit == "eV"


def test_a_missing_unit_is_taken_for_ev_and_said(tmp_path, model):
    content = metatrain_content(model)
    content["model_data"]["dataset_info"].targets["energy"] = target_info(unit="")
    read = load(tmp_path, content)
    assert float(read.model.scale.get("energy")) == 0.25
    assert read.notices == ("Target 'energy' has no unit in the file; eV is assumed.",)


@pytest.mark.parametrize(
    ("info", "why"),
    [
        (target_info("force", "parsec"), "'parsec', which is no known unit of force"),
        (target_info(quantity="", components=("o3_mu",)), "the components ('o3_mu',)"),
        (target_info(quantity="", components=("xyz_1", "xyz_2", "xyz_3")), "components"),
    ],
)
def test_targets_that_cannot_be_used_are_left_out_with_their_heads(tmp_path, info, why):
    model = small_model(targets=("energy", "extra"))
    content = metatrain_content(model)
    targets = content["model_data"]["dataset_info"].targets
    targets["extra"] = info
    read = load(tmp_path, content)
    assert list(read.model.targets) == ["energy"]
    assert not any("extra" in name for name in read.model.state_dict())
    (notice,) = read.notices
    assert notice.startswith("Left out: target 'extra'")
    assert why in notice
    del targets["energy"]
    message = refusal(tmp_path, content)
    assert "no target that can be used" in message
    assert why in message


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (target_info(unit="Debye", components=("xyz",)), ("", "Debye")),
        (target_info(unit="Debye"), ("", "Debye")),
        (target_info(unit="", components=("xyz",)), ("", "")),
        (target_info(unit="", per_atom=True), ("", "")),
        (target_info(unit="", properties=4), ("", "")),
        (target_info(unit=""), ("energy", "eV")),
        (target_info(unit="kcal/mol", components=("xyz",)), ("", "kcal/mol")),
        (target_info(unit="kcal/mol"), ("energy", "eV")),
        (target_info(unit="eV", per_atom=True), ("energy", "eV")),
    ],
)
def test_energy_as_the_quantity_of_what_is_none_says_nothing(info, expected):
    """It is metatrain's default of all targets."""
    layout = read_tensor_map(info.layout.state[0].numpy().tobytes())[0]
    spec = _spec("extra", Inert("TargetInfo", (), dict(vars(info))), layout)
    assert (spec.quantity, spec.unit) == expected


def test_vectors_keep_their_heads_and_the_scale_of_each_element(tmp_path):
    model = small_model()
    model.add_target(TargetSpec("nc", "force", "eV/A", "vector", True, 3, block="nc___0"))
    content = metatrain_content(model)
    content["model_data"]["dataset_info"].targets["nc"] = target_info(
        "force", "eV/A", components=("xyz",), per_atom=True
    )
    for state in (content["model_state_dict"], content["best_model_state_dict"]):
        del state["additive_models.0.nc_composition_buffer"]
        state["scaler.nc_scaler_buffer"] = scale_buffer([2.0, 2.0, 2.0])
    read = load(tmp_path, content).model
    spec = read.targets["nc"]
    assert (spec.kind, spec.num_outputs, spec.per_atom, spec.unit) == ("vector", 3, True, "eV/A")
    assert float(read.scale.get("nc")) == 2.0
    assert read.scale.relative("nc") is None
    content["best_model_state_dict"]["scaler.nc_scaler_buffer"] = scale_buffer([2.0, 1.0, 2.0])
    read = load(tmp_path, content).model
    factors = read.scale.get("nc") * read.scale.relative("nc")
    torch.testing.assert_close(factors.squeeze(1), torch.tensor([2.0, 1.0, 2.0]).double())


def test_heads_of_targets_that_are_no_longer_described_are_passed_over(tmp_path):
    model = small_model(targets=("energy", "stale"))
    content = metatrain_content(model)
    del content["model_data"]["dataset_info"].targets["stale"]
    assert list(load(tmp_path, content).model.targets) == ["energy"]


def test_the_second_copy_of_the_conditioning_is_passed_over(tmp_path):
    model = small_model(system_conditioning=True)
    content = metatrain_content(model)
    state = content["best_model_state_dict"]
    for name in [n for n in state if n.startswith("backend.system_conditioning.")]:
        state[name.removeprefix("backend.")] = state[name]
    assert load(tmp_path, content).model.hypers.system_conditioning


def lora_content(model, alpha=6.0):
    content = metatrain_content(model)
    name = "backend.gnn_layers.0.trans.layers.1.attention.input_linear"
    state = content["best_model_state_dict"]
    torch.manual_seed(3)
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
    weight = state.pop(f"{name}.weight")
    state[f"{name}.linear.weight"] = weight
    state[f"{name}.linear.bias"] = state.pop(f"{name}.bias")
    config = {"rank": 2} if alpha is None else {"rank": 2, "alpha": alpha}
    state["finetune_config"] = {"method": "lora", "config": config, "inherit_heads": {}}
    return content, weight + (8.0 if alpha is None else alpha) / 2 * up @ down


@pytest.mark.parametrize("alpha", [6.0, None])
def test_lora_layers_are_merged(tmp_path, model, alpha):
    content, expected = lora_content(model, alpha)
    read = load(tmp_path, content)
    merged = read.model.network.gnn_layers[0].trans.layers[1].attention.input_linear.weight
    assert torch.allclose(merged, expected, atol=1e-6)
    assert not torch.allclose(
        merged, model.network.gnn_layers[0].trans.layers[1].attention.input_linear.weight
    )
    assert "1 LoRA layers" in read.notices[0]


def test_lora_layers_find_alpha_wherever_the_file_keeps_it(tmp_path, model):
    content, expected = lora_content(model)
    config = content["best_model_state_dict"].pop("finetune_config")
    message = refusal(tmp_path, content)
    assert "alpha" in message
    content["train_hypers"] = {"finetune": config}
    read = load(tmp_path, content).model
    weight = read.network.gnn_layers[0].trans.layers[1].attention.input_linear.weight
    assert torch.allclose(weight, expected, atol=1e-6)


def test_half_a_lora_layer_is_damage(tmp_path, model):
    content, _ = lora_content(model)
    state = content["best_model_state_dict"]
    del state[next(n for n in state if n.endswith("lora_B.weight"))]
    assert "is incomplete" in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture_name": "soap_bpnn"}, "architecture 'soap_bpnn', and only 'pet'"),
        ({"architecture_name": "llpr"}, "'llpr', an uncertainty estimate around another model"),
        (
            {
                "architecture_name": "llpr",
                "wrapped_model_checkpoint": {"architecture_name": "mace"},
            },
            "architecture 'mace', and only 'pet'",
        ),
        ({"architecture_name": None}, "architecture None"),
        ({"model_ckpt_version": 17}, "format 17 is not known here; formats 1 to 16 are"),
        ({"model_ckpt_version": 0}, "format 0 is not known"),
        ({"model_ckpt_version": "16"}, "'16' is not a number"),
        ({"model_data": None}, "lacks its hyperparameters"),
        ({"model_data": {"model_hypers": {}}}, "lacks its dataset_info"),
        ({"model_state_dict": None, "best_model_state_dict": None}, "holds no weights"),
    ],
)
def test_other_checkpoints_are_one_clear_line(tmp_path, model, changes, expected):
    assert expected in refusal(tmp_path, metatrain_content(model, **changes))


def change_hypers(content, **values):
    content["model_data"]["model_hypers"].update(values)


def change_state(content, **values):
    content["best_model_state_dict"].update(values)


def drop(content, name):
    del content["best_model_state_dict"][name]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: change_state(c, **{"long_range_featurizer.w": torch.ones(1)}), "long_range"),
        (lambda c: change_hypers(c, d_pet=16), "do not fit"),
        (lambda c: change_hypers(c, d_pet="many"), "d_pet"),
        (lambda c: change_hypers(c, novelty=1), "novelty"),
        (lambda c: change_hypers(c, odd=torch.ones(1)), "model_hypers.odd is of type"),
        (lambda c: change_state(c, **{"novelty.weight": torch.ones(1)}), "novelty.weight"),
        (lambda c: change_state(c, **{"backend.novelty": torch.ones(1)}), "novelty"),
        (lambda c: drop(c, "backend.edge_embedder.weight"), "lacks weights: edge_embedder.weight"),
        (
            lambda c: change_state(
                c, **{"backend.species_to_species_index": torch.tensor([-1, 1, -1, -1, -1, -1, 0,
                                                                        -1, 2])}
            ),
            "contradicts",
        ),
        (
            lambda c: change_state(
                c,
                **{"additive_models.0.energy_composition_buffer": composition_buffer(
                    (1, 6), torch.ones(2))},
            ),
            "no baseline for the elements [8]",
        ),
        (
            lambda c: change_state(c, **{"scaler.energy_scaler_buffer": torch.zeros(9).byte()}),
            "damaged scales",
        ),
        (
            lambda c: change_state(c, **{"scaler.energy_scaler_buffer": torch.ones(3)}),
            "damaged scales",
        ),
        (
            lambda c: change_state(
                c, **{"scaler.energy_scaler_buffer": scale_buffer([float("nan")])}
            ),
            "scales that are not numbers",
        ),
        (lambda c: setattr(c["model_data"]["dataset_info"], "length_unit", "bohr"), "'bohr'"),
        (lambda c: setattr(c["model_data"]["dataset_info"], "length_unit", "inch"), "'inch'"),
        (lambda c: setattr(c["model_data"]["dataset_info"], "_atomic_types", "HC"), "elements"),
        (lambda c: setattr(c["model_data"]["dataset_info"], "_atomic_types", [-1, 6]), "elements"),
        (lambda c: setattr(c["model_data"]["dataset_info"], "targets", [1]), "targets is damaged"),
    ],
)  # fmt: skip
def test_damaged_or_unknown_parts_are_one_clear_line(tmp_path, model, change, expected):
    content = metatrain_content(model)
    change(content)
    assert expected in refusal(tmp_path, content)


def test_zbl_with_energies_in_other_units_is_left_out(tmp_path):
    content = metatrain_content(small_model(zbl=True))
    content["model_data"]["dataset_info"].targets["energy"] = target_info(unit="kcal/mol")
    assert "ZBL" in refusal(tmp_path, content)


def test_hostile_files_are_refused_wherever_the_call_hides(tmp_path, model):
    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    for place in ("optimizer_state_dict", "metadata", "scheduler_state_dict"):
        message = refusal(tmp_path, metatrain_content(model, **{place: [Bomb()]}))
        assert "print" in message
        assert "nothing in the file was executed" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"weight": torch.ones(1)}, "bare state dict"),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "state": {}}, "it holds: epoch, state"),
        ({}, "it holds: nothing"),
        (torch.ones(3), "holds a StoredTensor"),
    ],
)
def test_torch_files_that_are_no_checkpoints(tmp_path, content, expected):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert expected in str(caught.value)


def test_a_truncated_file_is_one_clear_line(tmp_path, model):
    path = write_metatrain(tmp_path / "m.ckpt", metatrain_content(model))
    whole = path.read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_only_the_chosen_weights_are_read(tmp_path, model):
    """Optimiser states make most of a large file; losing them must not matter."""
    path = write_metatrain(tmp_path / "m.ckpt", metatrain_content(model))
    with zipfile.ZipFile(path) as old:
        names = [n for n in old.namelist() if "/data/" in n]
        last = max(names, key=lambda n: int(n.rsplit("/", 1)[1]))
        with zipfile.ZipFile(tmp_path / "less.ckpt", "w") as new:
            for name in old.namelist():
                if name != last:
                    new.writestr(name, old.read(name))
    assert load_checkpoint(tmp_path / "less.ckpt").model.species == model.species
