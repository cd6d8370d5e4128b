"""``pet-finetune eval``: labels of any name, options files of ``mtt eval``, predictions."""

from __future__ import annotations

import os
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
import yaml
from ase.units import Bohr, Hartree

from models import random_potential
from pet_finetune import PETCalculator
from pet_finetune.checkpoint.native import save_checkpoint
from tiny_data import crystals, molecules, write_frames


def renamed(frames, energy=1.0, length=1.0):
    """The frames with labels under other names, and in other units."""
    results = []
    for atoms in frames:
        other = atoms.copy()
        other.set_cell(atoms.cell.array * length)
        other.positions = atoms.positions * length
        other.info["REF_energy"] = atoms.get_potential_energy() * energy
        other.arrays["REF_forces"] = atoms.get_forces() * energy / length
        if atoms.pbc.all():
            stress = atoms.get_stress(voigt=False)
            other.info["REF_stress"] = stress * energy / length**3
        results.append(other)
    return results


def figures(answer):
    """The numbers of the printed table."""
    rows = [line.split("│") for line in answer.out.splitlines() if "│" in line]
    return {row[1].strip(): float(row[-2]) for row in rows if row[-2].strip()[0].isdigit()}


def test_labels_of_other_names_and_units(here, command):
    write_frames(Path("si.xyz"), crystals(3))
    write_frames(Path("ref.xyz"), renamed(crystals(3), 1 / Hartree, 1 / Bohr))
    expected = figures(command("eval", "base.ckpt", "si.xyz"))
    answer = command(
        "eval", "base.ckpt", "ref.xyz", "--energy-key", "REF_energy", "--forces-key", "REF_forces",
        "--stress-key", "REF_stress", "--energy-unit", "Hartree", "--length-unit", "Bohr",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert len(expected) == 6
    assert figures(answer) == pytest.approx(expected, rel=1e-3, abs=0.02)


def test_the_error_of_a_missing_label_names_what_the_command_takes(here, command):
    write_frames(Path("ref.xyz"), renamed(molecules(2)))
    answer = command("eval", "base.ckpt", "ref.xyz")
    assert answer.code == 1
    assert "Did you mean 'REF_energy'?" in answer.err
    assert "--energy-key" in answer.err
    assert command("eval", "base.ckpt", "ref.xyz", "--key", "REF_energy").code == 0


def test_forces_that_are_named_must_be_there(here, command):
    answer = command("eval", "base.ckpt", "test.xyz", "--forces-key", "DFT_forces")
    assert answer.code == 1
    assert "should be under 'DFT_forces'" in answer.err


@pytest.mark.parametrize("name", ["pred.xyz", "pred.extxyz", "pred.db"])
def test_predictions_are_written(here, command, name):
    frames = [*molecules(2), *crystals(1)]
    frames[0].info["name"] = "methanol"
    write_frames(Path("mixed.xyz"), frames)
    answer = command("eval", "base.ckpt", "mixed.xyz", "-o", name, "-b", "2")
    assert answer.code == 0, answer.err
    assert f"predictions of 3 structures: {name}" in answer.err
    assert "forces MAE" in answer.out
    written = ase.io.read(name, ":")
    calculator = PETCalculator("base.ckpt")
    for before, after in zip(frames, written, strict=True):
        assert after.get_chemical_symbols() == before.get_chemical_symbols()
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-7)
        assert after.pbc.tolist() == before.pbc.tolist()
        before.calc = calculator
        assert after.get_potential_energy() == pytest.approx(before.get_potential_energy())
        np.testing.assert_allclose(after.get_forces(), before.get_forces(), atol=1e-5)
        assert ("stress" in after.calc.results) == bool(before.pbc.all())
    np.testing.assert_allclose(written[2].get_stress(), frames[2].get_stress(), atol=1e-6)
    if name.endswith("xyz"):
        assert written[0].info["name"] == "methanol"
    else:
        assert ase.db.connect(name).get(1).data["name"] == "methanol"
    assert not list(Path().glob("*.partial"))


