"""Putting adapters into a model: what is replaced, what trains, what is refused."""

from __future__ import annotations

import pytest
import torch

from models import ethanol, random_potential, trained_adapter
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import (
    active_adapter,
    freeze,
    inject,
    trainable_report,
)
from pet_finetune.adapters.layers import LoraLinear
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError, PetFinetuneError


def trained_names(model):
    return {name for name, p in model.network.named_parameters() if p.requires_grad}


def test_defaults_train_factors_and_the_targets_heads():
    model = random_potential(targets=("energy", "other"))
    config = inject(model, AdapterConfig(rank=2))
    names = trained_names(model)
    assert len(config.target_modules) == 12
    assert sum(".lora_" in name for name in names) == 24
    rest = {name for name in names if ".lora_" not in name}
    assert {name.split(".")[0] for name in rest} == {
        "node_heads", "edge_heads", "node_last_layers", "edge_last_layers",
    }  # fmt: skip
    assert all(name.split(".")[1] == "energy" for name in rest)


def test_a_rank_below_one():
    with pytest.raises(AdapterError, match="at least 1, got 0"):
        inject(random_potential(), AdapterConfig(rank=0))


def test_a_rank_above_the_width_of_a_layer():
    with pytest.raises(AdapterError) as caught:
        inject(random_potential(), AdapterConfig(rank_pattern={"input_linear": 9}))
    message = str(caught.value)
    assert message.startswith("The rank 9 is above the width of the layer gnn_layers.0.trans")
    assert "attention.input_linear, 8. Choose a rank of at most 8" in message


def test_narrow_layers_get_what_they_can_use():
    model = random_potential()
    inject(model, AdapterConfig(rank=32, alpha=16.0))
    narrow = model.network.gnn_layers[0].trans.layers[0].attention.input_linear
    assert (narrow.in_features, narrow.rank, narrow.scaling) == (8, 8, 0.5)
    model = random_potential()
    inject(model, AdapterConfig(rank=6, alpha=3.0, target_modules="all-linear"))
    narrow = model.network.gnn_layers[0].edge_embedder
    assert (narrow.in_features, narrow.rank, narrow.scaling) == (4, 4, 0.5)
    assert model.network.gnn_layers[0].compress[0].rank == 6


def test_ranks_and_alphas_of_single_layers():
    model = random_potential()
    inject(
        model,
        AdapterConfig(
            rank=2,
            alpha=4.0,
            rank_pattern={r"gnn_layers\.1\..*w_in": 5, "w_in": 3},
            alpha_pattern={"attention.output_linear": 10.0},
        ),
    )
    first, second = (layer.trans.layers[0] for layer in model.network.gnn_layers)
    assert (first.mlp.w_in.rank, second.mlp.w_in.rank, first.mlp.w_out.rank) == (3, 5, 2)
    assert (first.attention.output_linear.scaling, first.mlp.w_out.scaling) == (5.0, 2.0)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("key", "message"),
    [("w_inn", r"Did you mean 'mlp\.w_in'|matches none of"), ("(", "nor a regular expression")],
)
def test_patterns_that_mean_no_layer(name, key, message):
    with pytest.raises(AdapterError, match=message) as caught:
        inject(random_potential(), AdapterConfig(rank=2, **{name: {key: 2}}))
    assert str(caught.value).startswith(f"{name}: '{key}'")


def test_a_second_adapter_is_refused():
    model = random_potential()
    inject(model, AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match="carries an adapter already"):
        inject(model, AdapterConfig(rank=2))


def test_an_unknown_target():
    with pytest.raises(PetFinetuneError, match=r"no target 'engery'\. Did you mean 'energy'"):
        inject(random_potential(), AdapterConfig(targets=["engery"]))


def test_a_refused_injection_leaves_the_model_alone():
    model = random_potential()
    with pytest.raises(AdapterError):
        inject(model, AdapterConfig(target_modules=["nothing"]))
    with pytest.raises(AdapterError):
        inject(model, AdapterConfig(modules_to_save=["nothing"]))
    assert active_adapter(model) is None
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert len(trained_names(model)) == len(list(model.network.named_parameters()))


def test_modules_to_save_can_be_named_and_left_out():
    model = random_potential()
    inject(model, AdapterConfig(rank=1, modules_to_save=["node_last_layers.energy"]))
    rest = {name for name in trained_names(model) if ".lora_" not in name}
    assert rest
    assert all(name.startswith("node_last_layers.energy.") for name in rest)
    bare = random_potential()
    inject(bare, AdapterConfig(rank=1, modules_to_save=[]))
    assert all(".lora_" in name for name in trained_names(bare))


def test_modules_to_save_that_do_not_exist():
    with pytest.raises(AdapterError) as caught:
        inject(random_potential(), AdapterConfig(modules_to_save=["heads"]))
    message = str(caught.value)
    assert "modules_to_save: the model has no module 'heads'" in message
    assert "node_heads" in message
    assert "combination_mlps" in message


def test_dropout_is_active_in_training_only():
    model = trained_adapter(random_potential(), dropout=0.5)
    batch = batch_from_atoms(ethanol(), 3.5)
    quiet = model.predict(batch).energy
    assert torch.equal(quiet, model.predict(batch).energy)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model.predict(batch).energy, model.predict(batch).energy)
    model.eval()
    assert torch.equal(quiet, model.predict(batch).energy)


def test_layers_inside_a_sequential_are_replaced():
    model = random_potential()
    inject(model, AdapterConfig(rank=1, target_modules="all-linear"))
    assert isinstance(model.network.gnn_layers[0].compress[0], LoraLinear)
    assert isinstance(model.network.combination_mlps[1][2], LoraLinear)


def test_the_report_counts_what_trains():
    model = random_potential()
    inject(model, AdapterConfig(rank=2))
    report = trainable_report(model)
    parameters = list(model.network.named_parameters())
    assert report.total == sum(p.numel() for _, p in parameters) == model.num_parameters()
    assert report.trainable == sum(p.numel() for _, p in parameters if p.requires_grad)
    assert report.trainable == sum(report.groups.values())
    # Two blocks with W: 24x8, 8x8, 20x8 (two gated halves of 10), 8x10; rank 2. Before them 8x16
    # in the first layer and 8x24 in the second, and 8x8.
    blocks = 2 * (24 + 8 + 8 + 8 + 20 + 8 + 8 + 10)
    assert report.groups["adapters"] == 2 * (blocks + 8 + 16 + 8 + 24 + 2 * (8 + 8))
    share = f"{100 * report.trainable / report.total:.1f} %"
    assert str(report).startswith(f"{report.trainable:,} of {report.total:,} parameters train")
    assert share in str(report)
    assert f"adapters {report.groups['adapters']:,}" in str(report)


def test_freezing_everything_is_an_error_that_names_the_parts():
    model = random_potential()
    with pytest.raises(AdapterError, match=r"no parameter begins with head\..*gnn_layers"):
        freeze(model, ["head"])
    freeze(model, ["node_heads.energy"])
    assert all(name.startswith("node_heads.energy") for name in trained_names(model))
    freeze(model, None)
    assert trainable_report(model).trainable == model.num_parameters()
