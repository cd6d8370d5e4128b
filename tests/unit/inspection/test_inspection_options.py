"""What is found stands in the options that are written, or stops a run with them."""

from __future__ import annotations

import pytest

from inspected import read
from pet_finetune.config.load import load_options
from pet_finetune.data.readers import read_structures
from pet_finetune.errors import DataError, UnitError
from pet_finetune.inspection.inspect_data import inspect_data, request_of_files, write_suggestion
from pet_finetune.inspection.inspected import Finding, Frames
from pet_finetune.inspection.unit_checks import with_found_units
from pet_finetune.units import energy_to_ev, to_own_unit
from tiny_data import molecules, write_frames

HARTREE, BOHR = energy_to_ev("Hartree"), to_own_unit("length", "bohr")


def section(**target):
    return {"systems": {"read_from": "a.xyz"}, "targets": {"energy": {"key": "e", **target}}}


def units(*readings, unit=None):
    data = {"units": readings[0], "readings": list(readings), "unit": unit}
    return Finding("warning", "units", "", (Frames("a.xyz"),), data=data)


def written(finding, **target):
    return with_found_units(section(**target), [finding])["targets"]["energy"]


def test_each_quantity_has_its_unit():
    target = written(
        units({"energy": "Hartree", "force": "Hartree/Bohr", "stress": "GPa"}),
        forces={"key": "f", "mode": "auto"},
    )
    assert target["unit"] == "Hartree"
    assert target["forces"] == {"key": "f", "mode": "auto", "unit": "Hartree/Bohr"}
    assert target["stress"]["unit"] == "GPa"


def test_one_unit_that_says_it_all():
    target = written(units({"energy": "kcal/mol", "force": "kcal/mol/A"}, unit="kcal/mol"))
    assert target == {"key": "e", "unit": "kcal/mol"}


def test_a_virial_is_named_as_one():
    target = written(units({"stress": "eV (a virial)"}), stress={"key": "s", "mode": "auto"})
    assert (target["stress"], target["virial"]) == ("off", {"key": "s", "mode": "auto"})


def test_what_is_in_doubt_is_a_question():
    target = written(units({"stress": "GPa"}, {"stress": "kJ/mol/A^3"}))
    assert target["stress"]["unit"] == "GPa or kJ/mol/A^3?"


def hartree(path, repository):
    """Molecules in Hartree, Hartree/Bohr and Angstrom, under REF_ names."""
    import ase.io

    frames = ase.io.read(repository / "datasets" / "molecules_pbe0_val.xyz", ":")
    for atoms in frames:
        results = atoms.calc.results
        atoms.info = {"REF_energy": results["energy"] / HARTREE}
        atoms.arrays["REF_forces"] = results["forces"] / HARTREE * BOHR
        atoms.calc = None
    return write_frames(path, frames)


def test_the_options_that_are_written_read_the_labels_in_ev(tmp_path, repository):
    data = hartree(tmp_path / "a.xyz", repository)
    inspection = inspect_data(request_of_files([str(data)]))
    write_suggestion(inspection, tmp_path / "options.yaml")
    options = load_options(tmp_path / "options.yaml").options
    right = read(repository / "datasets" / "molecules_pbe0_val.xyz")
    for one, other in zip(read_structures(options.training_set[0]), right, strict=True):
        for name in ("energy", "energy/forces"):
            assert one.labels[name].numpy() == pytest.approx(
                other.labels[name].numpy(), rel=1e-5, abs=1e-5
            )


def test_of_many_files_all_that_cannot_be_read_are_named(tmp_path):
    good = str(write_frames(tmp_path / "good.xyz", molecules(2)))
    bad = [str(tmp_path / name) for name in ("empty.xyz", "gone.xyz")]
    (tmp_path / "empty.xyz").write_text("")
    request = request_of_files([bad[0], good, bad[1]])
    assert [finding.code for finding in request.findings] == ["unreadable"] * 2
    assert [one.systems.read_from for one in request.options.training_set] == [good]
    with pytest.raises(DataError, match="empty"):
        request_of_files(bad[:1])


def test_a_question_stops_a_run(tmp_path, repository):
    data = hartree(tmp_path / "a.xyz", repository)
    inspection = inspect_data(request_of_files([str(data)]))
    target = inspection.suggestion.options["training_set"]["targets"]["energy"]
    target["key"] = "REF_energy or other_energy?"
    write_suggestion(inspection, tmp_path / "options.yaml")
    assert "Choose one" in (tmp_path / "options.yaml").read_text()
    options = load_options(tmp_path / "options.yaml").options
    with pytest.raises(DataError, match="REF_energy or other_energy"):
        read_structures(options.training_set[0])


def test_a_question_of_forces_stops_a_run(tmp_path):
    frames = molecules(12)
    for atoms in frames:
        results = atoms.calc.results
        atoms.info = {"energy": results["energy"]}
        atoms.arrays["REF_forces"] = results["forces"]
        atoms.arrays["dft_forces"] = 1.5 * results["forces"]
        atoms.calc = None
    inspection = inspect_data(request_of_files([str(write_frames(tmp_path / "a.xyz", frames))]))
    write_suggestion(inspection, tmp_path / "options.yaml")
    options = load_options(tmp_path / "options.yaml").options
    with pytest.raises(DataError, match=r"forces.*under 'REF_forces or dft_forces\?'"):
        read_structures(options.training_set[0])


@pytest.mark.parametrize("unit", ["GPa or kbar?", "eV"])
def test_a_unit_of_nothing_is_refused(unit):
    with pytest.raises(UnitError):
        to_own_unit("pressure", unit)
