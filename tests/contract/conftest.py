"""The models that the laws are tested on: between them every kind of layer and option."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from models import random_potential, trained_adapter
from pet_finetune.model import Potential

KINDS: dict[str, dict[str, Any]] = {
    "today": {"num_neighbors_adaptive": 4.0, "zbl": True, "num_attention_layers": 2},
    "first": {
        "featurizer_type": "residual",
        "transformer_type": "PostLN",
        "normalization": "LayerNorm",
        "activation": "SiLU",
        "cutoff_function": "Cosine",
        "d_node": 8,
    },
    "grid": {
        "num_neighbors_adaptive": 4.0,
        "adaptive_cutoff_method": "grid",
        "system_conditioning": True,
        "num_gnn_layers": 1,
    },
}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> Potential:
    """A plain potential."""
    return random_potential(**KINDS[request.param])


@pytest.fixture
def adapted(base: Potential) -> Potential:
    """The same with a trained adapter."""
    return trained_adapter(copy.deepcopy(base))


@pytest.fixture(params=["plain", "adapted"])
def model(request: pytest.FixtureRequest, base: Potential) -> Potential:
    """Each potential with and without an adapter."""
    return base if request.param == "plain" else trained_adapter(copy.deepcopy(base))
