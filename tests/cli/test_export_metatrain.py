"""``pet-finetune export --format metatrain``, and metatrain's own commands on what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
import yaml
from laws import predict
from metatomic.torch import ModelOutput
from metatomic_ase import MetatomicCalculator

import pet_finetune as pf
from metatrain_command import mtt
from models import (
    PROPERTIES,
    crystal,
    ethanol,
    property_potential,
    random_potential,
    trained_adapter,
    with_last_layer,
)
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint import to_metatrain
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from tiny_data import data_section, options

#: Of metatrain: two epochs on the data of the folder.
TRAINING = {"batch_size": 4, "num_epochs": 2, "num_workers": 0, "learning_rate": 1e-4}
MTT_SET = data_section("train.xyz", quantity="energy", forces=True, stress=False)


def mtt_options(architecture: dict[str, Any]) -> Path:
    content = {
        "architecture": architecture,
        "device": "cpu",
        "training_set": MTT_SET,
        "validation_set": {**MTT_SET, "systems": {**MTT_SET["systems"], "read_from": "test.xyz"}},
    }
    Path("mtt.yaml").write_text(yaml.safe_dump(content))
    return Path("mtt.yaml")


def tuned(train: Callable[..., Any]) -> str:
    """A LoRA run on the base of the folder; its best model."""
    finetune = {"method": "lora", "read_from": "base.ckpt", "config": {"rank": 2}}
    train(options({"finetune": finetune, "num_epochs": 2}))
    return "run/best_model.ckpt"


@pytest.mark.slow
@pytest.mark.parity
def test_metatrain_evaluates_and_exports_it(command, train, here: Path) -> None:
    pytest.importorskip("metatrain")
    answer = command("export", tuned(train), "--format", "metatrain", "-o", "model.ckpt")
    assert answer.code == 0, answer.err
    assert "metatrain (checkpoint of PET, format 16)" in answer.out
    Path("eval.yaml").write_text(
        yaml.safe_dump(data_section("test.xyz", quantity="energy", forces=True))
    )
    mtt("export", "model.ckpt", "-o", "theirs.pt")
    mtt("eval", "theirs.pt", "eval.yaml", "-o", "theirs.xyz")
    (ours,) = pf.evaluate("run/best_model.ckpt", "test.xyz", device="cpu").predictions.values()
    theirs = ase.io.read("theirs.xyz", ":")
    assert len(theirs) == len(ours) == 4
    for atoms, expected in zip(theirs, ours, strict=True):
        # float32, and energies of thousands of eV.
        assert abs(atoms.get_potential_energy() - expected["energy"]) < 1e-3
        forces = -np.asarray(atoms.info["energy_positions_gradients"])
        np.testing.assert_allclose(forces, expected["energy/forces"], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parity
def test_metatrain_trains_it_further(command, here: Path) -> None:
    pytest.importorskip("metatrain")
    outcome = pf.export("base.ckpt", "model.ckpt")
    assert outcome.format == "metatrain"
    finetune = {"method": "full", "read_from": "model.ckpt"}
    mtt("train", mtt_options({"name": "pet", "training": {**TRAINING, "finetune": finetune}}),
        "-o", "finetuned.pt")  # fmt: skip
    hypers = load_checkpoint("base.ckpt").model.hypers.model_dump(exclude={"num_prompts"})
    again = mtt_options({"name": "pet", "model": hypers, "training": TRAINING})
    mtt("train", again, "-o", "restarted.pt", "--restart", "model.ckpt")
    llpr = {"model_checkpoint": "model.ckpt", "batch_size": 4}
    mtt("train", mtt_options({"name": "llpr", "training": llpr}), "-o", "uncertain.pt")
    for name in ("finetuned", "restarted", "uncertain"):
        assert load_checkpoint(f"{name}.ckpt").model.species == (1, 6, 8, 14), name


@pytest.mark.slow
@pytest.mark.parity
def test_an_uncertainty_goes_along(command, here: Path) -> None:
    """As a checkpoint of llpr, which metatrain exports, evaluates and fine-tunes from."""
    pytest.importorskip("metatrain")
    save_checkpoint("sure.ckpt", with_last_layer(random_potential(dtype=torch.float32)))
    answer = command("export", "sure.ckpt", "-o", "model.ckpt")
    assert answer.code == 0, answer.err
    assert "the file is a checkpoint of 'llpr'" in answer.err
    Path("eval.yaml").write_text(
        yaml.safe_dump(data_section("test.xyz", quantity="energy", forces=True))
    )
    mtt("export", "model.ckpt", "-o", "theirs.pt")
    mtt("eval", "theirs.pt", "eval.yaml", "-o", "theirs.xyz")
    assert len(ase.io.read("theirs.xyz", ":")) == 4
    engine = MetatomicCalculator("theirs.pt", device="cpu")
    request = dict.fromkeys(
        ("energy_uncertainty", "energy_ensemble"), ModelOutput(sample_kind="system")
    )
    atoms = ethanol()
    theirs = engine.run_model(atoms, request)
    calculator = pf.PETCalculator("sure.ckpt", device="cpu")
    ours = calculator.get_property("energy_uncertainty", atoms)
    assert theirs["energy_uncertainty"].block().values.item() == pytest.approx(ours, rel=1e-4)
    each = theirs["energy_ensemble"].block().values[0].numpy()
    expected = calculator.get_property("energy_ensemble", atoms)
    np.testing.assert_allclose(each - each.mean(), expected - expected.mean(), rtol=1e-3, atol=2e-3)
    finetune = {"method": "full", "read_from": "model.ckpt"}
    mtt("train", mtt_options({"name": "pet", "training": {**TRAINING, "finetune": finetune}}),
        "-o", "finetuned.pt")  # fmt: skip
    assert not load_checkpoint("finetuned.ckpt").model.uncertainties


def test_the_written_file_says_where_it_comes_from(command, here: Path) -> None:
    assert command("export", "base.ckpt", "--format", "metatrain").code == 0
    answer = command("info", "base_metatrain.ckpt")
    for text in ("metatrain, model format 16, base_metatrain", "└ base.ckpt"):
        assert text in answer.out, answer.out + answer.err
    assert command("eval", "base_metatrain.ckpt", "test.xyz").code == 0


def test_targets_get_the_names_that_metatrain_takes(command, here: Path) -> None:
    save_checkpoint("many.ckpt", property_potential())
    answer = command("export", "many.ckpt", "-o", "model.ckpt")
    assert answer.code == 0, answer.err
    assert "Target 'dipole' is called 'mtt::dipole' there" in answer.err
    known = load_checkpoint("model.ckpt").model.targets
    assert {"energy", "mtt::dipole", "non_conservative_force"} <= known.keys()
    answer = command("export", "many.ckpt", "-o", "one.ckpt", "--target", "gap")
    assert list(load_checkpoint("one.ckpt").model.targets) == ["mtt::gap"]


def test_an_adapter_is_merged(command, here: Path) -> None:
    adapted = trained_adapter(random_potential(), targets=["energy"])
    save_checkpoint("plain.ckpt", random_potential())
    save_adapter(adapted, here / "adapter", "plain.ckpt")
    answer = command("export", "plain.ckpt", "--adapter", "adapter", "-o", "model.ckpt")
    assert answer.code == 0, answer.err
    merged = load_checkpoint("model.ckpt").model
    assert not any("lora" in name for name, _ in merged.network.named_parameters())
    found, expected = (predict(model, [ethanol()]).energy for model in (merged, adapted))
    assert abs(float(found - expected)) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base.ckpt", "--format", "onnx"], "format: 'onnx' is not one of metatomic, metatrain."),
        (["base.ckpt", "--format", "metatrain", "-o", "a.pt"], "e.g., a.ckpt"),
        (["base.ckpt", "-o", "base.ckpt"], "'base.ckpt' is the checkpoint itself"),
        (["base.ckpt", "-o", "train.xyz/m.ckpt"], "-o: 'train.xyz/m.ckpt' cannot be written ("),
        (["base.ckpt", "-o", "m.ckpt", "--target", "energi"], "Did you mean 'energy'?"),
        (
            ["base.ckpt", "-o", "m.ckpt", "--adapter", "a0", "--adapter", "a1"],
            "metatrain's PET holds no committee, and 2 adapters were given",
        ),
        (["prompted.ckpt", "-o", "m.ckpt"], "3 prompt tokens in each layer"),
        (["divided.ckpt", "-o", "m.ckpt"], "'mtt::push' is divided by the volume, which metatrain"),
        (["twice.ckpt", "-o", "m.ckpt"], "would be called 'mtt::gap' in metatrain, as 'gap' is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, command, here: Path) -> None:
    model = random_potential()
    for seed in range(2):
        adapted = trained_adapter(load_checkpoint("base.ckpt").model, seed=seed)
        save_adapter(adapted, here / f"a{seed}", "base.ckpt")
    save_checkpoint("prompted.ckpt", trained_adapter(random_potential(), num_prompts=3))
    model.add_target(replace(PROPERTIES[-1], name="mtt::push"))
    save_checkpoint("divided.ckpt", model)
    twice = random_potential()
    for name in ("gap", "mtt::gap"):
        twice.add_target(replace(PROPERTIES[0], name=name))
    save_checkpoint("twice.ckpt", twice)
    before = sorted(path.name for path in here.iterdir())
    answer = command("export", *arguments)
    assert answer.code == 1
    assert message in answer.err
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_file_that_is_there_stays_when_writing_fails(
    command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("export", "base.ckpt", "-o", "model.ckpt").code == 0
    earlier = (here / "model.ckpt").read_bytes()

    def full(*ignored: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    answer = command("export", "base.ckpt", "-o", "model.ckpt")
    assert answer.code == 1
    assert "cannot be written (No space left on device)" in answer.err
    assert (here / "model.ckpt").read_bytes() == earlier


def test_a_file_that_says_something_else_is_not_kept(
    command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = to_metatrain._baselines_and_scales

    def doubled(model: Any, spec: Any, name: str, layout: Any) -> Any:
        model.scale.set(spec.name, 2.0 * model.scale.get(spec.name))
        return wrong(model, spec, name, layout)

    monkeypatch.setattr(to_metatrain, "_baselines_and_scales", doubled)
    answer = command("export", "base.ckpt", "-o", "model.ckpt")
    assert answer.code == 1
    assert "differs from the model's" in answer.err
    assert not (here / "model.ckpt").exists()


@pytest.mark.parity
@pytest.mark.parametrize("uncertain", [False, True], ids=["plain", "llpr"])
def test_upets_calculator_runs_it(command, here: Path, uncertain: bool) -> None:
    pytest.importorskip(
        "upet",
        reason="upet is not installed: pip install --no-deps upet==0.3.1 (all that its calculator "
        "needs is in the test extra; it also asks for warp, 400 MB, which it does not use)",
    )
    from upet.ase import UPETCalculator

    model = random_potential(dtype=torch.float32)
    save_checkpoint("tuned.ckpt", with_last_layer(model) if uncertain else model)
    answer = command("export", "tuned.ckpt", "-o", "model.ckpt")
    assert answer.code == 0, answer.err
    theirs = UPETCalculator(checkpoint_path="model.ckpt", device="cpu", uncertainty_threshold=None)
    ours = pf.PETCalculator("tuned.ckpt", device="cpu")
    for atoms in (ethanol(), crystal()):
        other = atoms.copy()
        atoms.calc, other.calc = ours, theirs
        energy = other.get_potential_energy()
        assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-6, abs=1e-4)
        np.testing.assert_allclose(other.get_forces(), atoms.get_forces(), atol=5e-4)
        if atoms.pbc.all():
            np.testing.assert_allclose(other.get_stress(), atoms.get_stress(), atol=2e-5)
        if uncertain:
            expected = ours.get_property("energy_uncertainty", atoms)
            assert theirs.get_energy_uncertainty(other) == pytest.approx(expected, rel=1e-3)
