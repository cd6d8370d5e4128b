"""Each fault is found where it is, and structures without it are left in peace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk

from inspected import codes, frames, look, read, relabel, the, turned
from pet_finetune.data.structure import Structure
from pet_finetune.inspection.energy_checks import check_settings
from tiny_data import structures_of


def test_shipped_data_are_clean(molecules_of):
    inspection = look(
        molecules_of("train"), validation=molecules_of("val"), test=molecules_of("test")
    )
    assert codes(inspection) == set()


def test_crystals_are_clean(strained):
    assert not codes(look(strained), "error", "warning")


def _next(structures):
    """Each frame with the energy of the one before it."""
    return [
        relabel(one, energy=other.labels["energy"])
        for one, other in zip(structures, [*structures[-7:], *structures[:-7]], strict=True)
    ]


def _two_levels(structures):
    return [relabel(s, energy=s.labels["energy"] + k % 2) for k, s in enumerate(structures)]


@pytest.mark.parametrize("spoil", [_next, _two_levels])
def test_energies_of_other_frames_are_found(shared_dir, spoil):
    sound = read(shared_dir / "data" / "ethanol_pbe_train1000.xyz")[:80]
    assert "energies-apart" not in codes(look(sound))
    assert "energies-apart" in codes(look(spoil(sound)))


def _moved(structure: Structure, atom: int, to: int, distance: float) -> Structure:
    positions = structure.positions.clone()
    positions[atom] = positions[to] + torch.tensor([distance, 0.0, 0.0])
    return replace(structure, positions=positions)


def _net(structure: Structure) -> Structure:
    forces = structure.labels["energy/forces"]
    return relabel(structure, forces=forces + torch.tensor([0.1, 0.0, 0.0]))


def _torque(structure: Structure) -> Structure:
    """The forces in axes that are turned by 90 degrees about the positions'."""
    turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return relabel(structure, forces=structure.labels["energy/forces"] @ turn)


def _absurd(structure: Structure) -> Structure:
    forces = structure.labels["energy/forces"].clone()
    forces[0], forces[1] = forces[0] + 80.0, forces[1] - 80.0
    return relabel(structure, forces=forces)


