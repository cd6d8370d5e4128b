"""Labels arrive in eV and Å under the right names, whatever the file calls them."""

from __future__ import annotations

import logging

import ase.units
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.stress import full_3x3_to_voigt_6_stress

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.readers import read_structures
from pet_finetune.errors import DataError, UnitError

RNG = np.random.default_rng(11)


def symmetric() -> np.ndarray:
    matrix = RNG.normal(size=(3, 3))
    return matrix + matrix.T


def crystals(count: int = 3) -> list[Atoms]:
    frames = []
    for k in range(count):
        atoms = bulk("NaCl", "rocksalt", a=5.6 + 0.1 * k)
        atoms.rattle(0.05, seed=k)
        frames.append(atoms)
    return frames


def options(path, targets=None, **other) -> DatasetOptions:
    systems = {"read_from": str(path), **other.pop("systems", {})}
    return DatasetOptions.model_validate(
        {"systems": systems, "targets": targets or {"energy": {}}, **other}
    )


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("pet_finetune")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def labelled():
    """Crystals with known labels, and the labels."""
    frames = crystals()
    known = [(float(RNG.normal()), RNG.normal(size=(2, 3)), symmetric()) for _ in frames]
    return frames, known


def as_calculator(frames, known):
    for atoms, (energy, forces, stress) in zip(frames, known, strict=True):
        atoms.calc = SinglePointCalculator(
            atoms, energy=energy, forces=forces, stress=full_3x3_to_voigt_6_stress(stress)
        )


def as_entries(frames, known, energy_key, forces_key, stress_key, shape=(3, 3)):
    for atoms, (energy, forces, stress) in zip(frames, known, strict=True):
        atoms.info[energy_key] = energy
        atoms.arrays[forces_key] = forces
        value = full_3x3_to_voigt_6_stress(stress) if shape == (6,) else stress.reshape(shape)
        atoms.info[stress_key] = value


def assert_labels(structures, known, factors=(1.0, 1.0, 1.0), atol=1e-7):
    assert len(structures) == len(known)
    for structure, (energy, forces, stress) in zip(structures, known, strict=True):
        assert set(structure.labels) == {"energy", "energy/forces", "energy/stress"}
        expected = (energy, forces, stress)
        for value, reference, factor in zip(
            (structure.labels[k] for k in ("energy", "energy/forces", "energy/stress")),
            expected,
            factors,
            strict=True,
        ):
            assert value.dtype == torch.float64
            np.testing.assert_allclose(value.numpy(), np.multiply(reference, factor), atol=atol)


@pytest.mark.parametrize("suffix", ["xyz", "traj"])
def test_labels_that_ase_keeps_in_a_calculator(tmp_path, labelled, suffix):
    frames, known = labelled
    as_calculator(frames, known)
    file = tmp_path / f"set.{suffix}"
    write(file, frames)
    structures = read_structures(options(file))
    assert_labels(structures, known)
    assert [s.index for s in structures] == [0, 1, 2]
    assert {s.source for s in structures} == {str(file)}


@pytest.mark.parametrize("shape", [(3, 3), (9,), (6,)])
def test_labels_under_names_of_the_users_choice(tmp_path, labelled, shape):
    frames, known = labelled
    as_entries(frames, known, "TotEnergy", "force", "sigma", shape)
    write(tmp_path / "set.xyz", frames)
    target = {"key": "TotEnergy", "forces": {"key": "force"}, "stress": {"key": "sigma"}}
    structures = read_structures(options(tmp_path / "set.xyz", {"energy": target}))
    assert_labels(structures, known)


def test_labels_by_their_own_names_reach_the_named_target(tmp_path, labelled):
    frames, known = labelled
    as_calculator(frames, known)
    write(tmp_path / "set.xyz", frames)
    target = {"key": "energy", "forces": True, "stress": True}
    structures = read_structures(options(tmp_path / "set.xyz", {"energy/pbe0": target}))
    assert set(structures[0].labels) == {
        "energy/pbe0",
        "energy/pbe0/forces",
        "energy/pbe0/stress",
    }


