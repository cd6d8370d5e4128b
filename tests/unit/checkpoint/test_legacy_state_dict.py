"""The oldest start: a state dict, all_species.npy and self_contributions.npy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoint_files import SMALL, small_model

from pet_finetune.checkpoint.legacy_state_dict import infer_hypers, load_oldest_start
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.errors import CheckpointError

ENERGIES = np.array([-13.6, -1030.0, -2040.0])


def write(tmp_path, state, species=(1, 6, 8), energies=ENERGIES):
    paths = [tmp_path / n for n in ("model.pt", "all_species.npy", "self_contributions.npy")]
    torch.save(state, paths[0])
    np.save(paths[1], np.asarray(species))
    np.save(paths[2], np.asarray(energies))
    return paths


def options(**values):
    """What the weights do not tell."""
    return ModelOptions(**{"cutoff": SMALL["cutoff"], "num_heads": SMALL["num_heads"], **values})


def refusal(paths, hypers=None):
    with pytest.raises(CheckpointError) as caught:
        load_oldest_start(*paths, hypers or options())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "backend.", "model.", "module.model.", "network."])
def test_the_model_comes_back_whatever_the_prefix(tmp_path, prefix):
    model = small_model()
    state = {prefix + name: value for name, value in model.network.state_dict().items()}
    read = load_oldest_start(*write(tmp_path, state), options())
    for name, value in model.network.state_dict().items():
        assert torch.equal(read.network.state_dict()[name], value), name
    assert read.hypers == model.hypers
    assert read.composition.get("energy").tolist() == ENERGIES.tolist()
    assert float(read.scale.get("energy")) == 1.0
    assert list(read.targets) == ["energy"]


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict"])
def test_a_state_dict_inside_a_dictionary_is_found(tmp_path, wrapper):
    state = {wrapper: small_model().network.state_dict(), "epoch": 3}
    assert load_oldest_start(*write(tmp_path, state), options()).species == (1, 6, 8)


def test_other_parts_of_metatrains_state_are_passed_over(tmp_path):
    state = dict(small_model().network.state_dict())
    state["scaler.scales"] = torch.ones(1)
    state["additive_models.0.dummy_buffer"] = torch.ones(1)
    assert load_oldest_start(*write(tmp_path, state), options()).species == (1, 6, 8)


def test_names_of_the_first_formats_are_translated(tmp_path):
    kind = {
        "featurizer_type": "residual",
        "transformer_type": "PostLN",
        "normalization": "LayerNorm",
        "activation": "SiLU",
        "d_node": SMALL["d_pet"],
    }
    model = small_model(**kind)
    old = {}
    for name, value in model.network.state_dict().items():
        padded = torch.cat([value, value[:1]]) if value.dim() == 2 else value
        if name == "edge_embedder.weight":
            old["embedding.weight"] = padded
        elif name.startswith("node_embedders."):
            old[f"gnn_layers.{name.split('.')[1]}.node_embedder.weight"] = padded
        elif "neighbor_embedder" in name:
            old[name] = padded
        else:
            old[name.replace("mlp.w_in", "mlp.0").replace("mlp.w_out", "mlp.3")] = value
    read = load_oldest_start(*write(tmp_path, old), options(transformer_type="PostLN"))
    assert read.hypers == model.hypers
    for name, value in model.network.state_dict().items():
        assert torch.equal(read.network.state_dict()[name], value), name


@pytest.mark.parametrize(
    "hypers",
    [
        {},
        {"featurizer_type": "residual", "normalization": "LayerNorm", "activation": "SiLU"},
        {"num_gnn_layers": 1, "num_attention_layers": 1, "d_node": 8},
        {"system_conditioning": True, "max_charge": 3, "max_spin_multiplicity": 5},
    ],
)
def test_sizes_are_read_off_the_weights(hypers):
    model = small_model(**hypers)
    found = infer_hypers(model.network.state_dict())
    for name, value in found.items():
        assert getattr(model.hypers, name) == value, name
    assert {"d_pet", "d_node", "d_head", "d_feedforward", "num_gnn_layers"} <= found.keys()


def test_options_that_contradict_the_weights_are_named(tmp_path):
    paths = write(tmp_path, small_model().network.state_dict())
    message = refusal(paths, options(d_pet=16, num_gnn_layers=3, d_head=6))
    assert "d_pet is 16 in the options and 8 in the weights" in message
    assert "num_gnn_layers is 3 in the options and 2 in the weights" in message
    assert "d_head" not in message


def test_numbers_of_elements_must_agree(tmp_path):
    state = small_model().network.state_dict()
    message = refusal(write(tmp_path, state, energies=ENERGIES[:2]))
    assert "2 energies" in message
    assert "3 elements" in message
    message = refusal(write(tmp_path, state, species=(1, 6), energies=ENERGIES[:2]))
    assert "the weights know 3 elements" in message
    assert "lists 2" in message


@pytest.mark.parametrize(
    "species", [[6, 1, 8], [1, 1, 8], [1.5, 6, 8], [0, 6, 8], [1, 6, 300], [], ["H", "C", "O"]]
)
def test_species_must_be_ascending_atomic_numbers(tmp_path, species):
    message = refusal(write(tmp_path, small_model().network.state_dict(), species=species))
    assert "all_species.npy" in message
    assert "ALL_SPECIES_PATH" in message


def test_species_written_as_floats_are_fine(tmp_path):
    paths = write(tmp_path, small_model().network.state_dict(), species=[1.0, 6.0, 8.0])
    assert load_oldest_start(*paths, options()).species == (1, 6, 8)


def test_arrays_with_pickles_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    paths = write(tmp_path, small_model().network.state_dict())
    np.save(paths[1], np.array([Bomb()]), allow_pickle=True)
    assert "must be a .npy file of numbers" in refusal(paths)


def test_energies_must_be_numbers(tmp_path):
    state = small_model().network.state_dict()
    assert "NaN or inf" in refusal(write(tmp_path, state, energies=[0.0, np.nan, 1.0]))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_missing_files_are_named(tmp_path, index):
    paths = write(tmp_path, small_model().network.state_dict())
    paths[index].unlink()
    message = refusal(paths)
    assert str(paths[index]) in message
    assert "no such" in message


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            {"heads.0.nn.0.weight": torch.ones(1), "embedding.weight": torch.ones(2, 2)},
            "spozdn/pet",
        ),
        ({"model.pet_model.heads.0.nn.0.bias": torch.ones(1)}, "spozdn/pet"),
        (
            {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)},
            "it has: conv1.weight, fc.bias",
        ),
        ({"edge_embedder.weight": torch.ones(3, 8)}, "no head"),
        ({"epoch": 1}, "must be a state dict"),
        ([torch.ones(1)], "must be a state dict"),
    ],
)
def test_other_weights_are_one_clear_line(tmp_path, state, expected):
    assert expected in refusal(write(tmp_path, state))


def test_half_a_network_is_one_clear_line(tmp_path):
    state = small_model().network.state_dict()
    message = refusal(
        write(tmp_path, {n: v for n, v in state.items() if not n.startswith("gnn_layers.0")})
    )
    assert "gnn_layers.0.trans.layers.0.mlp.w_in.weight" in message
    message = refusal(write(tmp_path, {n: v for n, v in state.items() if "compress" not in n}))
    assert "lacks weights" in message
