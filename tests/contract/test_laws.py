"""Every law of ``laws`` on every kind of model, with and without adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import laws
import pytest
import torch
from ase import Atoms
from ase.io import read

from models import all_structures, apart, crystal, ethanol, lone_atom, random_potential, slab
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.model.potential import Potential

FRAMES = list(all_structures().values())
SHAPES = pytest.mark.parametrize("make", [ethanol, crystal, slab], ids=lambda make: make.__name__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(),
        AdapterConfig(rank=3, alpha=100.0, dropout=0.5, target_modules="all-linear"),
        AdapterConfig(target_modules=["mlp.w_in"], modules_to_save=[]),
    ],
    ids=["default", "everywhere", "one"],
)
def test_injection_is_the_identity(base: Potential, config: AdapterConfig, dtype: torch.dtype):
    laws.injection_is_the_identity(base.to(dtype), FRAMES, config)


def test_merged_equals_unmerged(adapted: Potential, base: Potential):
    laws.merged_equals_unmerged(adapted, base, FRAMES)


def test_unmerging_returns_the_base(adapted: Potential, base: Potential):
    laws.unmerging_returns_the_base(adapted, base)


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(),
        AdapterConfig(target_modules="all-linear", modules_to_save=[]),
        AdapterConfig(
            target_modules=["mlp.w_in", "compress.0"], modules_to_save=["node_embedders"]
        ),
    ],
    ids=["default", "everywhere", "some"],
)
def test_only_what_is_stated_trains(base: Potential, config: AdapterConfig):
    adapted = copy.deepcopy(base)
    inject(adapted, config)
    laws.only_what_is_stated_trains(adapted, base, config)


@SHAPES
def test_forces_are_finite_differences(model: Potential, make):
    print(f"{laws.forces_are_finite_differences(model, make()):.1e} eV/A")


def test_stress_is_finite_differences(model: Potential):
    print(f"{laws.stress_is_finite_differences(model, crystal()):.1e} eV/A^3")


def test_alone_equals_in_a_batch(model: Potential):
    laws.alone_equals_in_a_batch(model, FRAMES)


def test_atoms_without_neighbors_work(model: Potential):
    laws.atoms_without_neighbors_work(model, lone_atom(), apart())


@SHAPES
def test_energy_is_extensive(model: Potential, make):
    laws.energy_is_extensive(model, make())


@SHAPES
def test_translation_changes_nothing(model: Potential, make):
    laws.translation_changes_nothing(model, make())


@SHAPES
def test_permutation_changes_nothing(model: Potential, make):
    laws.permutation_changes_nothing(model, make())


@pytest.mark.parametrize("make", [crystal, slab], ids=lambda make: make.__name__)
def test_periodic_images_change_nothing(model: Potential, make):
    laws.periodic_images_change_nothing(model, make())


def test_the_rotational_error_is_measured(base: Potential):
    """It is not zero by construction; a lone atom has none."""
    found = laws.rotational_errors(base, [ethanol(), crystal()])
    print({name: f"{value:.1f}" for name, value in found.items()}, "meV/atom, meV/A")
    assert min(found.values()) > 1e-3
    assert max(laws.rotational_errors(base, [lone_atom()]).values()) < 1e-9


def test_the_foundation_has_learnt_to_be_rotated(shared_dir: Path):
    model = load_checkpoint(shared_dir / "foundation" / "pet-xtb-v0.ckpt").model
    frames: list[Atoms] = read(shared_dir / "foundation" / "structures.xyz", ":6")
    found = laws.rotational_errors(model, frames)
    print({name: f"{value:.2f}" for name, value in found.items()}, "meV/atom, meV/A")
    assert found["energy"] < 5.0
    assert found["forces"] < 50.0


def test_saving_loses_nothing(model: Potential, tmp_path: Path):
    laws.saving_loses_nothing(model, FRAMES, tmp_path)


def test_saving_loses_no_target(tmp_path: Path):
    model = random_potential(targets=("energy", "energy/pbe"), dtype=torch.float32, zbl=True)
    laws.saving_loses_nothing(model, FRAMES, tmp_path)


def test_saving_an_adapter_loses_nothing(adapted: Potential, base: Potential, tmp_path: Path):
    laws.saving_an_adapter_loses_nothing(adapted, base, FRAMES, tmp_path)


def test_an_interrupted_save_leaves_the_old_file(
    base: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(error: BaseException) -> None:
        def half_way(content, file, **ignored):
            file.write(b"half a file")
            raise error

        monkeypatch.setattr(torch, "save", half_way)

    new = copy.deepcopy(base)
    next(new.network.parameters()).data += 1.0
    laws.an_interrupted_save_leaves_the_old_file(base, new, tmp_path, interrupt)