def test_units_of_energy_and_length(tmp_path, labelled):
    frames, known = labelled
    as_entries(frames, known, "E", "F", "S")
    write(tmp_path / "set.xyz", frames)
    target = {"key": "E", "unit": "kcal/mol", "forces": {"key": "F"}, "stress": {"key": "S"}}
    structures = read_structures(
        options(tmp_path / "set.xyz", {"energy": target}, systems={"length_unit": "bohr"})
    )
    energy, length = ase.units.kcal / ase.units.mol, ase.units.Bohr
    factors = (energy, energy / length, energy / length**3)
    assert_labels(structures, known, factors)
    for structure, atoms in zip(structures, frames, strict=True):
        expected = atoms.positions * length
        np.testing.assert_allclose(structure.positions.numpy(), expected, atol=1e-7)
        np.testing.assert_allclose(structure.cell.numpy(), atoms.cell[:] * length, atol=1e-7)


@pytest.mark.parametrize("length_unit", ["angstrom", "bohr"])
def test_virial_becomes_minus_stress_times_volume(tmp_path, labelled, length_unit):
    frames, known = labelled
    as_entries(frames, known, "E", "F", "unused")
    for atoms, (_, _, stress) in zip(frames, known, strict=True):
        atoms.info["virial"] = -stress * atoms.get_volume()
    write(tmp_path / "set.xyz", frames)
    target = {"key": "E", "unit": "Ha", "forces": {"key": "F"}, "virial": True}
    structures = read_structures(
        options(tmp_path / "set.xyz", {"energy": target}, systems={"length_unit": length_unit})
    )
    length = 1.0 if length_unit == "angstrom" else ase.units.Bohr
    hartree = ase.units.Hartree
    assert_labels(structures, known, (hartree, hartree / length, hartree / length**3), atol=1e-5)


def test_virial_without_a_volume_is_left_out(tmp_path):
    frames = [*crystals(1), molecule("H2O")]
    for atoms in frames:
        atoms.info.update(energy=0.0, virial=np.eye(3))
    write(tmp_path / "set.xyz", frames)
    target = {"virial": True}
    structures = read_structures(options(tmp_path / "set.xyz", {"energy": target}))
    assert ["energy/stress" in s.labels for s in structures] == [True, False]


def test_stress_of_a_real_calculator_has_the_right_sign(tmp_path):
    """ASE's own virial of a compressed crystal: energy falls when it expands, stress < 0."""
    from ase.calculators.lj import LennardJones

    atoms = bulk("Ar", a=4.6).repeat(2)
    atoms.calc = LennardJones(sigma=3.4, epsilon=0.01, rc=6.0)
    stress = atoms.get_stress(voigt=False)
    write(tmp_path / "set.xyz", atoms)
    (structure,) = read_structures(options(tmp_path / "set.xyz"))
    assert stress.trace() < 0
    np.testing.assert_allclose(structure.labels["energy/stress"].numpy(), stress, atol=1e-7)


def test_frames_without_forces_or_stress_are_kept(tmp_path, labelled, log):
    frames, known = labelled
    as_calculator(frames, known)
    del frames[1].calc.results["forces"], frames[2].calc.results["stress"]
    write(tmp_path / "set.xyz", frames)
    log.set_level(logging.INFO, logger="pet_finetune")
    target = {"forces": True, "stress": True}
    structures = read_structures(options(tmp_path / "set.xyz", {"energy": target}))
    has = [{name.partition("/")[2] for name in s.labels} for s in structures]
    assert has == [{"", "forces", "stress"}, {"", "stress"}, {"", "forces"}]
    assert "2 of 3 frames have the forces" in log.text


def test_stress_of_molecules_and_slabs_is_left_out(tmp_path, labelled):
    frames, known = labelled
    as_calculator(frames, known)
    frames[1].pbc = (True, True, False)
    frames[2].calc.results["stress"] = np.full(6, np.nan)
    frames[2].pbc = False
    write(tmp_path / "set.xyz", frames)
    structures = read_structures(options(tmp_path / "set.xyz"))
    assert ["energy/stress" in s.labels for s in structures] == [True, False, False]


