"""Frames of isolated atoms are recognised; frames without an energy train on what they have."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from pet_finetune.config.load import parse_options
from pet_finetune.data.dataset_files import isolated_frames
from pet_finetune.data.readers import read_structures
from pet_finetune.data.splits import make_splits
from pet_finetune.errors import DataError


def alone(symbol="O", config="", cell=None, pbc=False):
    atoms = Atoms(symbol, cell=cell, pbc=pbc)
    if config:
        atoms.info["config_type"] = config
    return atoms


@pytest.mark.parametrize(
    ("atom", "found"),
    [
        (alone(), True),
        (alone(config="IsolatedAtom", cell=[4, 4, 4], pbc=True), True),
        (alone(config="isolated_atom", cell=[4, 4, 4], pbc=True), True),
        (alone(cell=[12, 12, 12], pbc=True), True),
        (alone(cell=[12, 12, 4], pbc=(True, True, False)), True),
        (alone(cell=[12, 12, 4], pbc=True), False),  # a chain
        (bulk("Cu"), False),
        (molecule("H2"), False),
    ],
)
def test_an_atom_without_neighbours_among_molecules_is_isolated(atom, found):
    assert isolated_frames([molecule("H2O"), atom]) == ([1] if found else [])


def test_where_there_is_nothing_else_atoms_are_the_set():
    assert isolated_frames([alone(), alone("H", "IsolatedAtom")]) == []


def labelled(atoms, energy=None, forces=True, stress=False):
    results = {}
    if energy is not None:
        results["energy"] = energy
    if forces:
        results["forces"] = np.full((len(atoms), 3), 0.5)
    if stress:
        results["stress"] = np.arange(6.0)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def read(path, systems=None, **target):
    section = {
        "systems": {"read_from": str(path), **(systems or {})},
        "targets": {"energy": {"quantity": "energy", **target}},
    }
    options = parse_options({"training_set": section}, require_start=False).options
    return read_structures(options.training_set[0], offer_baselines=True)


@pytest.fixture
def atoms_and_water(tmp_path):
    frames = [labelled(alone("H"), -13.6, forces=False), labelled(alone(), -2041.0, forces=False)]
    write(tmp_path / "set.xyz", [*frames, labelled(molecule("H2O"), -2080.0)])
    return tmp_path / "set.xyz"


def test_isolated_atoms_are_left_out_and_their_energies_offered(atoms_and_water, caplog):
    with caplog.at_level(logging.INFO, "pet_finetune"):
        assert [s.index for s in read(atoms_and_water)] == [2]
    (line,) = [r.getMessage() for r in caplog.records if "isolated" in r.getMessage()]
    assert "2 of 3 frames are isolated atoms (frames 0, 1)" in line
    assert "atomic_baseline: {'energy': {1: -13.6, 8: -2041.0}}" in line


def test_the_energy_of_an_atom_s_ground_state_is_offered(tmp_path, caplog):
    frames = [labelled(alone(), energy, forces=False) for energy in (-2041.0, -2039.0)]
    write(tmp_path / "set.xyz", [*frames, labelled(molecule("H2O"), -2080.0)])
    with caplog.at_level(logging.INFO, "pet_finetune"):
        read(tmp_path / "set.xyz")
    assert "{8: -2041.0}" in caplog.text


def test_energies_are_offered_in_ev(atoms_and_water, caplog):
    with caplog.at_level(logging.INFO, "pet_finetune"):
        read(atoms_and_water, unit="kcal/mol")
    assert "1: -0.5897" in caplog.text  # -13.6 kcal/mol


def test_they_train_where_that_is_asked(atoms_and_water):
    structures = read(atoms_and_water, {"isolated_atoms": "train"})
    assert [s.index for s in structures] == [0, 1, 2]


def test_a_frame_with_forces_alone_has_these(tmp_path, caplog):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O"), -5.0), labelled(molecule("H2O"))])
    with caplog.at_level(logging.INFO, "pet_finetune"):
        with_energy, without = read(tmp_path / "set.xyz")
    assert set(with_energy.labels) == {"energy", "energy/forces"}
    assert set(without.labels) == {"energy/forces"}
    assert torch.equal(without.labels["energy/forces"], torch.full((3, 3), 0.5).double())
    assert "1 of 2 frames have no energy ('energy' is absent or NaN)" in caplog.text
    assert "offset" not in caplog.text


def test_a_whole_set_without_energies_says_what_that_means(tmp_path, caplog):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O")) for _ in range(3)])
    with caplog.at_level(logging.INFO, "pet_finetune"):
        structures = read(tmp_path / "set.xyz")
    assert [set(s.labels) for s in structures] == [{"energy/forces"}] * 3
    assert "all of 3 frames have no energy" in caplog.text
    assert "their offset stays that of the foundation" in caplog.text


def test_a_stress_alone_is_enough(tmp_path):
    frames = [labelled(bulk("Cu", cubic=True), forces=False, stress=True) for _ in range(2)]
    write(tmp_path / "set.xyz", frames)
    assert [set(s.labels) for s in read(tmp_path / "set.xyz")] == [{"energy/stress"}] * 2


def test_a_frame_without_any_label_is_refused(tmp_path):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O")), molecule("H2O")])
    with pytest.raises(DataError, match="frame 1 has no such value"):
        read(tmp_path / "set.xyz")


def test_forces_that_are_switched_off_are_no_label(tmp_path):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O"))])
    with pytest.raises(DataError, match="frame 0 has no such value"):
        read(tmp_path / "set.xyz", forces=False)


def test_an_energy_under_another_name_is_not_passed_over(tmp_path):
    frames = [labelled(molecule("H2O")) for _ in range(2)]
    for atoms in frames:
        atoms.info["total_energy"] = -5.0
    write(tmp_path / "set.xyz", frames)
    with pytest.raises(DataError, match="Did you mean 'total_energy'"):
        read(tmp_path / "set.xyz")


def test_an_energy_that_is_nan_is_absent_where_there_are_forces(tmp_path, caplog):
    frames = [labelled(molecule("H2O"), np.nan), labelled(molecule("H2O"), -5.0)]
    write(tmp_path / "set.xyz", frames)
    with caplog.at_level(logging.INFO, "pet_finetune"):
        structures = read(tmp_path / "set.xyz")
    assert [set(s.labels) for s in structures] == [{"energy/forces"}, {"energy", "energy/forces"}]
    assert "1 of 2 frames have no energy ('energy' is absent or NaN)" in caplog.text


@pytest.mark.parametrize(("energy", "forces"), [(np.nan, False), (np.inf, True)])
def test_other_energies_that_are_no_numbers_are_refused(tmp_path, energy, forces):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O"), energy, forces=forces)])
    with pytest.raises(DataError, match="NaN or infinite in frame 0"):
        read(tmp_path / "set.xyz")


def test_a_whole_set_of_nan_under_a_name_of_its_own_trains(tmp_path):
    frames = [labelled(molecule("H2O")) for _ in range(2)]
    for atoms in frames:
        atoms.info["U0"] = np.nan
    write(tmp_path / "set.xyz", frames)
    assert [set(s.labels) for s in read(tmp_path / "set.xyz", key="U0")] == [{"energy/forces"}] * 2


def test_a_name_that_no_frame_has_is_refused_with_the_way_to_forces_alone(tmp_path):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O"))])
    with pytest.raises(DataError, match="To train on forces alone, write `key: energy`"):
        read(tmp_path / "set.xyz", key="U0")


def sets(*files, systems=None, start=None, forces="auto", **more):
    def section(file):
        targets = {"energy": {"quantity": "energy", "forces": {"mode": forces}}}
        return {"systems": {"read_from": str(file), **(systems or {})}, "targets": targets}

    content = {"training_set": [section(file) for file in files], **more}
    options = parse_options(content, checkpoint=start, require_start=False).options
    return make_splits(options, 0)


@pytest.fixture
def two_files(tmp_path):
    write(tmp_path / "atoms.xyz", [labelled(alone(z), -1.0, forces=False) for z in "HO"])
    write(tmp_path / "water.xyz", [labelled(molecule("H2O"), -5.0) for _ in range(4)])
    return tmp_path / "atoms.xyz", tmp_path / "water.xyz"


@pytest.mark.parametrize("turn", [1, -1])
def test_a_file_of_isolated_atoms_beside_one_of_molecules_is_left_out(two_files, turn, caplog):
    with caplog.at_level(logging.INFO, "pet_finetune"):
        splits = sets(*two_files[::turn], validation_set=0.25)
    assert [len(s.numbers) for s in splits.train] == [3] * 3
    assert [len(s.numbers) for s in splits.validation] == [3]
    assert "all of 2 frames are isolated atoms" in caplog.text
    assert "atomic_baseline: {'energy': {1: -1.0, 8: -1.0}}" in caplog.text


@pytest.mark.parametrize("start", [None, "base.ckpt"])
def test_no_forces_are_asked_of_isolated_atoms_that_are_left_out(two_files, start, caplog):
    with caplog.at_level(logging.INFO, "pet_finetune"):
        splits = sets(*two_files, start=start, forces="on", validation_set=0.25)
    assert [len(s.numbers) for s in splits.train] == [3] * 3
    assert ("atomic_baseline" in caplog.text) == (start is None)
    write(two_files[0], [alone(z) for z in "HO"])  # no energies either: nothing to offer
    assert len(sets(*two_files, start=start, forces="on", validation_set=0.25).train) == 3


def test_a_run_that_starts_from_a_model_is_offered_no_baselines(atoms_and_water, two_files, caplog):
    write(atoms_and_water, [labelled(molecule("H2O"), -2080.0)] * 2, append=True)
    with caplog.at_level(logging.INFO, "pet_finetune"):
        sets(atoms_and_water, *two_files, start="base.ckpt", validation_set=0.5)
    assert "2 of 5 frames are isolated atoms" in caplog.text
    assert "all of 2 frames are isolated atoms" in caplog.text
    assert "atomic_baseline" not in caplog.text


def test_a_file_of_isolated_atoms_trains_where_that_is_asked(two_files):
    splits = sets(*two_files, systems={"isolated_atoms": "train"}, validation_set=0.25)
    assert [len(s.numbers) for s in splits.train] == [1, 3, 3, 3]
    assert [len(s.numbers) for s in splits.validation] == [1, 3]


def test_a_file_of_isolated_atoms_by_itself_is_what_is_meant(two_files):
    splits = sets(two_files[0], validation_set=0.25)
    assert [len(s.numbers) for s in [*splits.train, *splits.validation]] == [1, 1]


def test_without_targets_all_frames_are_there_to_be_predicted(atoms_and_water):
    section = {"systems": {"read_from": str(atoms_and_water)}, "targets": {"energy": {}}}
    options = parse_options({"training_set": section}, require_start=False).options
    unlabelled = options.training_set[0].model_copy(update={"targets": {}})
    assert [s.index for s in read_structures(unlabelled)] == [0, 1, 2]
