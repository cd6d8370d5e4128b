"""Files that are wrong: what can be used is used, and all that is wrong is said."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.config.load import parse_options
from pet_finetune.data.readers import read_structures
from pet_finetune.errors import DataError
from pet_finetune.inspection.geometry import check_cells
from pet_finetune.inspection.label_checks import read_anyway, sets_left_out
from pet_finetune.inspection.label_names import target_of_file
from tiny_data import crystals, data_section, molecules, write_frames


def dataset(path, **target):
    content = {"training_set": data_section(str(path), **target)}
    return parse_options(content, require_start=False).options.training_set[0]


def spoil(frames, index, **results):
    atoms = frames[index]
    atoms.calc = SinglePointCalculator(atoms, **{**atoms.calc.results, **results})


def test_broken_frames_are_told_apart(tmp_path):
    frames = molecules(8)
    spoil(frames, 1, energy=np.nan)
    forces = frames[4].calc.results["forces"].copy()
    forces[0, 0] = np.inf
    spoil(frames, 4, forces=forces)
    frames[6].calc = None
    structures, findings = read_anyway(dataset(write_frames(tmp_path / "a.xyz", frames)))
    assert [s.index for s in structures] == [0, 2, 3, 5, 7]
    found = {f.code: f.where[0].numbers for f in findings}
    assert found == {"not-finite-energy": (1,), "not-finite-forces": (4,), "missing-energy": (6,)}
    assert {f.severity for f in findings} == {"error"}


def test_sound_files_are_read_as_they_are(tmp_path):
    structures, findings = read_anyway(dataset(write_frames(tmp_path / "a.xyz", molecules(3))))
    assert len(structures) == 3
    assert not findings


@pytest.mark.parametrize("content", ["", "nonsense\n"])
def test_files_that_are_none(tmp_path, content):
    (tmp_path / "a.xyz").write_text(content)
    structures, (finding,) = read_anyway(dataset(tmp_path / "a.xyz"))
    assert not structures
    assert finding.code == "unreadable"


def test_a_misspelt_key_names_the_nearest(tmp_path):
    path = write_frames(tmp_path / "a.xyz", molecules(3))
    _, (finding,) = read_anyway(dataset(path, forces={"key": "force", "mode": "on"}))
    assert "Did you mean 'forces'?" in finding.what


def test_labels_under_other_names_are_found(tmp_path):
    frames = molecules(3)
    for atoms in frames:
        results = atoms.calc.results
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = results["energy"], results["forces"]
        atoms.calc = None
    section, findings = target_of_file(write_frames(tmp_path / "a.xyz", frames))
    assert section["key"] == "REF_energy"
    assert section["forces"]["key"] == "REF_forces"
    assert section["stress"] == "off"
    assert [f.code for f in findings] == ["other-key", "other-key"]


def test_no_energy_at_all(tmp_path):
    frames = molecules(2)
    for atoms in frames:
        atoms.calc = None
    _, (finding,) = target_of_file(write_frames(tmp_path / "a.xyz", frames))
    assert (finding.code, finding.severity) == ("no-energy", "error")


def test_a_file_that_is_not_there():
    with pytest.raises(DataError, match="does not exist"):
        target_of_file("nowhere.xyz")


def test_cells_without_periodicity(tmp_path):
    frames = crystals(3)
    frames[1].pbc = False
    (finding,) = check_cells(write_frames(tmp_path / "a.xyz", frames))
    assert finding.where[0].numbers == (1,)


def test_frames_of_failed_calculations_are_a_finding_and_left_out(tmp_path):
    frames = molecules(3)
    for number, atoms in enumerate(frames):
        atoms.info["scf_converged"] = number != 1
    write_frames(tmp_path / "x.xyz", frames)
    structures, findings = read_anyway(dataset(tmp_path / "x.xyz"))
    assert [structure.index for structure in structures] == [0, 2]
    (finding,) = findings
    assert finding.code == "unconverged"
    assert finding.where[0].numbers == (1,)


def named(names, forces=()):
    """Frames whose energies and forces stand under other names, as ``{name: factor}``."""
    frames = molecules(4)
    for atoms in frames:
        results = atoms.calc.results
        atoms.info = {name: results["energy"] * factor for name, factor in names.items()}
        for k, name in enumerate(forces):
            atoms.arrays[name] = results["forces"] * (1.0 + k)
        atoms.calc = None
    return frames


@pytest.mark.parametrize(
    "other",
    ["energy_sigma", "energy_cutoff", "energy_per_atom", "formation_energy",
     "e_above_hull_energy", "band_energy", "free_energy",
     "binding_energy", "atomization_energy", "zero_point_energy", "energy_std"],
)  # fmt: skip
def test_a_name_of_something_else_is_no_energy(tmp_path, other):
    path = write_frames(tmp_path / "a.xyz", named({other: 0.5, "total_energy": 1.0}))
    section, findings = target_of_file(path)
    assert section["key"] == "total_energy"
    assert other in findings[0].what
    path = write_frames(tmp_path / "b.xyz", named({other: 0.5}))
    _, findings = target_of_file(path)
    assert [f.code for f in findings] == ["no-energy"]
    assert other in findings[0].what


def test_of_several_energies_none_is_taken_without_asking(tmp_path):
    names = {"REF_energy": 1.0, "mace_energy": 1.1}
    path = write_frames(tmp_path / "a.xyz", named(names, forces=("mace_forces", "REF_forces")))
    section, (finding, *_) = target_of_file(path)
    assert (finding.code, finding.severity) == ("several-labels", "error")
    assert finding.data == {"kind": "energy", "keys": list(names)}
    assert section["forces"]["key"] == "REF_forces"  # it goes with the energy that is looked at


def test_the_same_energy_under_two_names_is_no_question(tmp_path):
    path = write_frames(tmp_path / "a.xyz", named({"dft_energy": 1.0, "REF_energy": 1.0}))
    section, findings = target_of_file(path)
    assert section["key"] == "dft_energy"
    assert [f.code for f in findings] == ["other-key"]


def test_other_totals_beside_the_energy_are_named(tmp_path):
    names = {"energy": 1.0, "REF_energy": 1.1, "same_energy": 1.0, "energy_per_atom": 0.3}
    path = write_frames(tmp_path / "a.xyz", named(names, forces=("forces",)))
    section, (finding,) = target_of_file(path)
    assert section["key"] == "energy"
    assert (finding.code, finding.severity) == ("other-labels", "warning")
    assert finding.data == {"kind": "energy", "keys": ["REF_energy"]}


@pytest.mark.parametrize(("factor", "found"), [(-1.0, []), (1.0, ["other-labels"])])
def test_a_virial_that_contradicts_the_stress_is_named(tmp_path, factor, found):
    frames = crystals(3)
    for atoms in frames:
        results = atoms.calc.results
        atoms.info["virial"] = factor * atoms.get_stress(voigt=False) * atoms.cell.volume
        atoms.calc = SinglePointCalculator(atoms, **results)
    section, findings = target_of_file(write_frames(tmp_path / "a.xyz", frames))
    assert [f.code for f in findings] == found
    assert section["virial"] == "off"


def test_words_of_a_comment_are_no_energies(tmp_path):
    (tmp_path / "a.xyz").write_text("1\n energy: -5.07 gnorm: 0.01 xtb: 6.6.0\nO 0 0 0\n")
    _, (finding,) = target_of_file(tmp_path / "a.xyz")
    assert finding.code == "no-energy"
    with pytest.raises(DataError, match="must be numbers, found True"):
        read_structures(dataset(tmp_path / "a.xyz", key="energy:"))


def test_molecules_that_fill_a_box_without_a_cell_are_named(tmp_path):
    water = molecule("H2O", cell=[3.1] * 3) * (3, 3, 3)
    water.set_cell(None)
    (finding,) = check_cells(write_frames(tmp_path / "a.xyz", [water]))
    assert (finding.code, finding.data) == ("cell-missing", {"molecules": 27})
    gas = molecule("H2O", cell=[4.5] * 3) * (3, 3, 3)
    gas.set_cell(None)
    protein = molecule("C6H6")
    assert not list(check_cells(write_frames(tmp_path / "b.xyz", [gas])))
    assert not list(check_cells(write_frames(tmp_path / "c.xyz", [protein])))


@pytest.mark.parametrize(("gap", "found"), [(1.0, ["free-energy"]), (1e-4, [])])
def test_a_free_energy_that_differs_is_noted(tmp_path, gap, found):
    frames = molecules(2)
    for k in range(2):
        spoil(frames, k, free_energy=frames[k].calc.results["energy"] - gap)
    path = write_frames(tmp_path / "a.xyz", frames)
    assert [f.code for f in target_of_file(path)[1]] == found


@pytest.mark.parametrize("names", [("gradient",), ("fx", "fy", "fz")])
def test_columns_that_may_be_forces_are_named(tmp_path, names):
    frames = named({"energy": 1.0})
    for atoms in frames:
        for name in names:
            values = np.random.default_rng(0).random((len(atoms), 3))
            atoms.arrays[name] = values if len(names) == 1 else values[:, 0]
        atoms.arrays["magmoms"] = np.ones((len(atoms), 3))
        atoms.arrays["charge"] = np.ones(len(atoms))
    section, (finding,) = target_of_file(write_frames(tmp_path / "a.xyz", frames))
    assert section["forces"] == "off"
    assert (finding.code, finding.data) == ("other-columns", {"columns": list(names)})


def test_stars_in_place_of_a_number_are_called_text(tmp_path):
    frames = named({"energy": 1.0})
    frames[1].info["energy"] = "*****"
    _, findings = read_anyway(dataset(write_frames(tmp_path / "a.xyz", frames)))
    assert [(f.code, f.where[0].numbers) for f in findings] == [("no-number", (1,))]


def test_a_file_of_isolated_atoms_beside_others_is_noted_and_left_out(tmp_path):
    lone = Atoms("H")
    lone.calc = SinglePointCalculator(lone, energy=-13.6)
    sets = [
        dataset(write_frames(tmp_path / "atoms.xyz", [lone])),
        dataset(write_frames(tmp_path / "molecules.xyz", molecules(3))),
    ]
    assert sets_left_out(sets[:1]) == {}
    ((number, note),) = sets_left_out(sets).items()
    assert number == 0
    assert note.what == "1 of 1 frames are isolated atoms"
    assert sets_left_out([*sets, dataset(tmp_path / "missing.xyz")]) == {}
