"""The steps from metatrain's format 1 to 16: what each era's files mean under today's names."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.checkpoint.metatrain_formats import NEWEST_VERSION, RawCheckpoint, upgrade
from pet_finetune.errors import CheckpointError


def raw(version, state=None, **hypers):
    return RawCheckpoint(
        version=version,
        hypers={"d_pet": 4, "cutoff_width": 0.3, **hypers},
        state=dict(state or {}),
        targets=("energy", "other"),
    )


FIRST = {
    "embedding.weight": torch.ones(4, 2),
    "gnn_layers.1.node_embedder.weight": torch.ones(4, 2),
    "gnn_layers.1.neighbor_embedder.weight": torch.ones(4, 2),
    "gnn_layers.1.edge_embedder.weight": torch.ones(4, 4),
    "gnn_layers.0.trans.layers.1.mlp.0.weight": torch.ones(1),
    "gnn_layers.0.trans.layers.1.mlp.3.bias": torch.ones(1),
    "gnn_layers.0.compress.0.weight": torch.ones(1),
    "node_heads.energy.0.0.weight": torch.ones(1),
    "scaler.scales": torch.tensor([2.0, 3.0]),
    "additive_models.0.type_to_index": torch.zeros(9),
}


@pytest.mark.parametrize("version", range(1, 7))
def test_files_of_the_first_generation(version):
    new = upgrade(raw(version, FIRST), "file")
    assert new.version == NEWEST_VERSION
    shapes = {name: tuple(w.shape) for name, w in new.state.items() if name.startswith("backend.")}
    assert shapes == {
        "backend.edge_embedder.weight": (3, 2),
        "backend.node_embedders.1.weight": (3, 2),
        "backend.gnn_layers.1.neighbor_embedder.weight": (3, 2),
        "backend.gnn_layers.1.edge_embedder.weight": (4, 4),
        "backend.gnn_layers.0.trans.layers.1.mlp.w_in.weight": (1,),
        "backend.gnn_layers.0.trans.layers.1.mlp.w_out.bias": (1,),
        "backend.gnn_layers.0.compress.0.weight": (1,),
        "backend.node_heads.energy.0.0.weight": (1,),
    }
    assert new.scales == {"energy": 2.0, "other": 3.0}
    assert new.hypers == {
        "d_pet": 4,
        "d_node": 4,
        "cutoff_width": 0.3,
        "cutoff_width_adaptive": 0.3,
        "normalization": "LayerNorm",
        "activation": "SiLU",
        "transformer_type": "PostLN",
        "featurizer_type": "residual",
        "num_neighbors_adaptive": None,
        "cutoff_function": "Cosine",
        "attention_temperature": 1.0,
        "adaptive_cutoff_method": "grid",
        "system_conditioning": False,
        "max_charge": 10,
        "max_spin_multiplicity": 10,
    }


def test_large_models_of_format_7():
    state = {
        "node_embedding.weight": torch.ones(4, 16),
        "embedding.weight": torch.ones(4, 4),
        "combination_rmsnorms.0.weight": torch.ones(8),
        "gnn_layers.0.trans.layers.0.mlp.w_in.weight": torch.ones(1),
    }
    new = upgrade(raw(7, state), "file")
    assert {name: tuple(w.shape) for name, w in new.state.items()} == {
        "backend.node_embedders.0.weight": (3, 16),
        "backend.edge_embedder.weight": (3, 4),
        "backend.combination_norms.0.weight": (8,),
        "backend.gnn_layers.0.trans.layers.0.mlp.w_in.weight": (1,),
    }
    assert new.hypers["d_node"] == 16
    assert new.hypers["d_feedforward"] == 8
    assert new.hypers["featurizer_type"] == "feedforward"
    assert new.hypers["transformer_type"] == "PreLN"


def test_options_a_file_states_are_kept():
    stated = {
        "num_neighbors_adaptive": 8,
        "cutoff_function": "Bump",
        "attention_temperature": 2.0,
        "adaptive_cutoff_method": "solver",
        "cutoff_width_adaptive": 0.7,
        "system_conditioning": True,
        "normalization": "RMSNorm",
    }
    new = upgrade(raw(7, **stated), "file")
    assert {name: new.hypers[name] for name in stated} == stated


def test_the_newest_format_is_left_as_it_is():
    new = upgrade(raw(16, {"backend.x": torch.ones(1)}), "file")
    assert new.hypers == {"d_pet": 4, "cutoff_width": 0.3}
    assert list(new.state) == ["backend.x"]


@pytest.mark.parametrize("version", [0, 17, -3])
def test_unknown_formats_are_refused(version):
    with pytest.raises(CheckpointError, match=f"format {version} is not known"):
        upgrade(raw(version), "file")


@pytest.mark.parametrize("version", [6, 13])
def test_files_that_are_not_what_they_claim(version):
    broken = raw(version, {"scaler.scales": torch.ones(1)})
    del broken.hypers["cutoff_width"]
    with pytest.raises(CheckpointError, match=f"says it has metatrain's PET format {version}"):
        upgrade(broken, "file")
