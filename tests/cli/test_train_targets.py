"""Runs that train targets beyond the energy."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch

from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.checkpoint.opening import load_checkpoint, open_potential
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.training.loggers import RunDisplay
from tiny_data import crystals, epochs, molecules, options, write_frames, write_options

TARGETS: dict[str, dict[str, Any]] = {
    "energy": {"key": "energy", "unit": "eV"},
    "non_conservative_forces": {"key": "forces", "unit": "eV/A"},
    "non_conservative_stress": {"key": "stress", "unit": "eV/A^3"},
    "gap": {"quantity": "gap", "unit": "eV"},
    "charges": {"key": "q", "quantity": "charge", "unit": "e", "sample_kind": "atom"},
}


@pytest.fixture(autouse=True)
def _data(here: Path) -> None:
    """Molecules and crystals with all labels, in ``train.xyz`` and ``test.xyz``."""
    rng = np.random.default_rng(0)
    for name, count in (("train.xyz", 6), ("test.xyz", 2)):
        frames = molecules(count, seed=count) + crystals(count, seed=count)
        for atoms in frames:
            atoms.info["gap"] = 2.0 + rng.normal()
            atoms.arrays["q"] = 0.1 * atoms.numbers + 0.01 * rng.normal(size=len(atoms))
        write_frames(here / name, frames)


def write(*names: str, **training: Any) -> None:
    targets = {name: TARGETS[name] for name in names}
    sets = {
        key: {"systems": {"read_from": f"{file}.xyz", "length_unit": "A"}, "targets": targets}
        for key, file in (("training_set", "train"), ("test_set", "test"))
    }
    training = {"per_structure_targets": ["gap"] if "gap" in names else [], **training}
    write_options(Path("mine.yaml"), options(training, **sets))


FULL = {"finetune": {"method": "full"}}


def test_direct_heads_beside_an_energy_on_the_same_labels(command: Any) -> None:
    write(*TARGETS, **FULL)
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 0, answer.err
    for text in ("non_conservative_forces MAE", "non_conservative_stress RMSE", "gap MAE",
                 "meV/A^3", "energy forces MAE"):  # fmt: skip
        assert text in answer.out
    log = Path("run/train.log").read_text()
    for text in (
        "target 'non_conservative_forces' is new and starts with random heads",
        "baseline of 'charges' (fit)", "scale of 'non_conservative_stress'",
        "6 of 12 frames have the values of target 'non_conservative_stress'",
    ):  # fmt: skip
        assert text in log
    assert "baseline of 'non_conservative_forces'" not in log
    first, last = epochs("run")[0], epochs("run")[-1]
    for name in set(TARGETS) - {"energy"}:
        assert float(first[f"validation/{name}/value_mae"]) > 0
        assert float(last[f"train/{name}/value_mae"]) > 0
    model = load_checkpoint("run/best_model.ckpt").model
    assert set(model.targets) == set(TARGETS)
    assert model.targets["gap"].intensive
    atoms = ase.io.read("test.xyz", -1)
    atoms.calc = PETCalculator("run/best_model.ckpt", device="cpu", non_conservative=True)
    assert np.isfinite(atoms.get_forces()).all()
    assert np.isfinite(atoms.get_stress()).all()
    shown = command("info", "run/best_model.ckpt")
    assert shown.code == 0
    assert "a vector for each atom" in " ".join(shown.out.split())
    answer = command("eval", "run/best_model.ckpt", "test.xyz", "--target", "gap")
    assert answer.code == 0, answer.err
    assert "gap MAE" in answer.out
    answer = command("eval", "mine.yaml", "-c", "run/best_model.ckpt")
    assert answer.code == 0, answer.err
    assert "charges RMSE" in answer.out


@pytest.mark.parametrize("name", ["charges", "non_conservative_forces", "gap"])
def test_an_adapter_of_a_single_property(name: str, command: Any) -> None:
    """Saved, read onto the base, merged: the run's best model."""
    write(name, num_epochs=2)
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 0, answer.err
    best = load_checkpoint("run/best_model.ckpt").model
    assert list(best.targets) == [name]
    adapted, targets = open_potential("base.ckpt", "run/adapter")
    assert targets == (name,)
    batch = batch_from_atoms(ase.io.read("test.xyz", ":"), best.cutoff, best.dtype)
    found = [model.predict_property(batch, name).detach() for model in (best, adapted)]
    assert torch.equal(*found)
    assert found[0].abs().max() > 0
    answer = command("eval", "mine.yaml", "-c", "base.ckpt", "--adapter", "run/adapter")
    assert answer.code == 0, answer.err
    assert f"{name} MAE" in answer.out


