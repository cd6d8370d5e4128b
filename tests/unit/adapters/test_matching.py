"""Which layers a pattern means, and what is said when it means none."""

from __future__ import annotations

import pytest

from models import random_potential
from pet_finetune.adapters.adapter_config import linear_layers, match_layers
from pet_finetune.config.finetune import DEFAULT_TARGET_MODULES
from pet_finetune.errors import AdapterError

BLOCKS = ["gnn_layers.0.trans.layers.0", "gnn_layers.1.trans.layers.0"]


@pytest.fixture(scope="module")
def network():
    return random_potential().network


def test_endings_match_in_every_block(network):
    found = match_layers(network, ["attention.input_linear"])
    assert found == [f"{block}.attention.input_linear" for block in BLOCKS]
    assert match_layers(network, ["input_linear"]) == found


def test_endings_are_whole_names(network):
    # "mlp.w_in" is not "center_mlp.w_in", and "_linear" is no name at all.
    assert match_layers(network, ["mlp.w_in"]) == [f"{block}.mlp.w_in" for block in BLOCKS]
    with pytest.raises(AdapterError, match="'_linear' matches no linear layer"):
        match_layers(network, ["_linear"])


def test_the_default_is_six_layers_a_gnn_layer_in_the_networks_order(network):
    found = match_layers(network, DEFAULT_TARGET_MODULES)
    assert len(found) == 12
    layers = linear_layers(network)
    assert found == sorted(found, key=layers.index)
    assert match_layers(network, tuple(reversed(DEFAULT_TARGET_MODULES))) == found


def test_whole_paths_match_once(network):
    path = f"{BLOCKS[1]}.mlp.w_out"
    assert match_layers(network, [path]) == [path]


def test_a_string_is_a_regular_expression_for_whole_paths(network):
    found = match_layers(network, r".*layers\.0\.(mlp|center_mlp)\.w_(in|out)")
    assert len(found) == 8
    assert match_layers(network, [r"gnn_layers\.1\..*attention\..*"]) == [
        f"{BLOCKS[1]}.attention.input_linear",
        f"{BLOCKS[1]}.attention.output_linear",
    ]


def test_all_linear_is_everything_but_the_heads(network):
    found = match_layers(network, "all-linear")
    assert found == linear_layers(network)
    assert "combination_mlps.0.0" in found
    assert "gnn_layers.0.compress.2" in found
    assert not any("head" in name or "last_layers" in name for name in found)
    # Embeddings and norms are no linear layers.
    assert not any("node_embedders" in name or "norm" in name for name in found)


def test_a_pattern_without_match_lists_what_could_match(network):
    with pytest.raises(AdapterError) as caught:
        match_layers(network, ["attention.input_linear", "attention.imput_linear"])
    message = str(caught.value)
    assert "'attention.imput_linear' matches no linear layer" in message
    assert "Did you mean 'attention.input_linear'?" in message
    for ending in (*DEFAULT_TARGET_MODULES, "center_mlp.w_in", "all-linear"):
        assert ending in message


def test_heads_cannot_be_adapted(network):
    with pytest.raises(AdapterError, match="matches no linear layer"):
        match_layers(network, [r"node_heads\..*"])


@pytest.mark.parametrize("patterns", [[], ()])
def test_no_patterns(network, patterns):
    with pytest.raises(AdapterError, match="target_modules is empty"):
        match_layers(network, patterns)


def test_a_broken_regular_expression(network):
    with pytest.raises(AdapterError, match=r"'\*\.mlp' is neither a layer nor a regular"):
        match_layers(network, ["*.mlp"])
