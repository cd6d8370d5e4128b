"""The ways of naming data, and what they are turned into."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config.dataset import DatasetOptions, IndexedSet
from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.config.target import GradientOptions, TargetOptions
from pet_finetune.errors import ConfigError
from pet_finetune.keys import TargetSpec


def dataset(**target: Any) -> DatasetOptions:
    raw = {"systems": "a.xyz", "targets": {"energy": target}}
    return DatasetOptions.model_validate(raw)


def problems(**raw: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_options({"training_set": "a.xyz", **raw})
    return caught.value.problems


def options(**raw: Any) -> Options:
    return parse_options({"training_set": "a.xyz", **raw}).options


def test_a_path_means_structures_with_an_energy() -> None:
    (data,) = options(training_set="a.xyz").training_set
    assert data.systems.read_from == "a.xyz"
    assert data.systems.length_unit == "angstrom"
    energy = data.targets["energy"]
    assert (energy.read_from, energy.key, energy.unit) == ("a.xyz", "energy", "eV")
    assert energy.forces == GradientOptions(mode="auto", read_from="a.xyz", key="forces")
    assert energy.stress.mode == "auto"
    assert not energy.virial.wanted


def test_targets_and_gradients_inherit_the_file_they_do_not_name() -> None:
    raw = {
        "systems": {"read_from": "positions.xyz"},
        "targets": {
            "energy": {"read_from": "labels.xyz", "forces": "forces.xyz", "stress": {"key": "s"}},
            "mtt::other": "others.xyz",
        },
    }
    data = DatasetOptions.model_validate(raw)
    energy = data.targets["energy"]
    assert energy.forces == GradientOptions(mode="on", read_from="forces.xyz", key="forces")
    assert energy.stress == GradientOptions(mode="on", read_from="labels.xyz", key="s")
    other = data.targets["mtt::other"]
    assert (other.read_from, other.key, other.quantity) == ("others.xyz", "mtt::other", "energy")


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (True, "on"),
        (False, "off"),
        ("on", "on"),
        ("off", "off"),
        ("auto", "auto"),
        (None, "off"),
        ({"key": "F"}, "on"),
    ],
)
def test_ways_to_ask_for_forces(given: Any, mode: str) -> None:
    forces = dataset(forces=given).targets["energy"].forces
    assert forces.mode == mode
    assert forces.wanted == (mode != "off")
    assert forces.required == (mode == "on")


@pytest.mark.parametrize(
    ("name", "quantity", "mode"),
    [
        ("energy", None, "auto"),
        ("energy/ft", None, "auto"),
        ("mtt::U0", "energy", "auto"),
        ("mtt::U0", None, "off"),
        ("dipole", "dipole", "off"),
    ],
)
def test_only_energies_have_gradients_unasked(name: str, quantity: str | None, mode: str) -> None:
    target = {} if quantity is None else {"quantity": quantity}
    data = DatasetOptions.model_validate({"systems": "a.xyz", "targets": {name: target}})
    assert data.targets[name].forces.mode == mode
    assert data.targets[name].stress.mode == mode
    assert data.targets[name].virial.mode == "off"


@pytest.mark.parametrize(
    ("target", "quantity"),
    [
        ({}, "energy"),
        ({"key": "E", "unit": "hartree", "forces": True}, "energy"),
        ({"quantity": None}, "energy"),
        ({"quantity": ""}, ""),
        ({"quantity": "gap", "unit": "eV"}, "gap"),
        ({"unit": "Debye"}, ""),
        ({"sample_kind": "atom"}, ""),
        ({"num_subtargets": 3}, ""),
        ({"type": {"cartesian": {"rank": 1}}}, ""),
    ],
)
def test_one_number_for_each_structure_is_an_energy_unless_something_speaks_against_it(
    target: dict[str, Any], quantity: str
) -> None:
    data = DatasetOptions.model_validate({"systems": "a.xyz", "targets": {"mtt::x": target}})
    own = data.targets["mtt::x"]
    assert own.quantity == quantity
    assert own.is_energy == (quantity == "energy")
    assert own.forces.mode == ("on" if "forces" in target else "off")


def test_a_quantity_that_was_assumed_is_told() -> None:
    targets = {"energy": {}, "mtt::x": {"unit": "eV"}, "mtt::dos": {"num_subtargets": 2}}
    lines = parse_options({"training_set": {"systems": "a.xyz", "targets": targets}}).notices
    (line,) = [line for line in lines if "quantity" in line]
    assert "taken as energy as in metatrain: training_set.targets.mtt::x." in line


def test_forces_that_are_called_a_gradient_are_told() -> None:
    for key, told in (("gradients", True), ("dft_grad", True), ("REF_forces", False)):
        energy = {"unit": "eV", "forces": {"key": key}}
        data = {"systems": "a.xyz", "targets": {"energy": energy}}
        lines = parse_options({"training_set": data}).notices
        assert any("taken as forces, as in metatrain" in line for line in lines) == told


def test_a_virial_takes_the_place_of_a_stress_that_is_not_named() -> None:
    energy = dataset(virial=True).targets["energy"]
    assert (energy.virial.mode, energy.stress.mode) == ("on", "off")


def test_stress_and_virial_together_are_a_problem() -> None:
    (line,) = problems(
        training_set={
            "systems": "a.xyz",
            "targets": {"energy": {"stress": True, "virial": {"key": "W"}}},
        }
    )
    assert line.startswith("training_set.targets.energy.virial: stress and virial are the same")


@pytest.mark.parametrize(
    ("target", "kind", "num", "per_atom"),
    [
        ({}, "scalar", 1, False),
        ({"type": {"cartesian": {"rank": 1}}}, "vector", 3, False),
        ({"type": {"cartesian": {"rank": 2}}, "num_subtargets": 3}, "tensor", 27, False),
        ({"sample_kind": "atom", "type": "scalar"}, "scalar", 1, True),
    ],
)
def test_a_target_describes_what_the_model_predicts(
    target: dict[str, Any], kind: Any, num: int, per_atom: bool
) -> None:
    own = TargetOptions(quantity="q", unit="D", description="PBE", **target)
    assert own.spec("x") == TargetSpec(
        "x",
        quantity="q",
        unit="D",
        kind=kind,
        num_outputs=num,
        per_atom=per_atom,
        description="PBE",
    )


def test_energies_are_kept_in_ev_whatever_the_file_has() -> None:
    assert dataset(unit="kcal/mol").targets["energy"].spec("energy").unit == "eV"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"type": {"spherical": {"irreps": []}}}, "Spherical targets are not supported: give"),
        ({"type": "vector"}, "expected 'scalar', {cartesian: {rank: 1}} or"),
        ({"type": {"cartesian": {"rank": 3}}}, "expected 'scalar', {cartesian: {rank: 1}} or"),
        ({"sample_kind": "atom_pair"}, "Targets for pairs of atoms are not supported."),
        ({"reader": "metatensor"}, "Leave it out: files that ASE reads, and the zips"),
        ({"unit": "kcal"}, "Unknown energy unit 'kcal'. Did you mean 'kcal/mol'?"),
        ({"kee": "E"}, "unknown option. Did you mean 'key'?"),
        ({"forces": {"kee": "F"}}, "unknown option. Did you mean 'key'?"),
        (
            {"sample_kind": "atom", "forces": True},
            "forces, stress and virial need one energy for each structure",
        ),
        ({"quantity": "dipole", "forces": True}, "only an energy has forces, stress or virial"),
    ],
)
def test_targets_that_cannot_be_learned(target: dict[str, Any], message: str) -> None:
    (line,) = problems(training_set={"systems": "a.xyz", "targets": {"energy": target}})
    assert line.startswith("training_set.targets.energy")
    assert message in line


def test_units_of_other_quantities_are_the_users_business() -> None:
    target = {"quantity": "dipole", "unit": "Debye"}
    loaded = options(training_set={"systems": "a.xyz", "targets": {"dipole": target}})
    assert loaded.target_specs()["dipole"].unit == "Debye"


def test_an_unknown_length_unit() -> None:
    systems = {"read_from": "a.xyz", "length_unit": "bohrs"}
    (line,) = problems(training_set={"systems": systems, "targets": {"energy": {}}})
    assert line.startswith("training_set.systems.length_unit: expected a unit of length, got 'boh")
    assert "Did you mean 'bohr'?" in line


def test_no_targets() -> None:
    (line,) = problems(training_set={"systems": "a.xyz", "targets": {}})
    assert line.startswith("training_set.targets: empty")


def test_missing_parts_of_a_data_set() -> None:
    assert problems(training_set={"targets": {"energy": {}}})[0].startswith(
        "training_set.systems: missing."
    )
    assert problems(training_set={"systems": {}, "targets": {"energy": {}}})[0].startswith(
        "training_set.systems.read_from: missing."
    )
    assert problems(training_set=5)[0].startswith("training_set: expected a section with keys (")


@pytest.mark.parametrize("systems", [["a.xyz", "b.xyz"], {"read_from": ["a.xyz", "b.xyz"]}])
def test_several_files_are_several_data_sets(systems: Any) -> None:
    (line, *_) = problems(training_set={"systems": systems, "targets": {"energy": {}}})
    assert line.startswith("training_set.systems.read_from: expected the path of one file, got")
    assert "Several files are several data sets: `training_set: [{systems: a.xyz" in line


def test_a_list_of_data_sets_is_told_apart_by_position() -> None:
    good = {"systems": "a.xyz", "targets": {"energy": {"unit": "eV"}}}
    bad = {"systems": "b.xyz", "targets": {"energy": {"unit": "kcal"}}}
    (line,) = problems(training_set=[good, bad])
    assert line.startswith("training_set[1].targets.energy.unit: Unknown energy unit 'kcal'.")
    assert len(options(training_set=[good, "b.xyz"]).training_set) == 2


def test_charge_and_spin() -> None:
    data = DatasetOptions.model_validate(
        {
            "systems": "a.xyz",
            "targets": {"energy": {}},
            "extra_data": {"charge": {"key": "q"}, "spin_multiplicity": "s.xyz"},
        }
    )
    assert (data.extra_data["charge"].read_from, data.extra_data["charge"].key) == ("a.xyz", "q")
    spin = data.extra_data["spin_multiplicity"]
    assert (spin.read_from, spin.key) == ("s.xyz", "spin_multiplicity")


def test_other_extra_data_are_refused() -> None:
    (line,) = problems(
        training_set={"systems": "a", "targets": {"energy": {}}, "extra_data": {"spin": {}}}
    )
    assert line.startswith("training_set.extra_data.spin: expected one of charge, spin_multipli")


def test_validation_sets_in_every_form() -> None:
    assert options().validation_set == 0.1
    assert options().test_set == 0.0
    assert options(validation_set=0.2).validation_set == 0.2
    indexed = options(validation_set={"indices": [1, 5]}).validation_set
    assert indexed == IndexedSet(indices=(1, 5))
    from_file = options(validation_set={"indices": "val.txt"}).validation_set
    assert from_file == IndexedSet(indices="val.txt")
    named = options(validation_set="v.xyz", test_set=["t.xyz", "u.xyz"])
    assert [d.systems.read_from for d in named.datasets()] == ["a.xyz", "v.xyz", "t.xyz", "u.xyz"]


@pytest.mark.parametrize(
    ("indices", "reason"),
    [([], ""), ([-1], ""), ([1.5], ""), ([3, 3], "Given more than once: [3]."), (7, "")],
)
def test_indices_that_make_no_sense(indices: Any, reason: str) -> None:
    (line,) = problems(validation_set={"indices": indices})
    assert line.startswith("validation_set.indices: expected a list of distinct frame numbers")
    assert reason in line


def test_frames_may_be_in_one_set_only() -> None:
    training_set = {"systems": "a", "targets": {"energy": {}}, "indices": [0, 1, 2]}
    found = problems(
        training_set=training_set, validation_set={"indices": [2, 3]}, test_set={"indices": [3, 4]}
    )
    assert found == (
        "validation_set.indices: frames 2 are also in training_set.indices; a frame may be in "
        "one set only.",
        "test_set.indices: frames 3 are also in validation_set.indices; a frame may be in one "
        "set only.",
    )


def test_indices_need_a_single_training_file() -> None:
    (line,) = problems(training_set=["a", "b"], validation_set={"indices": [1]})
    assert "which of the training files is meant is not clear" in line


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (0.0, 0.0, "validation_set: expected a number between 0 and 1, got 0."),
        (0.5, 0.5, "test_set: validation_set (0.5) and test_set (0.5) together leave nothing"),
    ],
)
def test_fractions_that_leave_nothing(validation: float, test: float, message: str) -> None:
    (line,) = problems(validation_set=validation, test_set=test)
    assert line.startswith(message)


def test_held_out_data_may_only_have_trained_targets() -> None:
    held_out = {"systems": "v", "targets": {"enrgy": {}}}
    (line,) = problems(validation_set=held_out)
    assert line.startswith("validation_set.targets.enrgy: training_set has no such target.")
    assert "Did you mean 'energy'?" in line


def test_a_target_must_be_the_same_everywhere() -> None:
    vector = {"quantity": "dipole", "type": {"cartesian": {"rank": 1}}}
    first = {"systems": "a", "targets": {"d": vector}}
    second = {"systems": "b", "targets": {"d": {"quantity": "dipole"}}}
    (line,) = problems(training_set=[first, second])
    assert line.startswith("training_set[1].targets.d: its kind is 'scalar', but 'vector' where")