@pytest.mark.parametrize("method", ["full", "heads", "lora"])
def test_a_run_of_several_targets_goes_on_exactly(
    method: str, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(*TARGETS, num_epochs=2, ema=0.9, finetune={"method": method})
    assert command("train", "mine.yaml", "-c", "base.ckpt", "-o", "whole").code == 0
    left = [2]  # of three steps an epoch

    def step(*ignored: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunDisplay, "step_ended", step)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    assert not Path("run/results.json").exists()
    answer = command("train", "mine.yaml", "-o", "run", "--restart", "run")
    assert answer.code == 0, answer.err
    assert "charges MAE" in answer.out
    for name in ("last.ckpt", "best_model.ckpt"):
        one, other = (load_checkpoint(Path(folder, name)) for folder in ("whole", "run"))
        assert one.model.targets == other.model.targets
        state = other.model.state_dict()
        for key, value in one.model.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    times = ("seconds", "structures_per_second")
    tables = [
        [{k: v for k, v in row.items() if k not in times} for row in epochs(folder)]
        for folder in ("whole", "run")
    ]
    assert tables[0] == tables[1]
    assert Path("run/results.json").read_text() == Path("whole/results.json").read_text()


def test_two_levels_of_theory_under_one_adapter(command: Any, stop: Any) -> None:
    """Two training sets, each with targets, keys and weights of its own; stopped and resumed."""
    rng = np.random.default_rng(3)
    for name, shift, count in (("cheap", 0.0, 6), ("dear", 7.0, 5)):
        frames = molecules(count, seed=count)
        for atoms in frames:
            results = atoms.calc.results
            atoms.info[f"{name}_energy"] = results["energy"] + shift * len(atoms)
            atoms.arrays[f"{name}_forces"] = results["forces"] * (1.0 + 0.01 * shift)
            atoms.info["weight"] = rng.uniform(0.5, 2.0)
            atoms.calc = None
        write_frames(Path(f"{name}.xyz"), frames)

    def data(name: str, target: str, **more: Any) -> dict[str, Any]:
        own = {"quantity": "energy", "key": f"{name}_energy", "forces": {"key": f"{name}_forces"}}
        systems = {"read_from": f"{name}.xyz", "length_unit": "angstrom"}
        return {"systems": systems, "targets": {target: {**own, **more}}}

    sets = [data("cheap", "energy"), data("dear", "energy/dft", weight_key="weight")]
    test = [data("cheap", "energy"), data("dear", "energy/dft")]
    write_options(
        Path("mine.yaml"),
        options({"num_epochs": 3}, training_set=sets, validation_set=0.2, test_set=test),
    )
    assert command("train", "mine.yaml", "-c", "base.ckpt", "-o", "whole").code == 0
    stop(4)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    assert not Path("run/results.json").exists()
    stop(0)
    answer = command("train", "mine.yaml", "-o", "run", "--restart", "run")
    assert answer.code == 0, answer.err
    assert "energy/dft forces MAE" in answer.out
    for name in ("last.ckpt", "best_model.ckpt"):
        one, other = (load_checkpoint(Path(folder, name)).model for folder in ("whole", "run"))
        state = other.state_dict()
        for key, value in one.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    adapter = read_adapter("run/adapter")
    assert [target.spec.name for target in adapter.targets] == ["energy", "energy/dft"]
    assert [target.inherited_from for target in adapter.targets] == [None, "energy"]
    # Each level has a baseline of its own: 7 eV an atom lie between them.
    cheap, dear = (target.composition for target in adapter.targets)
    atoms = ase.io.read("dear.xyz", 0)
    counts = torch.tensor([(atoms.numbers == number).sum() for number in adapter.species])
    assert float((dear - cheap) @ counts.double()) / len(atoms) == pytest.approx(7.0, abs=0.5)
    found = {}
    for target in ("energy", "energy/dft"):
        calc = PETCalculator("base.ckpt", adapter="run/adapter", target=target, device="cpu")
        found[target] = calc.get_potential_energy(atoms)
        best = PETCalculator("run/best_model.ckpt", target=target, device="cpu")
        assert best.get_potential_energy(atoms) == pytest.approx(found[target], abs=1e-4)
    assert PETCalculator("base.ckpt", adapter="run/adapter", device="cpu").target == "energy"
    assert abs(found["energy/dft"] - found["energy"]) > 5.0 * len(atoms)
    # Those weights count: with others the adapter is another.
    Path("mine.yaml").write_text(Path("mine.yaml").read_text().replace("weight_key: weight", ""))
    assert command("train", "mine.yaml", "-c", "base.ckpt", "-o", "plain").code == 0
    plain = read_adapter("plain/adapter").tensors
    assert any(not torch.equal(plain[name], value) for name, value in adapter.tensors.items())


def test_heads_of_direct_forces_pass_on_to_the_newer_name(command: Any) -> None:
    write("energy", "non_conservative_forces", **FULL, num_epochs=1)
    assert command("train", "mine.yaml", "-c", "base.ckpt", "-o", "first").code == 0
    text = Path("mine.yaml").read_text()
    Path("mine.yaml").write_text(text.replace("conservative_forces:", "conservative_force:"))
    answer = command("train", "mine.yaml", "-c", "first/best_model.ckpt", "-o", "second")
    assert answer.code == 0, answer.err
    assert (
        "target 'non_conservative_force' is new and starts with the heads of "
        "'non_conservative_forces'" in Path("second/train.log").read_text()
    )
