"""An exported model says what the calculator says, whatever went into it."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from metatensor.torch import Labels
from metatomic.torch import ModelOutput
from metatomic_ase import MetatomicCalculator

from models import (
    KINDS,
    METHODS,
    QUANTISED,
    all_structures,
    crystal,
    ethanol,
    property_potential,
    random_potential,
    trained_adapter,
    with_last_layer,
)
from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.committee.committee import Calibration
from pet_finetune.committee.committee_files import write_committee
from pet_finetune.export.export import export_model
from pet_finetune.keys import TargetSpec

FRAMES = all_structures().values()


def engine(path: Path, **settings: Any) -> MetatomicCalculator:
    """ASE's engine for metatomic models, with all of its own checks."""
    return MetatomicCalculator(path, check_consistency=True, device="cpu", **settings)


def assert_same_numbers(
    one: Any, other: Any, frames: Iterable[Atoms], tolerance: float, energies: bool = True
) -> None:
    """Energies, forces and stresses of two calculators, relative to 1 plus the largest."""
    for frame in frames:
        found, expected = frame.copy(), frame.copy()
        found.calc, expected.calc = one, other
        names = ["energy", "forces"] + ["energies"] * energies + ["stress"] * bool(frame.pbc.all())
        for name in names:
            a, b = (
                np.array(one_of.calc.get_property(name, one_of)) for one_of in (found, expected)
            )
            difference = np.abs(a - b).max() / (1.0 + np.abs(b).max())
            assert difference <= tolerance, f"{name} of {frame.symbols}: {difference:.1e}"


@pytest.fixture(autouse=True)
def _plainly() -> Any:
    """Run TorchScript without compiling it for the shapes of a few small structures first.

    Quietly: metatomic's calculator computes stresses without a volume too, and says so.
    """
    with warnings.catch_warnings(), torch.jit.optimized_execution(False):
        warnings.filterwarnings("ignore", message="invalid value encountered")
        warnings.filterwarnings("ignore", message="divide by zero encountered")
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        yield


@pytest.mark.few(3)
@pytest.mark.parametrize("method", [*METHODS, *QUANTISED])
def test_of_every_method(method: str, tmp_path: Path) -> None:
    base = random_potential(num_gnn_layers=1, zbl=True)
    checkpoint = save_checkpoint(tmp_path / "base.ckpt", base)
    settings = {**METHODS, **QUANTISED}[method]
    save_adapter(trained_adapter(base, **settings), tmp_path / "adapter", "base")
    path = tmp_path / "model.pt"
    outcome = export_model(checkpoint, path, adapter=tmp_path / "adapter")
    assert outcome.outputs == {"energy": "energy"}
    calculator = PETCalculator(checkpoint, adapter=tmp_path / "adapter", device="cpu")
    assert_same_numbers(engine(path), calculator, [ethanol(), crystal()], 1e-10)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [*((kind, "float64", 1e-10) for kind in KINDS), ("today", "float32", 1e-5)],
)
def test_of_every_kind(kind: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", random_potential(**KINDS[kind]))
    export_model(checkpoint, tmp_path / "model.pt", dtype=dtype)
    calculator = PETCalculator(checkpoint, device="cpu", dtype=dtype)
    frames = [frame.copy() for frame in FRAMES]
    frames[0].info.update(charge=1, spin=2)  # other kinds ignore them
    assert_same_numbers(engine(tmp_path / "model.pt"), calculator, frames, tolerance)


@pytest.mark.slow
def test_of_variants_and_properties(tmp_path: Path) -> None:
    """Each output is what the potential says; direct forces and stress go by standard names."""
    model = property_potential()
    model.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    model.scale.set("energy/pbe", 3.0)
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", model)
    outcome = export_model(checkpoint, tmp_path / "model.pt")
    assert outcome.difference < 1e-10
    assert {"energy", "energy/pbe", "mtt::gap", "non_conservative_stress"} <= set(outcome.outputs)
    for settings, ours in (
        ({"variants": {"energy": "pbe"}}, {"target": "energy/pbe"}),
        ({"non_conservative": True}, {"non_conservative": True}),
    ):
        calculator = PETCalculator(checkpoint, device="cpu", **ours)
        found = engine(tmp_path / "model.pt", **settings)
        assert_same_numbers(found, calculator, [ethanol(), crystal()], 1e-10, energies=False)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "dtype", "members"),
    [("today", "float64", 3), ("first", "float64", 0), ("grid", None, 3)],
)
def test_of_a_last_layer(kind: str, dtype: str | None, members: int, tmp_path: Path) -> None:
    """The uncertainty of each energy, and what members say, as the calculator's."""
    floating = torch.float64 if dtype else torch.float32
    model = random_potential(targets=("energy", "energy/pbe"), dtype=floating, **KINDS[kind])
    with_last_layer(model, "energy/pbe", members)
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", with_last_layer(model, members=members))
    outcome = export_model(checkpoint, tmp_path / "model.pt", dtype=dtype)
    names = {"energy", "energy/pbe", "energy_uncertainty", "energy_uncertainty/pbe"}
    assert set(outcome.outputs) == names | (
        {"energy_ensemble", "energy_ensemble/pbe"} if members else set()
    )
    found = engine(tmp_path / "model.pt")
    frames = [ethanol(), crystal()]
    close = {"rtol": 1e-9 if dtype else 1e-4, "atol": 1e-9 if dtype else 1e-3}
    request = ModelOutput(sample_kind="system")
    of_systems = found.run_model(frames, dict.fromkeys(outcome.outputs, request))
    of_atoms = found.run_model(
        frames, dict.fromkeys(outcome.outputs, ModelOutput(sample_kind="atom"))
    )
    for target, end in (("energy", ""), ("energy/pbe", "/pbe")):
        calculator = PETCalculator(checkpoint, target=target, device="cpu")
        for row, atoms in enumerate(frames):
            sure = calculator.get_property("energy_uncertainty", atoms)
            there = of_systems[f"energy_uncertainty{end}"].block().values[row]
            np.testing.assert_allclose(there.item(), sure, **close)
            if members:
                each = of_systems[f"energy_ensemble{end}"].block().values[row]
                expected = calculator.get_property("energy_ensemble", atoms)
                np.testing.assert_allclose(each, expected, **close)
        local = of_atoms[f"energy_uncertainty{end}"].block().values
        assert local.shape == (sum(map(len, frames)), 1)
        assert local.min() > 0
        if members:  # of atoms they add up
            summed = of_atoms[f"energy_ensemble{end}"].block().values[: len(frames[0])].sum(0)
            whole = of_systems[f"energy_ensemble{end}"].block().values[0]
            np.testing.assert_allclose(summed, whole, **close)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float64", None])
