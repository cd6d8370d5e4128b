"""Every law of adapters on every method of adapting."""

from __future__ import annotations

import copy
from pathlib import Path

import laws
import pytest
import torch

from models import (
    METHODS,
    QUANTISED,
    all_structures,
    crystal,
    ethanol,
    random_potential,
    starting_model,
    trained_adapter,
)
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import eject, inject, merged_copy
from pet_finetune.errors import AdapterError
from pet_finetune.model.potential import Potential

FRAMES = list(all_structures().values())


@pytest.fixture
def base() -> Potential:
    return random_potential(num_attention_layers=2, num_neighbors_adaptive=4.0, zbl=True)


@pytest.fixture(params=[*METHODS, *QUANTISED])
def config(request: pytest.FixtureRequest) -> AdapterConfig:
    settings = {**METHODS, **QUANTISED}[request.param]
    return AdapterConfig(**{"rank": 2, "alpha": 3.0, **settings})


@pytest.fixture
def start(base: Potential, config: AdapterConfig) -> Potential:
    """What the adapter starts from: the base, rounded where it is quantised."""
    return starting_model(base, config)


@pytest.fixture
def tolerance(config: AdapterConfig) -> float:
    """Between two ways to compute the same; zero stands for the last bit."""
    return 0.0 if config.quant_bits is None else 1e-10


@pytest.fixture
def adapted(base: Potential, config: AdapterConfig) -> Potential:
    return trained_adapter(copy.deepcopy(base), **vars(config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_injection_is_the_identity(base: Potential, config: AdapterConfig, dtype: torch.dtype):
    if config.quant_bits is None:
        laws.injection_is_the_identity(base.to(dtype), FRAMES, config)


@pytest.mark.parametrize("settings", QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_base_is_the_rounded_one(base: Potential, settings):
    """It changes the predictions, and as rounding the weights does: by no more at any precision."""
    config = AdapterConfig(rank=2, **settings)
    model = copy.deepcopy(base)
    inject(model, config)
    before, found = laws.predict(base, FRAMES), laws.predict(model, FRAMES)
    laws.assert_differs(found, before)
    laws.assert_close(found, laws.predict(merged_copy(model), FRAMES), 1e-10)
    single = copy.deepcopy(base).float()
    inject(single, config)
    laws.assert_close(laws.predict(merged_copy(single).double(), FRAMES), found, 1e-3)


@pytest.mark.few(4)
def test_merged_equals_unmerged(adapted: Potential, start: Potential, tolerance: float):
    laws.merged_equals_unmerged(adapted, start, FRAMES, tolerance)


def test_unmerging_returns_the_base(adapted: Potential, base: Potential, config: AdapterConfig):
    frozen = base if config.quant_bits is None else copy.deepcopy(adapted)
    laws.unmerging_returns_the_base(adapted, frozen)


def test_ejected_is_the_base(adapted: Potential, base: Potential, config: AdapterConfig):
    if config.quant_bits is None:
        laws.ejected_is_the_base(adapted, base, FRAMES)
    else:
        with pytest.raises(AdapterError, match="weights were not kept"):
            eject(adapted)


def test_only_what_is_stated_trains(adapted: Potential, base: Potential, config: AdapterConfig):
    laws.only_what_is_stated_trains(adapted, base, config)


def test_forces_are_finite_differences(adapted: Potential):
    laws.forces_are_finite_differences(adapted, ethanol())


def test_stress_is_finite_differences(adapted: Potential):
    laws.stress_is_finite_differences(adapted, crystal())


@pytest.mark.few(5)
def test_alone_equals_in_a_batch(adapted: Potential):
    laws.alone_equals_in_a_batch(adapted, FRAMES)


@pytest.mark.few(6)
@pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda make: make.__name__)
def test_energy_is_extensive(adapted: Potential, make):
    laws.energy_is_extensive(adapted, make())


def test_saving_loses_nothing(adapted: Potential, tmp_path: Path, tolerance: float):
    laws.saving_loses_nothing(adapted, FRAMES, tmp_path, tolerance)


@pytest.mark.few(4)
def test_saving_an_adapter_loses_nothing(
    adapted: Potential, base: Potential, start: Potential, tmp_path: Path
):
    laws.saving_an_adapter_loses_nothing(adapted, base, FRAMES, tmp_path, start)


@pytest.mark.few(5)
def test_resuming_loses_nothing(adapted: Potential, tmp_path: Path):
    laws.resuming_loses_nothing(adapted, FRAMES, tmp_path)