def test_predictions_as_metatrains_arrays(here, command):
    write_frames(Path("si.xyz"), crystals(2))
    assert command("eval", "base.ckpt", "si.xyz", "-o", "arrays/").code == 0
    atoms = crystals(2)[1]
    atoms.calc = PETCalculator("base.ckpt")
    assert np.load("arrays/na.npy").tolist() == [0, 2, 4]
    forces = np.fromfile("arrays/energy_forces.bin", np.float32).reshape(4, 3)
    np.testing.assert_allclose(forces[2:], atoms.get_forces(), atol=1e-5)
    stress = np.fromfile("arrays/energy_stress.bin", np.float32).reshape(2, 3, 3)
    np.testing.assert_allclose(stress[1], atoms.get_stress(voigt=False), atol=1e-6)
    dataset = pytest.importorskip("metatrain.utils.data.dataset")
    target = {"key": "energy", "quantity": "energy", "unit": "eV", "sample_kind": "system",
              "num_subtargets": 1, "type": "scalar", "description": "",
              "forces": {"key": "energy_forces"}, "stress": {"key": "energy_stress"},
              "virial": False}  # fmt: skip
    read = dataset.MemmapDataset("arrays/", {"energy": target})
    block = read[1].energy.block()
    assert block.values.item() == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
    gradient = block.gradient("positions").values.numpy()[..., 0]
    np.testing.assert_allclose(-gradient, atoms.get_forces(), atol=1e-5)


def test_labels_in_other_units_are_predicted_in_ev_and_angstrom(here, command):
    write_frames(Path("ref.xyz"), renamed(crystals(1), 1 / Hartree, 1 / Bohr))
    arguments = ("--key", "REF_energy", "--unit", "Hartree", "--length-unit", "Bohr")
    assert command("eval", "base.ckpt", "ref.xyz", *arguments, "-o", "pred.xyz").code == 0
    written, (before,) = ase.io.read("pred.xyz"), crystals(1)
    np.testing.assert_allclose(written.positions, before.positions, atol=1e-6)
    np.testing.assert_allclose(written.cell.array, before.cell.array, atol=1e-6)
    before.calc = PETCalculator("base.ckpt")
    assert written.get_potential_energy() == pytest.approx(before.get_potential_energy(), rel=1e-6)


def test_forces_alone_are_compared_also_where_predictions_are_written(here, command):
    frames = molecules(2)
    for atoms in frames:
        del atoms.calc.results["energy"]
    write_frames(Path("forces.xyz"), frames)
    answer = command("eval", "base.ckpt", "forces.xyz", "-o", "pred.xyz")
    assert answer.code == 0, answer.err
    assert set(figures(answer)) == {"forces MAE", "forces RMSE"}


def test_structures_without_labels_are_predicted(here, command):
    bare = [atoms.copy() for atoms in molecules(2)]
    for atoms in bare:
        atoms.calc = None
    write_frames(Path("bare.xyz"), bare)
    assert command("eval", "base.ckpt", "bare.xyz").code == 1
    answer = command("eval", "base.ckpt", "bare.xyz", "-o", "pred.xyz")
    assert answer.code == 0, answer.err
    assert "nothing is compared, only predicted" in answer.err
    assert "MAE" not in answer.out
    assert np.isfinite(ase.io.read("pred.xyz").get_forces()).all()


def test_several_files_have_several_predictions(here, command):
    assert command("eval", "base.ckpt", "test.xyz", "train.xyz", "-o", "p.xyz").code == 0
    assert [len(ase.io.read(f"p_{index}.xyz", ":")) for index in (0, 1)] == [4, 10]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pred.cif", "end in .xyz, .extxyz, .db"),
        ("pred", "pred.xyz, pred.db, or pred/"),
        ("test.xyz", "'test.xyz' exists and is not overwritten"),
        ("nowhere/pred.xyz", "there is no folder 'nowhere'"),
        ("pred.xyz/", "a folder without an ending"),
    ],
)
def test_places_that_predictions_cannot_be_written_to(here, command, name, message):
    before = Path("test.xyz").read_bytes()
    answer = command("eval", "base.ckpt", "test.xyz", "-o", name)
    assert answer.code == 1
    assert message in answer.err
    assert Path("test.xyz").read_bytes() == before
    assert set(os.listdir()) == {"train.xyz", "test.xyz", "base.ckpt", "options.yaml"}