def test_labels_that_no_frame_has_are_simply_not_learned_by_default(tmp_path):
    atoms = molecule("H2O")
    atoms.info["energy"] = -1.0
    write(tmp_path / "set.xyz", atoms)
    (structure,) = read_structures(options(tmp_path / "set.xyz"))
    assert set(structure.labels) == {"energy"}


def test_switched_off_labels_are_not_read(tmp_path, labelled):
    frames, known = labelled
    as_calculator(frames, known)
    write(tmp_path / "set.xyz", frames)
    target = {"forces": False, "stress": "off"}
    structures = read_structures(options(tmp_path / "set.xyz", {"energy": target}))
    assert set(structures[0].labels) == {"energy"}


@pytest.mark.parametrize("label", ["forces", "stress", "virial"])
def test_labels_asked_for_that_no_frame_has(tmp_path, label):
    frames = crystals()
    for atoms in frames:
        atoms.info["energy"] = 0.0
    write(tmp_path / "set.xyz", frames)
    with pytest.raises(DataError, match=rf"{label} of target 'energy'.*3 of 3 frames lack it"):
        read_structures(options(tmp_path / "set.xyz", {"energy": {label: True}}))


@pytest.mark.parametrize(("energy", "told"), [(-1.0, False), (-9.0, True)])
def test_two_values_of_one_name_are_told_of(tmp_path, log, energy, told):
    atoms = Atoms("H")
    atoms.info["energy"] = energy
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((1, 3)))
    write(tmp_path / "a.traj", atoms)
    (found,) = read_structures(options(tmp_path / "a.traj"))
    assert found.labels["energy"].item() == energy
    assert ("1 of 1 frames have two different values" in log.text) == told


@pytest.mark.parametrize("key", ["stress", "my_stress"])
def test_a_stress_that_is_not_symmetric_is_told_of(tmp_path, log, key):
    atoms = bulk("Cu", cubic=True)
    frames = []
    for off in (0.0, 0.001, 0.2):
        one = atoms.copy()
        one.info["energy"] = 1.0
        one.info[key] = np.diag([1.0, 2.0, 3.0]) + [[0, off, 0], [0, 0, 0], [0, 0, 0]]
        frames.append(one)
    write(tmp_path / "set.xyz", frames, format="extxyz")
    target = {"energy": {"unit": "eV", "stress": {"key": key}}}
    structures = read_structures(options(tmp_path / "set.xyz", targets=target))
    assert "1 of 3 frames" in log.text
    assert "is no symmetric matrix" in log.text
    values = structures[2].labels["energy/stress"]
    assert values[0, 1] == values[1, 0] == pytest.approx(0.1)


def test_stress_asked_for_without_periodicity(tmp_path):
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, stress=np.zeros(6))
    write(tmp_path / "set.xyz", atoms)
    with pytest.raises(DataError, match=r"no frame .* periodic in all three"):
        read_structures(options(tmp_path / "set.xyz", {"energy": {"stress": True}}))


def test_wrong_energy_key_lists_what_is_there_and_the_nearest(tmp_path, labelled):
    frames, known = labelled
    as_entries(frames, known, "TotEnergy", "force", "sigma")
    frames[0].info["config_type"] = "bulk"
    write(tmp_path / "set.xyz", frames)
    with pytest.raises(DataError) as error:
        read_structures(options(tmp_path / "set.xyz"))
    message = str(error.value)
    assert "'energy' in" in message
    assert "frame 0" in message
    assert "3 of 3 frames lack it" in message
    for name in ("'TotEnergy'", "'force'", "'sigma'", "'config_type'"):
        assert name in message
    assert "Did you mean 'TotEnergy'?" in message


def test_wrong_forces_key_suggests_a_per_atom_array(tmp_path, labelled):
    frames, known = labelled
    as_entries(frames, known, "energy_forces", "DFT_forces", "sigma")
    write(tmp_path / "set.xyz", frames)
    target = {"key": "energy_forces", "forces": {"key": "forces"}}
    with pytest.raises(DataError, match=r"Did you mean 'DFT_forces'\?"):
        read_structures(options(tmp_path / "set.xyz", {"energy": target}))


