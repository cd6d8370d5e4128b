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
from pet_finetune.data.left_out import isolated_frames
from pet_finetune.data.readers import read_structures
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
    return read_structures(options.training_set[0])


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
    assert "1 of 2 frames have no energy ('energy')" in caplog.text
    assert "offset" not in caplog.text


def test_a_whole_set_without_energies_says_what_that_means(tmp_path, caplog):
    write(tmp_path / "set.xyz", [labelled(molecule("H2O")) for _ in range(3)])
    with caplog.at_level(logging.INFO, "pet_finetune"):
        structures = read(tmp_path / "set.xyz")
    assert [set(s.labels) for s in structures] == [{"energy/forces"}] * 3
    assert "all of 3 frames have no energy" in caplog.text
    assert "The offset of the energies stays that of the starting model." in caplog.text


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