def test_targets_of_other_names_are_written_under_them(here, command):
    model = random_potential(targets=("energy/pbe", "mtt::U0"))
    save_checkpoint("two.ckpt", model)
    targets = {"energy/pbe": {"key": "energy", "unit": "eV"}, "mtt::U0": {"key": "energy"}}
    Path("eval.yaml").write_text(yaml.safe_dump({"systems": "test.xyz", "targets": targets}))
    answer = command("eval", "two.ckpt", "eval.yaml", "-o", "pred.xyz")
    assert answer.code == 0, answer.err
    atoms = ase.io.read("pred.xyz")
    assert np.isfinite(atoms.get_potential_energy())
    assert np.isfinite(atoms.info["U0"])
    assert atoms.arrays["U0_forces"].shape == (len(atoms), 3)


def test_an_options_file_of_mtt_eval(here, command):
    Path("eval.yaml").write_text(
        "systems: test.xyz\ntargets:\n  energy: {key: energy, unit: eV, forces: {key: forces}}\n"
    )
    expected = figures(command("eval", "base.ckpt", "test.xyz"))
    for order in (("eval.yaml", "-c", "base.ckpt"), ("base.ckpt", "eval.yaml")):
        answer = command("eval", *order)
        assert answer.code == 0, answer.err
        assert "test.xyz (4 structures)" in answer.out
        assert figures(answer) == expected
        assert "length_unit not given, taken as angstrom: the set." in answer.err
    answer = command("eval", "eval.yaml", "-c", "base.ckpt", "-r", "indices=[1, 2]")
    assert "test.xyz (2 structures)" in answer.out
    other = "targets.dipole={quantity: dipole, key: energy}"
    answer = command("eval", "eval.yaml", "-c", "base.ckpt", "-r", other)
    assert figures(answer) == expected
    assert "does not predict it: dipole (it predicts energy)" in answer.err
    other = "targets.energy={quantity: charge, unit: e, forces: off}"
    answer = command("eval", "eval.yaml", "-c", "base.ckpt", "-r", other)
    assert "targets.energy: it is in e here, but in eV in the model." in answer.err


def test_several_sets_of_an_options_file_of_mtt_eval(here, command):
    one = {
        "systems": {"read_from": "test.xyz", "length_unit": "angstrom"},
        "targets": {"energy": {}},
    }
    sets = [one, {**one, "systems": "train.xyz"}, one]
    Path("eval.yaml").write_text(yaml.safe_dump(sets))
    answer = command("eval", "base.ckpt", "eval.yaml", "-o", "p.xyz")
    assert answer.code == 0, answer.err
    for title in ("test.xyz (4 ", "train.xyz (10 ", "test.xyz (2) (4 "):
        assert title in answer.out
    assert [len(ase.io.read(f"p_{index}.xyz", ":")) for index in range(3)] == [4, 10, 4]


def test_a_set_without_targets_is_predicted_only(here, command):
    Path("eval.yaml").write_text("systems: {read_from: test.xyz, length_unit: angstrom}\n")
    answer = command("eval", "base.ckpt", "eval.yaml")
    assert answer.code == 1
    assert "write predictions with -o" in answer.err
    answer = command("eval", "base.ckpt", "eval.yaml", "-o", "pred.xyz")
    assert answer.code == 0, answer.err
    assert "MAE" not in answer.out
    assert "unit not given" not in answer.err
    assert len(ase.io.read("pred.xyz", ":")) == 4


def test_what_is_wrong_in_it_stands_at_its_place(here, command):
    Path("eval.yaml").write_text(
        "systems: {read_from: test.xyz, length_unit: nanometre}\n"
        "targets: {energy: {unit: kcal, kee: E}}\n"
    )
    answer = command("eval", "base.ckpt", "eval.yaml")
    assert answer.code == 1
    assert "eval.yaml: 3 problems" in answer.err
    for text in ("\n  systems.length_unit:", "\n  targets.energy.kee:", "\n  targets.energy.unit:"):
        assert text in answer.err
    assert "training_set" not in answer.err


def test_names_of_labels_have_no_place_beside_options(here, command):
    answer = command("eval", "options.yaml", "-c", "base.ckpt", "--energy-key", "E")
    assert answer.code == 1
    assert "--energy-key says how files of structures are read, but options.yaml" in answer.err
