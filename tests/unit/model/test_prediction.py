"""Forces inside ``torch.inference_mode()``, where nothing can be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from models import crystal, ethanol, random_potential, trained_adapter
from pet_finetune import PETCalculator, load
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.model.potential import Potential

Mode = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=[torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


def forces(model: Potential, atoms: Atoms) -> torch.Tensor:
    return model.predict(batch_from_atoms(atoms, model.cutoff), stress=True).forces.detach()


@pytest.mark.usefixtures("both_ways")
def test_a_model_predicts_the_same_inside_and_behind_it(mode: Mode):
    """Whether it was built there, its precision was changed there, or only its input was made."""
    expected = forces(random_potential(), crystal())
    outside = random_potential()
    with mode():
        torch.testing.assert_close(forces(outside, crystal()), expected)
        inside = random_potential()
        torch.testing.assert_close(forces(inside, crystal()), expected)
        batch = batch_from_atoms(crystal(), outside.cutoff)
        built = random_potential()
        rounded = random_potential().float().double()
    torch.testing.assert_close(outside.predict(batch).forces, expected)
    torch.testing.assert_close(forces(built, crystal()), expected)
    torch.testing.assert_close(forces(rounded, crystal()), expected, atol=1e-3, rtol=1e-3)


def test_a_model_built_inside_can_train_behind_it():
    with torch.inference_mode():
        model = random_potential()
    prediction = model.predict(batch_from_atoms(ethanol(), model.cutoff), create_graph=True)
    prediction.forces.square().sum().backward()
    slope = model.network.gnn_layers[0].edge_embedder.weight.grad
    assert slope is not None
    assert slope.abs().max() > 0


def test_energies_alone_keep_no_graph_inside_it(mode: Mode):
    model = random_potential()
    with mode():
        prediction = model.predict(batch_from_atoms(ethanol(), model.cutoff), forces=False)
    assert not prediction.energy.requires_grad


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "base.ckpt", random_potential())
    for seed in (0, 1):
        save_adapter(trained_adapter(random_potential(), seed=seed), folder / str(seed), "base")
    return folder


def as_it_is(path: Path) -> PETCalculator:
    return PETCalculator(path / "base.ckpt", device="cpu")


def with_loaded_adapter(path: Path) -> PETCalculator:
    model = load(path / "base.ckpt")
    model.load_adapter(path / "0")
    calculator = PETCalculator(model, device="cpu", dtype="float64")
    calculator.load_adapter(path / "1", "other")
    calculator.set_adapter("other")
    return calculator


def committee(path: Path) -> PETCalculator:
    return PETCalculator(path / "base.ckpt", adapters=[path / "0", path / "1"], device="cpu")


@pytest.mark.few(8)
@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("make", [as_it_is, with_loaded_adapter, committee])
@pytest.mark.parametrize("repeats", [1, 3], ids=["few atoms", "many atoms"])
def test_a_calculator_computes_the_same_inside_and_behind_it(
    mode: Mode, make: Callable[[Path], PETCalculator], repeats: int, saved: Path
):
    atoms = crystal() * (repeats, 1, 1)
    moved = atoms.copy()
    moved.rattle(0.02, seed=1)
    expected = [make(saved).get_forces(structure) for structure in (atoms, moved)]
    outside = make(saved)
    with mode():
        inside = make(saved)
        for calculator in (inside, outside):
            np.testing.assert_allclose(calculator.get_forces(atoms), expected[0], atol=1e-10)
    np.testing.assert_allclose(inside.get_forces(moved), expected[1], atol=1e-10)
