"""Last-layer uncertainties (LLPR) in the commands: info, eval, md, train and export."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms

import pet_finetune as pf
from models import ethanol, random_potential, with_last_layer
from pet_finetune import PETCalculator
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.llpr import fresh
from pet_finetune.config.finetune import LastLayerOptions
from pet_finetune.config.load import load_options
from pet_finetune.data.splits import load_splits
from pet_finetune.errors import ConfigError, TrainingError
from pet_finetune.model.prediction import LastLayer
from pet_finetune.training.uncertainty import LastLayerUncertainty
from tiny_data import data_section, molecules, options, write_options

SHORT = ("--steps", 4, "--timestep", 0.1, "--every", 2, "--temperature", 50, "--seed", 1)


@pytest.fixture
def sure(here: Path) -> str:
    """A checkpoint with an uncertainty of three members."""
    save_checkpoint("sure.ckpt", with_last_layer(random_potential(dtype=torch.float32)))
    return "sure.ckpt"


def said(model: str, atoms: Atoms) -> float:
    return PETCalculator(model, device="cpu").get_property("energy_uncertainty", atoms)


def test_info_names_it(command, sure: str) -> None:
    assert "energy (last layer, 3 members)" in command("info", sure).out
    (facts,) = json.loads(command("info", sure, "--json").out)
    assert facts["uncertainties"] == {
        "energy": {"kind": "llpr", "factor": pytest.approx(1.7), "members": 3}
    }
    assert "uncertainty" not in command("info", "base.ckpt").out


def test_eval_shows_and_writes_it(command, sure: str) -> None:
    answer = command("eval", sure, "test.xyz", "-o", "predicted.xyz")
    assert answer.code == 0, answer.err
    assert "uncertainty of 'energy':" in answer.err
    assert "miscalibration area" in answer.err
    frames = ase.io.read("predicted.xyz", ":")
    for atoms in frames:
        expected = said(sure, atoms)
        assert atoms.info["energy_uncertainty"] == pytest.approx(expected, rel=1e-4)
    assert "uncertainty" not in command("eval", "base.ckpt", "test.xyz").err
    result = pf.evaluate(sure, "test.xyz", device="cpu")
    (rows,) = result.predictions.values()
    found = [float(row["energy_uncertainty"]) for row in rows]
    np.testing.assert_allclose(found, [a.info["energy_uncertainty"] for a in frames], rtol=1e-6)
    (by_target,) = result.uncertainties.values()
    sizes = [len(atoms) for atoms in frames]
    np.testing.assert_allclose(by_target["energy"].spreads, np.divide(found, sizes), rtol=1e-6)


def test_a_simulation_logs_it(command, sure: str) -> None:
    ase.io.write("molecule.xyz", ethanol())
    answer = command("md", sure, "molecule.xyz", "-o", "run", *SHORT)
    assert answer.code == 0, answer.err
    header = Path("run/md.csv").read_text().splitlines()[0]
    assert "energy_uncertainty_eV" in header
    assert "max_forces" not in header
    frames = ase.io.read("run/trajectory.xyz", ":")
    assert frames[1].info["energy_uncertainty"] == pytest.approx(said(sure, frames[1]), rel=1e-4)
    stopped = command("md", sure, "molecule.xyz", "-o", "s", *SHORT, "--stop-uncertainty", 1e-3)
    assert "the force on an atom is uncertain by" in stopped.err
    save_checkpoint("alone.ckpt", with_last_layer(random_potential(), members=0))
    refused = command("md", "alone.ckpt", "molecule.xyz", *SHORT, "--stop-uncertainty", 1e-3)
    assert refused.code == 1
    assert "--stop-uncertainty: one model has no uncertainty." in refused.err
    assert load_checkpoint("alone.ckpt").model.uncertainties


def tuned(command, *arguments: str, llpr: object = True, **changes: object):
    """Train with options that ask for an uncertainty."""
    finetune = {"llpr": llpr, "method": "lora", "config": {"rank": 2}}
    content = options({"finetune": finetune, **changes.pop("training", {})}, **changes)
    write_options(Path("llpr.yaml"), content)
    return command("train", "llpr.yaml", *arguments)


def layer_of(path: str) -> LastLayer:
    (layer,) = fresh(load_checkpoint(path).model).values()
    return layer


def test_training_makes_one(command, sure: str) -> None:
    answer = tuned(command, "-c", sure, "-o", "run")
    assert answer.code == 0, answer.err
    assert "(LLPR) of 'sure' does not hold for new weights" in answer.err
    assert "calibration of the uncertainty, on the validation set" in answer.out
    layer = layer_of("run/best_model.ckpt")
    assert layer.num_members == 16
    results = json.loads(Path("run/results.json").read_text())
    curve = results["uncertainty"]["energy"]
    assert curve["factor"] == pytest.approx(float(layer.multiplier))
    kept = load_checkpoint("run/best_model.ckpt").provenance
    assert kept["epoch"] >= 1
    judged = command("eval", "llpr.yaml", "-c", "run/best_model.ckpt").err
    assert judged.count("uncertainty of") == 2
    # On the validation set, of two structures, the factor is the mean of the ratios.
    found = pf.evaluate("run/best_model.ckpt", "train.xyz", device="cpu")
    (rows,) = found.predictions.values()
    frames = ase.io.read("train.xyz", ":")
    splits = load_splits(Path("run/splits.json"), load_options("run/options.yaml").options)
    ratios = [
        abs(rows[i]["energy"] - frames[i].get_potential_energy()) / rows[i]["energy_uncertainty"]
        for i in (structure.index for structure in splits.validation)
    ]
    assert np.mean(ratios) * np.sqrt(np.pi / 2) == pytest.approx(1.0, rel=1e-3)
    # An adapter on top of its base is another model, which has none.
    adapted = command("eval", sure, "test.xyz", "--adapter", "run/adapter")
    assert adapted.err.count("not offered") == 1


def test_settings_and_a_run_without_a_last_evaluation(command, here: Path) -> None:
    llpr = {"num_ensemble_members": 0, "calibration_method": "crps", "regularizer": 0.1}
    answer = tuned(command, "-c", "base.ckpt", "-o", "run", llpr=llpr, final_eval=False)
    assert answer.code == 0, answer.err
    layer = layer_of("run/best_model.ckpt")
    assert layer.num_members == 0
    difference = layer.cholesky @ layer.cholesky.T - layer.covariance
    torch.testing.assert_close(difference, 0.1 * torch.eye(layer.width).double())


def test_a_run_that_goes_on_makes_the_same(command, stop, here: Path) -> None:
    stop(0)
    assert tuned(command, "-c", "base.ckpt", "-o", "whole").code == 0
    stop(4)
    assert tuned(command, "-c", "base.ckpt", "-o", "run").code == 130
    assert not load_checkpoint("run/best_model.ckpt").model.uncertainties
    stop(0)
    answer = command("train", "run/options.yaml", "--restart", "run")
    assert answer.code == 0, answer.err
    one, other = (layer_of(f"{folder}/best_model.ckpt") for folder in ("whole", "run"))
    torch.testing.assert_close(one.covariance, other.covariance)
    torch.testing.assert_close(one.members, other.members)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"llpr": {"regularizer": 0.0}}, "finetune.llpr.regularizer"),
        ({"llpr": {"calibration_method": "crsp"}}, "Did you mean 'crps'?"),
        ({"llpr": "yes please"}, "finetune.llpr"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str, command, here: Path) -> None:
    answer = tuned(command, "-c", "base.ckpt", "-o", "run", **arguments)
    assert answer.code == 1
    assert message in answer.err, answer.err
    assert not Path("run/best_model.ckpt").exists()


def test_a_committee_has_its_own(command, here: Path) -> None:
    finetune = {"llpr": True, "ensemble": 2, "method": "lora"}
    write_options(Path("both.yaml"), options({"finetune": finetune}))
    answer = command("train", "both.yaml", "-c", "base.ckpt")
    assert answer.code == 1
    assert "a committee has an uncertainty already" in answer.err


def test_forces_alone_do_not_calibrate(command, here: Path) -> None:
    frames = molecules(4)
    for atoms in frames:
        del atoms.calc.results["energy"]
    ase.io.write("forces.xyz", frames)
    answer = tuned(
        command, "-c", "base.ckpt", "-o", "run", validation_set=data_section("forces.xyz")
    )
    assert answer.code == 1
    assert "which has no values of energy. Forces alone do not do." in answer.err


def test_without_a_validation_set_there_is_nothing_to_calibrate_on() -> None:
    """All its frames may have been left out when the files were read."""
    feature = LastLayerUncertainty(LastLayerOptions())
    plan = SimpleNamespace(
        options=SimpleNamespace(target_specs=lambda: {"energy": None}),
        splits=SimpleNamespace(validation=[]),
    )
    with pytest.raises(TrainingError, match="calibrated on the validation set, and there is none"):
        feature.check(plan)  # type: ignore[arg-type]


def test_from_python(here: Path) -> None:
    frames = molecules(10)
    result = pf.finetune("base.ckpt", frames, 0.3, llpr=True, epochs=1, device="cpu", seed=1)
    calculator = result.calculator(device="cpu")
    assert calculator.get_property("forces_uncertainty", frames[0]).shape == (len(frames[0]),)
    with pytest.raises(ConfigError, match="llpr"):
        pf.finetune("base.ckpt", frames, 0.3, llpr={"members": 3}, epochs=1, device="cpu")


def test_a_model_gets_one_as_it_is(here: Path) -> None:
    """From files or from structures, saved with the model's own provenance."""
    model = pf.add_uncertainty(
        "base.ckpt", "train.xyz", "test.xyz", output="sure.ckpt", device="cpu"
    )
    plain = PETCalculator("base.ckpt", device="cpu")
    atoms = molecules(1)[0]
    for made in (model, "sure.ckpt"):
        calculator = PETCalculator(made, device="cpu")
        assert calculator.get_property("energy_uncertainty", atoms) > 0
        energies = [one.get_potential_energy(atoms) for one in (plain, calculator)]
        assert energies[0] == pytest.approx(energies[1], rel=1e-6)
    opened = load_checkpoint("sure.ckpt")
    assert opened.provenance == load_checkpoint("base.ckpt").provenance
    same = pf.add_uncertainty(
        pf.load("base.ckpt"), ase.io.read("train.xyz", ":"), "test.xyz", num_ensemble_members=0
    )
    (one,), (other,) = fresh(opened.model).values(), fresh(same.potential).values()
    torch.testing.assert_close(one.multiplier, other.multiplier, rtol=1e-5, atol=0)
    assert (one.num_members, other.num_members) == (16, 0)


def test_bad_input_to_a_model_as_it_is(here: Path) -> None:
    with pytest.raises(ConfigError, match="add_uncertainty: regulariser: unknown option"):
        pf.add_uncertainty("base.ckpt", "train.xyz", "test.xyz", regulariser=1.0)
    frames = molecules(2)
    for atoms in frames:
        del atoms.calc.results["energy"]
    with pytest.raises(TrainingError, match="no values of 'energy' to calibrate with"):
        pf.add_uncertainty("base.ckpt", "train.xyz", frames, output="sure.ckpt", device="cpu")
    assert not Path("sure.ckpt").exists()
