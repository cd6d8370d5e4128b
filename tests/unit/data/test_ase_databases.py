"""Structures from memory arrive bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.data.ase_databases import write_exact
from pet_finetune.data.frame_files import read_frames
from pet_finetune.errors import DataError


def frame(seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms("H2O", rng.normal(size=(3, 3)), cell=rng.normal(size=(3, 3)), pbc=(1, 0, 1))
    atoms.info = {"REF_energy": rng.normal() * 1e4, "charge": np.int64(-1), "name": "a b=c",
                  "REF_stress": rng.normal(size=(3, 3)), "flag": np.True_}  # fmt: skip
    atoms.arrays["REF_forces"] = rng.normal(size=(3, 3))
    atoms.arrays["charges/x"] = rng.normal(size=3).astype(np.float32)
    atoms.set_initial_charges(rng.normal(size=3))
    results = {"energy": rng.normal() * 1e5, "forces": rng.normal(size=(3, 3)),
               "stress": rng.normal(size=6), "free_energy": rng.normal()}  # fmt: skip
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.calc.results["my_dipole"] = rng.normal(size=3)
    return atoms


def same(one: object, two: object) -> bool:
    a, b = np.asarray(one), np.asarray(two)
    return a.shape == b.shape and a.dtype.kind == b.dtype.kind and a.tobytes() == b.tobytes()


def test_everything_comes_back_bit_for_bit(tmp_path):
    frames = [frame(seed) for seed in range(3)]
    write_exact(tmp_path / "a.db", frames)
    back = read_frames(tmp_path / "a.db")
    assert len(back) == 3
    for old, new in zip(frames, back, strict=True):
        assert same(old.positions, new.positions)
        assert same(old.cell.array, new.cell.array)
        assert same(old.pbc, new.pbc)
        assert set(new.info) == set(old.info)
        assert all(same(old.info[name], new.info[name]) for name in old.info)
        assert set(new.arrays) == set(old.arrays)
        assert all(same(old.arrays[name], new.arrays[name]) for name in old.arrays)
        assert set(new.calc.results) == set(old.calc.results)
        assert all(same(old.calc.results[k], new.calc.results[k]) for k in old.calc.results)


def test_labels_in_tensors_are_numbers(tmp_path):
    atoms = frame()
    forces = torch.tensor(atoms.calc.results["forces"], requires_grad=True)
    atoms.calc.results.update(energy=torch.tensor(-3.25, requires_grad=True), forces=forces)
    write_exact(tmp_path / "a.db", [atoms])
    (back,) = read_frames(tmp_path / "a.db")
    assert back.calc.results["energy"] == -3.25
    assert same(back.calc.results["forces"], forces.detach())


def test_one_object_several_times_is_warned_of(tmp_path, caplog):
    one = frame()
    write_exact(tmp_path / "a.db", [one, frame(1)])
    assert not caplog.text
    write_exact(tmp_path / "a.db", [one, frame(1), one])
    assert "1 of 3 structures are the same object as an earlier one" in caplog.text


def test_results_of_another_structure_are_refused(tmp_path):
    atoms = frame()
    atoms.positions[0] += 1e-3
    with pytest.raises(DataError, match=r"structure 1: .*positions differ.*SinglePointCalculator"):
        write_exact(tmp_path / "a.db", [frame(), atoms])
    assert not (tmp_path / "a.db").exists()


def test_nothing_is_computed(tmp_path):
    atoms = Atoms("Cu", [[0, 0, 0]])
    atoms.calc = EMT()
    write_exact(tmp_path / "a.db", [atoms])
    assert read_frames(tmp_path / "a.db")[0].calc is None


def test_what_no_file_can_hold_is_left_out(tmp_path):
    atoms = frame()
    atoms.info["object"] = object()
    write_exact(tmp_path / "a.db", [atoms])
    (back,) = read_frames(tmp_path / "a.db")
    assert "object" not in back.info
    assert same(back.info["REF_energy"], atoms.info["REF_energy"])


@pytest.mark.parametrize(
    ("given", "why"), [([], "empty"), (["a.xyz"], "expected ase.Atoms, got str")]
)
def test_what_are_no_structures(tmp_path, given, why):
    with pytest.raises(DataError, match=why):
        write_exact(tmp_path / "a.db", given)