#: What is done to frame 7, the code that must name it, and its severity.
SPOILED = {
    "close": (lambda s: _moved(s, 0, 1, 0.4), "close-atoms", "warning"),
    "on top": (lambda s: _moved(s, 0, 1, 0.0), "same-place", "error"),
    "gone": (lambda s: _moved(s, 0, 1, 30.0), "lonely-atoms", "note"),
    "compressed": (lambda s: _moved(s, 8, 2, 0.7), "compressed-bonds", "note"),
    "wrong energy": (
        lambda s: relabel(s, energy=s.labels["energy"] + 3.0),
        "energy-outliers",
        "warning",
    ),
    "zero forces": (
        lambda s: relabel(s, forces=torch.zeros(s.num_atoms, 3)),
        "zero-forces",
        "warning",
    ),
    "fixed atoms": (
        lambda s: relabel(
            s, forces=s.labels["energy/forces"].index_fill(0, torch.tensor([0]), torch.nan)
        ),
        "fixed-atoms",
        "warning",
    ),
    "no forces": (lambda s: relabel(s, forces=None), "partial-forces", "note"),
    "net force": (_net, "net-force", "warning"),
    "torque": (_torque, "net-torque", "warning"),
    "absurd": (_absurd, "absurd-forces", "warning"),
    "charged": (lambda s: replace(s, charge=1), "unused-charge", "warning"),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_frame_is_found(molecules_of, name):
    spoil, code, severity = SPOILED[name]
    structures = molecules_of("train")
    structures[7] = spoil(structures[7])
    found = the(look(structures), code)
    assert frames(found) == [7]
    assert found.severity == severity
    assert found.where[0].file.endswith("molecules_pbe0_train.xyz")
    assert found.why
    assert found.advice


def test_zero_forces_of_a_perfect_crystal_are_right(strained):
    perfect = replace(
        strained[0],
        positions=torch.tensor(bulk("Cu", cubic=True).positions),
        cell=torch.tensor(bulk("Cu", cubic=True).cell.array),
    )
    strained[0] = relabel(perfect, forces=torch.zeros(4, 3))
    assert "zero-forces" not in codes(look(strained))
    strained[1] = relabel(strained[1], forces=torch.zeros(4, 3))
    assert frames(the(look(strained), "zero-forces")) == [1]


def test_zero_stress(strained):
    strained[3] = relabel(strained[3], stress=torch.zeros(3, 3))
    assert frames(the(look(strained), "zero-stress")) == [3]


def test_constant_energies(molecules_of):
    structures = [relabel(s, energy=0.0) for s in molecules_of("val")]
    assert "constant-energy" in codes(look(structures), "warning")


def test_energies_only(molecules_of):
    structures = [relabel(s, forces=None) for s in molecules_of("val")]
    assert "energies-only" in codes(look(structures), "note")


def test_a_single_composition(molecules_of):
    ethanol = [s for s in molecules_of("train") if s.num_atoms == 9]
    assert "single-composition" in codes(look(ethanol), "note")


def test_relaxed_structures(strained):
    rng = np.random.default_rng(0)
    noise = [torch.from_numpy(0.004 * rng.normal(size=(s.num_atoms, 3))) for s in strained]
    cold = [relabel(s, energy=None, forces=f) for s, f in zip(strained, noise, strict=True)]
    assert "relaxed-structures" in codes(look(cold), "note")
    assert "relaxed-structures" not in codes(look(strained))


def test_mixed_periodicity(molecules_of):
    structures = molecules_of("val")
    box = torch.eye(3, dtype=torch.float64) * 20.0
    structures[4] = replace(structures[4], cell=box, pbc=torch.ones(3, dtype=torch.bool))
    assert frames(the(look(structures), "mixed-periodicity")) == [4]


def test_files_of_different_levels(molecules_of):
    """Another level of theory moves the baselines of the elements, here by 0.5 eV an atom."""
    other = [relabel(s, energy=s.labels["energy"] + 0.5 * s.num_atoms) for s in molecules_of("val")]
    found = the(look(molecules_of("train"), validation=other), "mixed-levels")
    assert found.where[0].file.endswith("val.xyz")
    assert found.data["shift"] == pytest.approx(0.5, abs=0.02)


def test_levels_within_a_file(molecules_of):
    structures = molecules_of("train")
    for index in range(0, 92, 6):
        s = structures[index]
        structures[index] = relabel(s, energy=s.labels["energy"] + 1.0 * s.num_atoms)
    assert frames(the(look(structures), "mixed-levels")) == list(range(0, 92, 6))


class TestDuplicates:
    """Copies, whatever they look like."""

    @pytest.mark.parametrize("noise", [0.0, 0.002], ids=["exact", "near"])
    def test_leaked_frames(self, molecules_of, noise):
        rng = np.random.default_rng(0)
        leaked = []
        for seed, structure in enumerate(molecules_of("train")[20:25]):
            copy = turned(structure, seed)
            moved = copy.positions + torch.tensor(noise * rng.normal(size=copy.positions.shape))
            leaked.append(replace(copy, positions=moved, index=100 + seed, source="val.xyz"))
        validation = [*molecules_of("val"), *leaked]
        found = the(look(molecules_of("train"), validation=validation), "leak")
        assert frames(found) == [100, 101, 102, 103, 104]
        assert found.data["exact"] == (5 if noise == 0.0 else 0)

    def test_copies_within_a_set(self, molecules_of):
        structures = molecules_of("train")
        structures += [replace(turned(s), index=200 + s.index) for s in structures[:4]]
        assert frames(the(look(structures), "duplicates")) == [200, 201, 202, 203]

    def test_copies_with_other_labels(self, molecules_of):
        structures = molecules_of("train")
        copy = replace(turned(structures[5]), index=205)
        structures.append(relabel(copy, energy=copy.labels["energy"] + 0.1))
        assert frames(the(look(structures), "contradictory-labels")) == [5, 205]

    def test_orderings_of_an_alloy_are_no_copies(self):
        """They share one lattice, and all distances with it."""
        lattice = bulk("Cu", cubic=True) * (2, 1, 1)
        alloys = []
        for silver in ((0, 1), (0, 4)):  # neighbours, and second neighbours
            atoms = lattice.copy()
            atoms.numbers[list(silver)] = 47
            alloys.append(atoms)
        made = structures_of(alloys)
        assert not codes(look([*made])) & {"duplicates", "contradictory-labels"}
        again = replace(made[0], index=2)
        assert frames(the(look([*made, again]), "duplicates")) == [2]

    def test_far_fragments_are_compared_whole(self, molecules_of):
        """Two molecules 20 A and 21 A apart look the same from near."""
        pairs = []
        one, two = molecules_of("val")[:2]
        for index, distance in enumerate((20.0, 21.0)):
            positions = torch.cat([one.positions, two.positions + distance])
            both = replace(
                one,
                index=index,
                numbers=torch.cat([one.numbers, two.numbers]),
                positions=positions,
                labels={"energy": torch.tensor(-1.0 * index, dtype=torch.float64)},
            )
            pairs.append(both)
        assert not codes(look(pairs)) & {"duplicates", "contradictory-labels"}


#: Warnings that each set deserves (its README says why); none has an error.
SETS = {
    "3bpa_test_300K": set(),
    "LiMnO_val": {"units-unchecked"},  # relaxed, and energies that scatter
    "carbon_reduced_100": set(),
    "ethanol_reduced_100": set(),
    "mattersim_mpf_alkali_TP": set(),
    "mlearn_Ge_train": {"duplicates"},
    "qm9_reduced_100_Eonly": set(),
    "water_dpmd_val": {"net-force"},
    "water_revPBE0D3_train30": {"net-force"},
}


NOTES = {
    "3bpa_test_300K": {"single-composition"},
    "qm9_reduced_100_Eonly": {"energies-only"},
    "water_revPBE0D3_train30": {"single-composition", "compressed-bonds"},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", SETS)
def test_known_faults_and_no_others(shared_dir, name):
    inspection = look(read(shared_dir / "data" / f"{name}.xyz"))
    assert codes(inspection, "error") == set()
    assert codes(inspection, "warning") == SETS[name]
    assert codes(inspection, "note") >= NOTES.get(name, set())


def test_calculations_with_different_settings():
    ours, theirs = {"ENCUT": "520", "potential of Fe": "PAW_PBE Fe"}, {"ENCUT": "400"}
    (finding,) = check_settings({"a": ours, "b": theirs, "c": ours})
    assert finding.code == "mixed-settings"
    assert "ENCUT: 520 (2 files), 400 (1 file)" in finding.what
    assert [place.file for place in finding.where] == ["b"]
    assert not list(check_settings({"a": ours, "b": {"ENCUT": "520"}}))