def test_of_a_committee(dtype: str | None, tmp_path: Path) -> None:
    """The mean, the spread and what each member says, of systems and of atoms."""
    kind = torch.float64 if dtype else torch.float32
    base = random_potential(num_gnn_layers=1, zbl=True, dtype=kind)
    checkpoint = save_checkpoint(tmp_path / "base.ckpt", base)
    for seed in range(3):
        adapted = trained_adapter(copy.deepcopy(base), seed=seed)
        save_adapter(adapted, tmp_path / f"a{seed}", "base")
    write_committee(tmp_path, ["a0", "a1", "a2"], Calibration(energy=2.5))
    outcome = export_model(checkpoint, tmp_path / "model.pt", adapter=tmp_path, dtype=dtype)
    assert list(outcome.outputs) == ["energy", "energy_uncertainty", "energy_ensemble"]
    found = engine(tmp_path / "model.pt", uncertainty_threshold=1e9)
    expected = PETCalculator(checkpoint, adapters=tmp_path, device="cpu")
    tolerance = 1e-10 if dtype else 1e-5
    frames = [ethanol(), crystal()]
    assert_same_numbers(found, expected, frames, tolerance, energies=False)
    for of_atoms in (False, True):
        request = ModelOutput(sample_kind="atom" if of_atoms else "system")
        asked = dict.fromkeys(outcome.outputs, request)
        answers = {n: b.block().values for n, b in found.run_model(frames, asked).items()}
        each, spread = answers["energy_ensemble"], answers["energy_uncertainty"]
        assert each.shape == (sum(map(len, frames)) if of_atoms else 2, 3)
        torch.testing.assert_close(
            answers["energy"], each.mean(1, keepdim=True), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(spread, 2.5 * each.std(1, keepdim=True), rtol=1e-6, atol=1e-9)
        assert spread.min() > 1e-3
    request = {"energy_uncertainty": ModelOutput(sample_kind="system")}
    theirs = found.run_model(frames, request)["energy_uncertainty"].block().values
    for index, frame in enumerate(frames):
        frame.calc = expected
        frame.get_potential_energy()
        ours = float(expected.results["energy_uncertainty"])
        assert float(theirs[index]) == pytest.approx(ours, rel=1e-9 if dtype else 1e-3)


@pytest.mark.slow
def test_weights_that_members_share_are_written_once(tmp_path: Path) -> None:
    base = random_potential(d_node=64, d_feedforward=256)
    checkpoint = save_checkpoint(tmp_path / "base.ckpt", base)
    for seed in range(4):
        settings = {"target_modules": ("attention.output_linear",), "modules_to_save": ()}
        adapted = trained_adapter(copy.deepcopy(base), seed=seed, **settings)
        save_adapter(adapted, tmp_path / f"a{seed}", "base")
    export_model(checkpoint, tmp_path / "one.pt", adapter=tmp_path / "a0")
    export_model(checkpoint, tmp_path / "four.pt", adapter=[tmp_path / f"a{n}" for n in range(4)])
    one, four = ((tmp_path / name).stat().st_size for name in ("one.pt", "four.pt"))
    assert four < 1.6 * one


def test_energies_of_large_systems_are_not_rounded(tmp_path: Path) -> None:
    """A float32 network that tells engines its energies in float64."""
    base = random_potential(dtype=torch.float32)
    base.composition.set("energy", base.composition.get("energy") - 1e5 - 0.123456789)
    checkpoint = save_checkpoint(tmp_path / "base.ckpt", base)
    atoms = ethanol()
    atoms.calc = PETCalculator(checkpoint, device="cpu")
    expected = atoms.get_potential_energy()
    errors = {}
    for dtype in (None, "float32"):
        export_model(checkpoint, tmp_path / "model.pt", dtype=dtype)
        atoms.calc = engine(tmp_path / "model.pt")
        errors[dtype] = abs(atoms.get_potential_energy() - expected)
    assert errors[None] < 1e-4 < 1e-3 < errors["float32"]


@pytest.mark.slow
def test_without_this_package(tmp_path: Path) -> None:
    """A fresh process in which neither this package nor metatrain can be imported."""
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", random_potential(zbl=True))
    export_model(checkpoint, tmp_path / "model.pt")
    code = (
        "import sys\n"
        "sys.modules['pet_finetune'] = sys.modules['metatrain'] = None\n"
        "import ase.io\n"
        "from metatomic_ase import MetatomicCalculator\n"
        "atoms = ase.io.read('ethanol.xyz')\n"
        "atoms.calc = MetatomicCalculator('model.pt', device='cpu')\n"
        "print(atoms.get_potential_energy(), atoms.get_forces()[0, 0])"
    )
    ase.io.write(tmp_path / "ethanol.xyz", ethanol())
    atoms = ase.io.read(tmp_path / "ethanol.xyz")
    atoms.calc = PETCalculator(checkpoint, device="cpu")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = [atoms.get_potential_energy(), atoms.get_forces()[0, 0]]
    assert [float(word) for word in run.stdout.split()] == pytest.approx(expected, rel=1e-9)


def test_another_model_is_told_apart(tmp_path: Path) -> None:
    """The tolerances are far below what one weight in a thousand makes of a prediction."""
    model = random_potential()
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", model)
    export_model(checkpoint, tmp_path / "model.pt")
    next(model.network.parameters()).data.mul_(1.001)
    other = save_checkpoint(tmp_path / "other.ckpt", model)
    calculator = PETCalculator(other, device="cpu")
    with pytest.raises(AssertionError):
        assert_same_numbers(engine(tmp_path / "model.pt"), calculator, [ethanol()], 1e-5)


def test_of_several_systems_and_selected_atoms(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", random_potential(zbl=True))
    export_model(checkpoint, tmp_path / "model.pt")
    found, frames = engine(tmp_path / "model.pt"), list(FRAMES)
    calculator = PETCalculator(checkpoint, device="cpu")
    atoms = [calculator.get_property("energies", frame) for frame in frames]
    whole = {"energy": ModelOutput(unit="eV", sample_kind="system")}
    each = {"energy": ModelOutput(unit="meV", sample_kind="atom")}
    block = found.run_model(frames, whole)["energy"].block()
    assert block.samples.values.tolist() == [[index] for index in range(len(frames))]
    assert block.values.squeeze(1).numpy() == pytest.approx([a.sum() for a in atoms], rel=1e-10)
    block = found.run_model(frames, each)["energy"].block()
    assert block.values.squeeze(1).numpy() == pytest.approx(1000 * np.concatenate(atoms), rel=1e-10)
    # In any order, and none of the second system.
    chosen = [[2, 3], [0, 4], [0, 1]]
    selected = Labels(["system", "atom"], torch.tensor(chosen))
    block = found.run_model(frames, each, selected)["energy"].block()
    assert block.samples.values.tolist() == chosen
    expected = [1000 * atoms[system][atom] for system, atom in chosen]
    assert block.values.squeeze(1).numpy() == pytest.approx(expected, rel=1e-10)
    block = found.run_model(frames, whole, selected)["energy"].block()
    assert block.samples.values.tolist() == [[0], [2]]
    sums = [atoms[0][1] + atoms[0][4], atoms[2][3]]
    assert block.values.squeeze(1).numpy() == pytest.approx(sums, rel=1e-10)