def test_forces_under_another_name_are_not_overlooked(tmp_path, labelled, log):
    frames, known = labelled
    as_entries(frames, known, "E", "force", "sigma")
    write(tmp_path / "set.xyz", frames)
    read_structures(options(tmp_path / "set.xyz", {"energy": {"key": "E"}}))
    assert "has no 'forces'" in log.text
    assert "Did you mean 'force'?" in log.text


def test_a_virial_that_nobody_asked_for_is_not_overlooked(tmp_path, log):
    (atoms,) = crystals(1)
    atoms.info.update(energy=0.0, REF_virial=np.eye(3), number=10**400)
    write(tmp_path / "set.xyz", [atoms])
    read_structures(options(tmp_path / "set.xyz", {"energy": {}}))
    assert "Did you mean 'REF_virial'? Then write `virial: {key: ...}`" in log.text


def test_energy_missing_in_one_frame(tmp_path, labelled):
    frames, known = labelled
    as_calculator(frames, known)
    frames[1].calc.results.clear()
    write(tmp_path / "set.xyz", frames)
    with pytest.raises(DataError, match=r"frame 1 has no such value \(1 of 3"):
        read_structures(options(tmp_path / "set.xyz"))


# An energy that is NaN beside forces is no label: test_left_out.py.
@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("energy", np.inf),
        ("forces", np.nan),
        ("forces", np.inf),
        ("stress", np.nan),
        ("stress", np.inf),
    ],
)
def test_numbers_that_are_not_finite_name_their_frames(tmp_path, labelled, label, value):
    frames, known = labelled
    as_calculator(frames, known)
    for k in (0, 2):
        results = frames[k].calc.results
        results[label] = np.array(results[label], dtype=float)
        results[label].flat[-1] = value
        if label == "energy":
            results[label] = float(results[label])
    write(tmp_path / "set.traj", frames)
    with pytest.raises(DataError, match=r"NaN or infinite in frames 0, 2 of .*set\.traj"):
        read_structures(options(tmp_path / "set.traj"))


@pytest.mark.parametrize(
    ("entries", "target", "message"),
    [
        ({"E": "low"}, {"key": "E"}, "must be numbers, found 'low'"),
        ({"E": [1.0, 2.0]}, {"key": "E"}, r"shape \(2,\); expected one number"),
        ({"E": 1.0, "S": [1.0] * 7}, {"key": "E", "stress": {"key": "S"}}, r"\(7,\).*Voigt"),
    ],
)
def test_values_of_wrong_shape(tmp_path, entries, target, message):
    atoms = crystals(1)[0]
    atoms.info.update(entries)
    write(tmp_path / "set.xyz", atoms)
    with pytest.raises(DataError, match=message):
        read_structures(options(tmp_path / "set.xyz", {"energy": target}))


def test_forces_of_wrong_shape(tmp_path):
    atoms = crystals(1)[0]
    atoms.info["E"] = 1.0
    atoms.arrays["F"] = np.zeros((2, 2))
    write(tmp_path / "set.xyz", atoms)
    target = {"key": "E", "forces": {"key": "F"}}
    with pytest.raises(DataError, match=r"frame 0 .*\(2, 2\); expected one row of 3.*\(2, 3\)"):
        read_structures(options(tmp_path / "set.xyz", {"energy": target}))


def test_constraints_do_not_zero_forces(tmp_path, labelled):
    from ase.constraints import FixAtoms

    frames, known = labelled
    as_calculator(frames, known)
    for atoms in frames:
        atoms.set_constraint(FixAtoms([0]))
    write(tmp_path / "set.traj", frames)
    assert_labels(read_structures(options(tmp_path / "set.traj")), known)


