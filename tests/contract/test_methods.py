"""Every law of adapters on every method of adapting."""

from __future__ import annotations

import copy
from pathlib import Path

import laws
import pytest
import torch

from models import METHODS, all_structures, crystal, ethanol, random_potential, trained_adapter
from pet_finetune.adapters import AdapterConfig, active_adapter
from pet_finetune.model import Potential

FRAMES = list(all_structures().values())


@pytest.fixture
def base() -> Potential:
    return random_potential(num_attention_layers=2, num_neighbors_adaptive=4.0, zbl=True)


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest) -> AdapterConfig:
    return AdapterConfig(**{"rank": 2, "alpha": 3.0, **METHODS[request.param]})


@pytest.fixture
def adapted(base: Potential, config: AdapterConfig) -> Potential:
    return trained_adapter(copy.deepcopy(base), **vars(config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_injection_is_the_identity(base: Potential, config: AdapterConfig, dtype: torch.dtype):
    laws.injection_is_the_identity(base.to(dtype), FRAMES, config)


def test_merged_equals_unmerged(adapted: Potential):
    laws.merged_equals_unmerged(adapted, FRAMES)


def test_unmerging_returns_the_base(adapted: Potential, base: Potential):
    laws.unmerging_returns_the_base(adapted, base)


def test_disabled_equals_the_base(adapted: Potential, base: Potential):
    laws.disabled_equals_the_base(adapted, base, FRAMES)


def test_ejected_is_the_base(adapted: Potential, base: Potential):
    laws.ejected_is_the_base(adapted, base, FRAMES)


def test_only_what_is_stated_trains(adapted: Potential):
    config = active_adapter(adapted)
    assert config is not None
    laws.only_what_is_stated_trains(adapted, config)


def test_forces_are_finite_differences(adapted: Potential):
    laws.forces_are_finite_differences(adapted, ethanol())


def test_stress_is_finite_differences(adapted: Potential):
    laws.stress_is_finite_differences(adapted, crystal())


def test_alone_equals_in_a_batch(adapted: Potential):
    laws.alone_equals_in_a_batch(adapted, FRAMES)


@pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda make: make.__name__)
def test_energy_is_extensive(adapted: Potential, make):
    laws.energy_is_extensive(adapted, make())


def test_saving_loses_nothing(adapted: Potential, tmp_path: Path):
    laws.saving_loses_nothing(adapted, FRAMES, tmp_path)


def test_saving_an_adapter_loses_nothing(adapted: Potential, base: Potential, tmp_path: Path):
    laws.saving_an_adapter_loses_nothing(adapted, base, FRAMES, tmp_path)


def test_resuming_loses_nothing(adapted: Potential, tmp_path: Path):
    laws.resuming_loses_nothing(adapted, FRAMES, tmp_path)
