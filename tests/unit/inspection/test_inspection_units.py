"""Units: every wrong factor is found, and none is suspected where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from inspected import codes, frames, look, relabel, scaled, the
from pet_finetune.inspection.evidence import Declared, log_ratio
from pet_finetune.inspection.inspection import inspect_sets
from pet_finetune.units import energy_to_ev, to_own_unit

BOHR = to_own_unit("length", "bohr")
#: Numbers of eV and eV/A in files whose units are these.
FILES = {
    "kcal/mol": (energy_to_ev("kcal/mol"), energy_to_ev("kcal/mol")),
    "kJ/mol": (energy_to_ev("kJ/mol"), energy_to_ev("kJ/mol")),
    "Hartree": (energy_to_ev("Hartree"), energy_to_ev("Hartree") / BOHR),
    "Ry": (energy_to_ev("Ry"), energy_to_ev("Ry") / BOHR),
}


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_right_units_are_believed(molecules_of, name):
    assert not codes(look(molecules_of(name))) & {"units", "length-unit", "force-sign"}


@pytest.mark.parametrize("unit", FILES)
def test_forces_in_other_units(molecules_of, unit):
    _, force = FILES[unit]
    found = the(look(scaled(molecules_of("train"), forces=1 / force)), "units")
    # Hartree/A and Ry/Bohr differ by 6 %, less than anything that the data can tell.
    named = {"Hartree": "Hartree/Bohr", "Ry": "Ry/Bohr"}.get(unit, f"{unit}/A")
    assert f"forces in {named}" in found.what
    assert "energies in" not in found.what.split(":")[0]
    assert found.severity == "warning"


@pytest.mark.parametrize("unit", FILES)
def test_energies_in_other_units(molecules_of, unit):
    energy, _ = FILES[unit]
    found = the(look(scaled(molecules_of("train"), energy=1 / energy)), "units")
    assert f"energies in {unit}" in found.what


@pytest.mark.parametrize("unit", ["kcal/mol", "kJ/mol"])
def test_all_in_other_units_can_be_said_by_the_options(molecules_of, unit):
    """As the public ethanol file, in kcal/mol: energies and forces agree with each other."""
    energy, force = FILES[unit]
    found = the(look(scaled(molecules_of("train"), energy=1 / energy, forces=1 / force)), "units")
    assert found.data["unit"] == unit
    assert f"unit: {unit}" in found.advice


def test_other_checks_go_on_in_the_units_found(molecules_of):
    """One mistake, one finding; and a wrong energy is found all the same."""
    energy, force = FILES["kcal/mol"]
    structures = scaled(molecules_of("train"), energy=1 / energy, forces=1 / force)
    off = structures[7].labels["energy"] + 3.0 / energy
    structures[7] = relabel(structures[7], energy=off)
    leaked = replace(molecules_of("train")[3], source="val.xyz")
    inspection = look(structures, validation=[*molecules_of("val"), leaked])
    # One frame of a file of its own tells no unit.
    assert codes(inspection) == {"units", "energy-outliers", "leak", "units-unchecked"}
    assert the(inspection, "units-unchecked").place == "val.xyz"
    assert frames(the(inspection, "energy-outliers")) == [7]


def test_units_that_the_options_convert_already(molecules_of):
    """The file is in eV, but the options say kcal/mol: the labels come out too small."""
    factor = energy_to_ev("kcal/mol")
    structures = scaled(molecules_of("train"), energy=factor, forces=factor)
    declared = {structures[0].source: Declared(energy=factor)}
    found = the(inspect_sets({"train": structures}, "energy", declared), "units")
    assert found.data["unit"] == "eV"


def test_gradients_instead_of_forces(molecules_of):
    assert the(look(scaled(molecules_of("train"), forces=-1.0)), "force-sign").where


@pytest.mark.parametrize(
    ("length", "unit"), [(1 / BOHR, "bohr"), (0.1, "nm"), (BOHR, None)], ids=["Bohr", "nm", "twice"]
)
def test_positions_in_other_units(molecules_of, length, unit):
    inspection = look(scaled(molecules_of("val"), length=length))
    assert the(inspection, "length-unit").data["unit"] == unit
    assert "units" not in codes(inspection)


def test_stress_is_believed(strained):
    assert not codes(look(strained)) & {"units", "stress-sign", "force-sign"}


@pytest.mark.parametrize("unit", ["GPa", "kbar"])
def test_stress_in_other_units(strained, unit):
    found = the(look(scaled(strained, stress=1 / to_own_unit("pressure", unit))), "units")
    assert f"stresses in {unit}" in found.what


def test_stress_of_the_wrong_sign(strained):
    inspection = look(scaled(strained, stress=-1.0))
    found = the(inspection, "stress-sign")
    assert found.severity == "error"
    assert "VASP" in found.advice
    assert "units" not in codes(inspection)


def test_stress_of_the_wrong_sign_and_unit(strained):
    factor = to_own_unit("pressure", "kbar")
    assert {"stress-sign", "units"} <= codes(look(scaled(strained, stress=-1 / factor)))


def test_log_ratio_of_noise_is_unsure():
    rng = np.random.default_rng(0)
    _, sure, sign = log_ratio(2.0 * np.arange(1.0, 50.0), np.arange(1.0, 50.0), 0.1)
    assert (sure, sign) == (0.1, 1)
    _, unsure, sign = log_ratio(rng.normal(size=200), rng.normal(size=200), 0.1)
    assert unsure > 0.4
    assert sign == 0


def virials(structures):
    """The stress as a virial, under the name of the stress."""
    return [relabel(s, stress=-s.labels["energy/stress"] * s.volume) for s in structures]


def alone(structures):
    """Frames that have no neighbour: each of another element, so that no energy helps."""
    return [
        replace(s, numbers=torch.full_like(s.numbers, 21 + k), index=k)
        for k, s in enumerate(structures[:30])
    ]


def test_disordered_frames_believe_their_stress(strained):
    assert not codes(look(alone(strained))) & {"units", "stress-sign"}


@pytest.mark.parametrize("unit", ["GPa", "kbar", "Hartree/Bohr^3"])
def test_forces_and_distances_tell_the_unit_of_the_stress(strained, unit):
    """From both sides: numbers that are too large, and numbers that are too small."""
    factor = 1 / to_own_unit("pressure", unit)
    found = the(look(scaled(alone(strained), stress=factor)), "units")
    assert f"stresses in {unit}" in found.what
    assert "pair potential fitted to the forces" in found.what


def test_a_virial_under_the_name_of_a_stress(strained):
    found = the(look(virials(strained)), "units")
    assert "stresses in eV (a virial)" in found.what


def relaxed(strained, pull):
    """Crystals without forces, of other elements, under a tension of both signs (eV/A^3)."""
    frames = []
    for k, s in enumerate(alone(strained)):
        stress = pull * np.sin(k) * np.eye(3)
        frames.append(relabel(s, forces=torch.zeros_like(s.positions), stress=stress))
    return frames


def test_relaxed_crystals_believe_their_stress(strained):
    assert "units" not in codes(look(relaxed(strained, 0.005)))


def test_no_crystal_withstands_the_tension_of_a_stress_in_gpa(strained):
    found = the(look(relaxed(strained, 0.005 * 160.2)), "units")
    assert "stresses in GPa" in found.what
    assert "tension" in found.what


def test_a_sign_that_only_the_tension_tells_is_asked_about(strained):
    """An exotic unit would explain it nearly as well, so that no run is stopped."""
    frames = [
        relabel(s, stress=-s.labels["energy/stress"] + 0.9 * torch.eye(3)) for s in alone(strained)
    ]
    found = the(look(frames), "stress-sign")
    assert found.severity == "warning"
    assert "may have the wrong sign" in found.what


def test_a_virial_under_the_name_of_a_stress_stops_no_run(strained):
    """It has the other sign than a stress, which is no reason to call the sign wrong."""
    assert not codes(look(virials(strained)), "error")
    assert not codes(look(virials(alone(strained))), "error")


def test_usual_units_come_first_and_each_has_its_advice(strained):
    found = the(look(scaled(alone(strained), stress=1 / to_own_unit("pressure", "GPa"))), "units")
    named = found.what.split(":")[0]
    assert named.startswith("the numbers look like stresses in GPa")
    assert " or " not in named or found.advice.startswith("The data cannot tell which")


def test_kbar_are_asked_about_their_sign(strained):
    kbar = scaled(alone(strained), stress=-1 / to_own_unit("pressure", "kbar"))
    assert "opposite of ASE's" in the(look(kbar), "units").advice


def test_units_that_nothing_excludes_are_asked_about(strained):
    """Relaxed crystals of different elements say nothing of energies, forces and small stresses."""
    found = the(look(relaxed(strained, 0.005)), "units-unchecked")
    assert found.severity == "warning"
    assert "taken to be in eV and Angstrom" in found.what
    assert {"kcal/mol", "Hartree", "Ry"} <= set(found.data["open"]["energy"])
    assert {"GPa", "kbar", "the other sign"} <= set(found.data["open"]["stress"])


def test_what_the_data_tell_is_not_asked_about(strained, molecules_of):
    assert "units-unchecked" not in codes(look(molecules_of("train")))
    assert "units-unchecked" not in codes(look(strained))


def test_units_that_options_name_are_a_note(strained):
    structures = relaxed(strained, 0.005)
    declared = {structures[0].source: Declared(named=True)}
    found = the(inspect_sets({"train": structures}, "energy", declared), "units-unchecked")
    assert found.severity == "note"
    assert "the units of the options" in found.what


def test_units_that_reading_converted_are_not_asked_about(strained):
    structures = relaxed(strained, 0.005)
    declared = {structures[0].source: Declared(converted=True)}
    assert "units-unchecked" not in codes(inspect_sets({"train": structures}, "energy", declared))


def test_files_that_leave_the_same_open_are_one_finding(strained):
    files = [replace(s, source=f"{k}.xyz") for k, s in enumerate(relaxed(strained, 0.005)[1:21])]
    found = [f for f in look(files).findings if f.code == "units-unchecked"]
    assert len(found) == 1
    assert len(found[0].where) > 10


def per_atom(structures):
    return [relabel(s, energy=s.labels["energy"] / s.num_atoms) for s in structures]


def test_energies_that_were_divided_by_the_number_of_atoms(strained, molecules_of):
    """By the work of the forces, where all structures have one size."""
    ethanol = [s for s in molecules_of("train") if s.num_atoms == 9]
    found = the(look(per_atom(ethanol)), "units")
    assert "eV an atom" in found.what
    assert "number of atoms" in found.advice
    assert "eV an atom" in the(look(per_atom(strained)), "units").what


def sizes(strained, per_atom):
    """Supercells without forces: nothing but the sizes tells what the energies are."""
    frames = []
    for k, s in enumerate(strained):
        times = 1 + k % 3
        shift = torch.arange(times, dtype=s.positions.dtype).repeat_interleave(s.num_atoms)
        cell = s.cell.clone()
        cell[0] *= times
        energy = s.labels["energy"] + 40.0 * s.num_atoms
        frames.append(
            replace(
                s,
                numbers=s.numbers.repeat(times),
                positions=s.positions.repeat(times, 1) + shift[:, None] * s.cell[0],
                cell=cell,
                labels={"energy": energy / s.num_atoms if per_atom else energy * times},
            )
        )
    return frames


def test_energies_that_do_not_grow_with_the_number_of_atoms(strained):
    assert "eV an atom" in the(look(sizes(strained, per_atom=True)), "units").what
    assert "units" not in codes(look(sizes(strained, per_atom=False)))


def test_only_what_speaks_against_the_units_is_told(molecules_of):
    factor = energy_to_ev("kcal/mol")
    found = the(look(scaled(molecules_of("train"), energy=1 / factor)), "units")
    assert "force constant" not in found.what