def test_forces_that_constraints_set_to_zero_are_unknown(tmp_path, package_log):
    (atoms,) = crystals(1)
    atoms.info["energy"] = 0.0
    held = np.array([[0.0, 0.0, 0.0], [0.0, 0.2, 0.1]])
    balanced, chance = (
        np.array([[0.0, 0.2, 0.1], [0.0, -0.2, -0.1]]),
        held + [[0.0, 0.0, 0.1], [0, 0, 0]],
    )
    for forces, unknown in ((held, [True, False]), (balanced, [False] * 2), (chance, [False] * 2)):
        atoms.arrays["forces"] = forces
        write(tmp_path / "set.xyz", atoms)
        (structure,) = read_structures(options(tmp_path / "set.xyz"))
        found = structure.labels["energy/forces"]
        assert found.isnan().all(dim=1).tolist() == found.isnan().any(dim=1).tolist() == unknown
        assert ("constraints have set them to zero" in package_log.text) == any(unknown)
        package_log.clear()


def test_only_the_chosen_frames_are_read(tmp_path, labelled):
    frames, known = labelled
    as_calculator(frames, known)
    frames[0].calc.results["energy"] = np.nan
    write(tmp_path / "set.xyz", frames)
    structures = read_structures(options(tmp_path / "set.xyz", indices=[2, 1]))
    assert [s.index for s in structures] == [2, 1]
    assert_labels(structures, [known[2], known[1]])


def test_labels_from_other_files(tmp_path, labelled):
    frames, known = labelled
    write(tmp_path / "geometry.xyz", crystals())
    as_calculator(frames, known)
    write(tmp_path / "labels.xyz", frames)
    targets = {"energy": {"read_from": str(tmp_path / "labels.xyz")}}
    assert_labels(read_structures(options(tmp_path / "geometry.xyz", targets)), known)
    write(tmp_path / "labels.xyz", frames[:2])
    with pytest.raises(DataError, match=r"2 frames, but .* has 3"):
        read_structures(options(tmp_path / "geometry.xyz", targets))


def test_charge_and_multiplicity_from_named_places(tmp_path):
    frames = [molecule("OH"), molecule("H2O")]
    for k, atoms in enumerate(frames):
        atoms.info.update(energy=0.0, q=-k, mult=2 - k, charge=7)
    write(tmp_path / "set.xyz", frames)
    extra = {"charge": {"key": "q"}, "spin_multiplicity": {"key": "mult"}}
    structures = read_structures(options(tmp_path / "set.xyz", extra_data=extra))
    assert [(s.charge, s.spin) for s in structures] == [(0, 2), (-1, 1)]
    structures = read_structures(options(tmp_path / "set.xyz"))
    assert [(s.charge, s.spin) for s in structures] == [(7, 1), (7, 1)]


@pytest.mark.parametrize(("value", "message"), [(0.5, "must be an integer"), (None, "'q'")])
def test_unusable_charges(tmp_path, value, message):
    atoms = molecule("OH")
    atoms.info.update(energy=0.0)
    if value is not None:
        atoms.info["q"] = value
    write(tmp_path / "set.xyz", atoms)
    with pytest.raises(DataError, match=message):
        read_structures(options(tmp_path / "set.xyz", extra_data={"charge": {"key": "q"}}))


def test_several_targets_with_units_of_their_own(tmp_path):
    atoms = molecule("H2O")
    atoms.info.update(cheap=1.0, dear=2.0, gap=3.0)
    write(tmp_path / "set.xyz", atoms)
    targets = {
        "energy/cheap": {"key": "cheap", "unit": "Hartree"},
        "energy/dear": {"key": "dear"},
        "mtt::gap": {"quantity": "gap", "key": "gap", "unit": "Hartree"},
    }
    (structure,) = read_structures(options(tmp_path / "set.xyz", targets))
    values = {name: value.item() for name, value in structure.labels.items()}
    assert values == pytest.approx(
        {"energy/cheap": ase.units.Hartree, "energy/dear": 2.0, "mtt::gap": 3.0}
    )


def test_reserved_endings(tmp_path):
    atoms = molecule("H2O")
    atoms.info["energy"] = 0.0
    write(tmp_path / "set.xyz", atoms)
    with pytest.raises(DataError, match="are kept for the labels"):
        read_structures(options(tmp_path / "set.xyz", {"energy/forces": {"key": "energy"}}))


def test_unknown_unit(tmp_path):
    atoms = molecule("H2O")
    atoms.info["energy"] = 0.0
    write(tmp_path / "set.xyz", atoms)
    with pytest.raises(UnitError, match="evv"):
        read_structures(options(tmp_path / "set.xyz", {"energy": {"unit": "evv"}}))


