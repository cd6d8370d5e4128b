"""The models that the laws are tested on: between them every kind of layer and option."""

from __future__ import annotations

import copy

import pytest

from models import KINDS, random_potential, trained_adapter
from pet_finetune.model.potential import Potential


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
