"""``pet-finetune export``: what it writes and prints, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from laws import predict

from models import (
    ethanol,
    property_potential,
    random_potential,
    trained_adapter,
    with_last_layer,
)
from pet_finetune import load_checkpoint
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.cli import main
from pet_finetune.keys import TargetSpec


def test_help_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "--adapter" in capsys.readouterr().out


def test_a_checkpoint_with_an_adapter(command, here: Path) -> None:
    engines = pytest.importorskip("metatomic_ase")
    base = load_checkpoint("base.ckpt").model
    base.add_target(random_potential(targets=("energy/pbe",)).target("energy/pbe"))
    save_checkpoint("two.ckpt", base)
    adapted = trained_adapter(copy.deepcopy(base), targets=["energy/pbe"])
    save_adapter(adapted, here / "adapter", "two.ckpt")
    answer = command("export", "two.ckpt", "--adapter", "adapter", "--dtype", "float64")
    assert answer.code == 0, answer.err
    for text in ("two.pt", "energy/pbe, energy (target 'energy/pbe')", "10.5 A", "float64"):
        assert text in answer.out
    assert "Left out, because the adapter was not trained for them: energy" in answer.err
    atoms = ethanol()
    with torch.jit.optimized_execution(False):
        atoms.calc = engines.MetatomicCalculator("two.pt", device="cpu")
        expected = predict(adapted.double(), [atoms], "energy/pbe").energy
        assert atoms.get_potential_energy() == pytest.approx(float(expected), rel=1e-9)


def test_an_adapter_of_several_targets(command, here: Path) -> None:
    base = property_potential()
    base.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    save_checkpoint("all.ckpt", base)
    tuned = trained_adapter(copy.deepcopy(base), targets=["energy/pbe", "energy", "charges"])
    save_adapter(tuned, here / "adapter", "all.ckpt")
    answer = command("export", "all.ckpt", "--adapter", "adapter", "-o", "out.pt")
    assert answer.code == 0, answer.err
    assert "energy, mtt::charges, energy/pbe" in answer.out
    assert "Left out, because the adapter was not trained for them: gap, dos" in answer.err
    answer = command(
        *("export", "all.ckpt", "--adapter", "adapter", "-o", "out.ckpt", "--format", "metatrain")
    )
    assert answer.code == 0, answer.err
    assert set(load_checkpoint("out.ckpt").model.targets) == {
        "energy",
        "mtt::charges",
        "energy/pbe",
    }


def test_several_energies_and_none_of_them_plain(command, here: Path) -> None:
    model = random_potential(targets=("energy/pbe", "energy/scan"))
    save_checkpoint("model.ckpt", model)
    answer = command("export", "model.ckpt", "-o", "out.pt")
    assert "energy/pbe, energy/scan" in answer.out
    assert "tell the engine which variant to use, or choose one with --target" in answer.err
    answer = command("export", "model.ckpt", "-o", "out.pt", "--target", "energy/scan")
    assert "energy (target 'energy/scan')" in answer.out


def test_a_committee(command, here: Path) -> None:
    for seed in range(2):
        adapted = trained_adapter(load_checkpoint("base.ckpt").model, seed=seed)
        save_adapter(adapted, here / f"a{seed}", "base.ckpt")
    answer = command("export", "base.ckpt", "--adapter", "a0", "--adapter", "a1")
    assert answer.code == 0, answer.err
    assert "energy_uncertainty (target 'energy')" in answer.out
    assert "float64 outside, float32 in the network" in answer.out
    answer = command("export", "base.ckpt", "--adapter", "a0", "--adapter", "nowhere")
    assert answer.code == 1
    assert "There is no adapter in 'nowhere'" in answer.err


def test_an_uncertainty_that_engines_are_not_told_is_named(command, here: Path) -> None:
    save_checkpoint("sure.ckpt", with_last_layer(property_potential(), "charges"))
    answer = command("export", "sure.ckpt", "-o", "out.pt")
    assert answer.code == 0, answer.err
    assert "The last-layer uncertainty (LLPR) of 'charges' is not in the file" in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.ckpt"], "nowhere.ckpt: no such checkpoint file."),
        (["train.xyz"], "train.xyz: not a checkpoint:"),
        (["base.ckpt", "--adapter", "nowhere"], "There is no adapter in 'nowhere'"),
        (["base.ckpt", "--adapter", "other"], "belongs to the base 'other.ckpt'"),
        (["base.ckpt", "--target", "energi"], "Did you mean 'energy'?"),
        (["base.ckpt", "--dtype", "float16"], "dtype: 'float16' is not one of float32, float64."),
        (["base.ckpt", "-o", "base.ckpt"], "'base.ckpt' is the checkpoint itself"),
        (["base.ckpt", "-o", "test.xyz"], "'test.xyz' is there and is no exported model"),
        (["other.ckpt", "-o", "base.ckpt"], "'base.ckpt' is there and is no exported model"),
        (["base.ckpt", "-o", "."], "'.' is a folder. Name the file, e.g. model.pt."),
        (["base.ckpt", "-o", "train.xyz/model.pt"], "-o: 'train.xyz/model.pt' cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, command, here: Path) -> None:
    other = random_potential(seed=7, dtype=torch.float32)
    save_checkpoint("other.ckpt", other)
    save_adapter(trained_adapter(other), here / "other", "other.ckpt")
    before = sorted(path.name for path in here.iterdir())
    answer = command("export", *arguments)
    assert answer.code == 1
    assert message in answer.err
    assert sorted(path.name for path in here.iterdir()) == before