@pytest.mark.parametrize(
    ("name", "count", "labels"),
    [
        ("3bpa_train_300K.xyz", 500, {"energy", "energy/forces"}),
        ("carbon_reduced_100.xyz", 100, {"energy", "energy/forces", "energy/stress"}),
        ("qm9_reduced_100_Eonly.xyz", 100, {"energy"}),
    ],
)
def test_real_sets_agree_with_ase(shared_dir, name, count, labels):
    import ase.io

    file = shared_dir / "data" / name
    structures = read_structures(DatasetOptions.model_validate(str(file)))
    assert len(structures) == count
    atoms = ase.io.read(file, index="7")
    assert set(structures[7].labels) == labels
    assert structures[7].labels["energy"].item() == atoms.get_potential_energy()
    if "energy/forces" in labels:
        np.testing.assert_array_equal(structures[7].labels["energy/forces"], atoms.get_forces())
    if "energy/stress" in labels:
        stress = atoms.get_stress(voigt=False)
        np.testing.assert_allclose(structures[7].labels["energy/stress"], stress, atol=1e-15)


def weighted(tmp_path, *of_atoms):
    """Three crystals with weights; the last one has none of its own."""
    frames = crystals()
    for k, atoms in enumerate(frames):
        atoms.calc = SinglePointCalculator(
            atoms, energy=-1.0, forces=np.ones((2, 3)), stress=np.eye(3)
        )
        atoms.arrays["of_atoms"] = np.array([of_atoms or (1.0, 0.25)]).reshape(2)
        if k < 2:
            atoms.info["config_weight"] = 1.0 + k
    write(tmp_path / "weighted.xyz", frames, format="extxyz")
    return tmp_path / "weighted.xyz"


def test_weights_of_structures_count_for_their_forces_and_stress(tmp_path):
    path = weighted(tmp_path)
    target = {"weight_key": "config_weight", "forces": {"weight_key": "of_atoms"}, "stress": "on"}
    found = read_structures(options(path, {"energy": target}))
    assert [float(s.labels["energy/weights"]) for s in found] == [1.0, 2.0, 1.0]
    assert [s.labels["energy/forces/weights"].tolist() for s in found] == [
        [1.0, 0.25], [2.0, 0.5], [1.0, 0.25],
    ]  # fmt: skip
    assert [float(s.labels["energy/stress/weights"]) for s in found] == [1.0, 2.0, 1.0]


def test_weights_that_are_not_used_are_told_of(tmp_path, log):
    log.set_level(logging.INFO, logger="pet_finetune")
    found = read_structures(options(weighted(tmp_path), {"energy": {"forces": "on"}}))
    assert not any(name.endswith("weights") for name in found[0].labels)
    assert "`weight_key: config_weight`" in log.text


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"weight_key": "of_atoms"}, "one number for the structure"),
        ({"weight_key": "confg_weight"}, "'confg_weight'.*Did you mean 'config_weight'"),
        ({"forces": {"weight_key": "of_atoms"}}, "must not be negative, found -1"),
    ],
)
def test_weights_that_mean_nothing_are_refused(tmp_path, target, message):
    path = weighted(tmp_path, -1.0, 1.0) if "forces" in target else weighted(tmp_path)
    with pytest.raises(DataError, match=message):
        read_structures(options(path, {"energy": {"forces": "on", **target}}))


def test_a_label_by_another_name_in_some_frames_is_told_of(tmp_path, labelled, log):
    frames, known = labelled
    as_calculator(frames, known)
    frames[1].arrays["force"] = frames[1].calc.results.pop("forces")
    frames[1].info["REF_energy"] = frames[1].calc.results.pop("energy")
    write(tmp_path / "set.xyz", frames)
    structures = read_structures(options(tmp_path / "set.xyz"))
    assert list(structures[1].labels) == ["energy/stress"]
    assert "In frame 1: Did you mean 'force'?" in log.text
    assert "In frame 1: Did you mean 'REF_energy'?" in log.text
