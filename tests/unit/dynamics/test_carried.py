"""All that a structure carries comes through the files of a simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedMode,
    FixedPlane,
    FixInternals,
    FixLinearTriatomic,
    FixScaled,
    FixSubsetCom,
    Hookean,
)
from ase.io.jsonio import encode

from models import crystal, ethanol
from pet_finetune.dynamics.carried import carried, from_ase
from pet_finetune.dynamics.md_files import START, MDFiles
from pet_finetune.errors import DataError


def plain_constraints(atoms: Atoms) -> Any:
    return json.loads(encode([constraint.todict() for constraint in atoms.constraints]))


ARRAYS: dict[str, np.ndarray] = {
    "masses": np.linspace(1.5, 20.0, 9),
    "tags": np.arange(9),
    "initial_charges": np.linspace(-1, 1, 9),
    "initial_magmoms": np.linspace(-1, 1, 9),
    "vector_magmoms": np.linspace(-1, 1, 27).reshape(9, 3),
    "fragment": np.array(list("abcdefghi")),
    "is_core": np.arange(9) % 2 == 0,
    "ids": np.arange(9, dtype=np.int32) + 1000,
}
#: What extended XYZ cannot hold.
AWKWARD: dict[str, np.ndarray] = {
    "tensors": np.arange(81.0).reshape(9, 3, 3),
    "unsigned": np.arange(9, dtype=np.uint8),
    "residue name": np.array(["two words"] * 9),
    "tiny": np.full(9, 1e-12),
    "phase": np.arange(9) * 1j,
}
INFO: dict[str, Any] = {
    "charge": -1,
    "spin": 2,
    "config_type": "liquid water",
    "weight": 0.1 + 0.2,
    "ok": True,
    "no": False,
    "quoted": 'say "hi" {now}',
    "lines": "one\ntwo",
    "number_as_text": "5",
    "letter": "T",
    "empty": "",
    "nothing": None,
    "list": [1, 2, 3],
    "floats": np.array([1.5, 2.5]),
    "matrix": np.arange(6.0).reshape(2, 3),
    "nested": {"a": [1, {"b": None}], "c": "d"},
    "unicode": "Wärme und Å",
    "key with spaces": 1,
    "path": "C:\\data\\new",
}
CONSTRAINTS = [
    [FixAtoms([0, 3])],
    [FixCartesian([1, 2], [True, False, True])],
    [FixAtoms([0]), FixCartesian([1, 2], [True, False, True])],
    [FixBondLengths([[0, 1], [1, 2]])],
    [FixCom()],
    [FixSubsetCom([1, 2, 3])],
    [FixedPlane([0, 1], [0, 0, 1])],
    [FixedLine([0, 1], [0, 3, 4])],
    [FixedMode(np.eye(9, 3))],
    [FixInternals(bonds=[[1.5, [0, 1]]], angles_deg=[[109.0, [0, 1, 2]]])],
    [FixLinearTriatomic([[0, 1, 2]])],
    [FixScaled([0], [True, False, False])],
    [Hookean(0, 1, k=5.0, rt=1.2)],
    [Hookean(0, (0.0, 1.0, 2.0), k=5.0)],
    [Hookean(0, (0.0, 0.0, 1.0, -3.0), k=5.0)],
    [FixAtoms([4]), FixBondLengths([[0, 1]]), Hookean(2, 3, k=1.0, rt=2.0)],
]


def full(**arrays: np.ndarray) -> Atoms:
    """A structure with everything."""
    atoms = ethanol()
    atoms.set_cell([[5.0, 0, 0], [1, 6, 0], [0, 0, 7]])
    atoms.pbc = [True, False, True]
    atoms.set_momenta(np.linspace(-3, 3, 27).reshape(9, 3) / 7)
    for name, array in arrays.items():
        atoms.set_array(name, array)
    atoms.info = dict(INFO)
    return atoms


def check_same(found: Atoms, expected: Atoms, atol: float) -> None:
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].shape == array.shape
        if array.dtype.kind in "fc":
            np.testing.assert_allclose(found.arrays[name], array, rtol=0, atol=atol)
        else:
            np.testing.assert_array_equal(found.arrays[name], array)
            if atol == 0:
                assert found.arrays[name].dtype == array.dtype
    np.testing.assert_allclose(found.cell.array, expected.cell.array, rtol=0, atol=atol)
    np.testing.assert_array_equal(found.pbc, expected.pbc)
    assert found.info.keys() == expected.info.keys()
    for key, value in expected.info.items():
        np.testing.assert_equal(np.asarray(found.info[key]), np.asarray(value))
    assert plain_constraints(found) == plain_constraints(expected)


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda c: type(c[0]).__name__)
def test_a_frame_comes_back_from_extended_xyz(constraints, tmp_path: Path) -> None:
    atoms = full(**ARRAYS)
    atoms.set_constraint(constraints)
    path = tmp_path / "frame.xyz"
    files = MDFiles(tmp_path)
    files.write_frames(path.name, [files.frame(atoms)])
    found = from_ase(ase.io.read(path), str(path))
    check_same(found, atoms, atol=1.1e-8)


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda c: type(c[0]).__name__)
def test_the_start_comes_back_whole(constraints, tmp_path: Path) -> None:
    atoms = full(**ARRAYS, **AWKWARD, REF_forces=np.ones((9, 3)))
    atoms.info["REF_energy"] = -1.0
    atoms.set_celldisp([[1.0], [2.0], [3.0]])
    atoms.set_constraint(constraints)
    files = MDFiles(tmp_path)
    for _ in range(2):  # a restart writes it again
        files.write_start(atoms, {})
        found, _settings = files.read_start()
        check_same(found, atoms, atol=0.0)
        np.testing.assert_array_equal(found.get_celldisp(), atoms.get_celldisp())
    # ASE alone reads what decides the dynamics.
    np.testing.assert_array_equal(ase.io.read(tmp_path / START).get_masses(), atoms.get_masses())


def test_labels_of_the_start_are_not_written_beside_other_geometries(caplog, tmp_path) -> None:
    atoms = full(REF_forces=np.ones((9, 3)), magmoms=np.ones(9), groups=np.arange(9))
    atoms.info |= {"REF_energy": -1.0, "dft_stress": np.eye(3), "E": 5.0, "step": 3, "Einstein": 1}
    out, left = carried(atoms)
    assert {*left} == {"REF_forces", "magmoms", "REF_energy", "dft_stress", "E"}
    assert "groups" in out.arrays
    assert "Einstein" in out.info
    with caplog.at_level("INFO"):
        files = MDFiles(tmp_path)
        files.frame(atoms)
        files.frame(atoms)
    assert caplog.text.count("are not written into the frames") == 1


def test_what_extended_xyz_cannot_hold_is_named_and_not_damaged(tmp_path: Path) -> None:
    atoms = full(**ARRAYS, **AWKWARD)
    atoms.info["object"] = object()
    out, left = carried(atoms)
    assert {*left} == {*AWKWARD, "object"}
    ase.io.write(tmp_path / "a.xyz", out, format="extxyz")
    assert len(ase.io.read(tmp_path / "a.xyz")) == 9


@pytest.mark.parametrize("name", ["mass", "masses", "atomic_masses"])
def test_a_column_of_masses_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mass.xyz"
    path.write_text(
        f"3\nProperties=species:S:1:pos:R:3:{name}:R:1\n"
        "O 0 0 0.1 15.999\nH 0 0.76 -0.47 2.014\nH 0 -0.76 -0.47 2.014\n"
    )
    atoms = from_ase(ase.io.read(path), str(path))
    np.testing.assert_array_equal(atoms.get_masses(), [15.999, 2.014, 2.014])
    assert "mass" not in atoms.arrays


@pytest.mark.parametrize("mass", ["3671.5", "-2", "0", "nan", "3.3e-27"])
def test_masses_that_no_atom_has_are_refused(tmp_path: Path, mass: str) -> None:
    path = tmp_path / "mass.xyz"
    path.write_text(f"1\nProperties=species:S:1:pos:R:3:mass:R:1\nH 0 0 0 {mass}\n")
    with pytest.raises(DataError, match=r"atom 0 \(H\) has the mass .* convert them"):
        from_ase(ase.io.read(path), str(path))


def test_velocities_in_a_column_of_unknown_unit_are_no_silent_part_of_frames(caplog) -> None:
    atoms = ethanol()
    atoms.set_array("velo", np.ones((9, 3)))
    assert "velo" in from_ase(atoms, "a.xyz").arrays
    assert "'velo' does not say its unit" in caplog.text
    out, left = carried(atoms)
    assert ("velo" in out.arrays, left) == (False, ["velo"])


def test_constraints_of_single_coordinates_are_gathered() -> None:
    atoms = crystal()
    mask = [True, False, False]
    atoms.set_constraint(
        [FixCartesian(i, mask) for i in range(2)]
        + [FixCartesian(2, [True] * 3), FixCartesian(3, [False] * 3)]
    )
    found = plain_constraints(from_ase(atoms, "x"))
    assert found == plain_constraints(
        Atoms(atoms, constraint=[FixAtoms([2]), FixCartesian([0, 1], mask)])
    )


def test_damaged_constraints_are_named() -> None:
    atoms = crystal()
    atoms.info["constraints"] = [{"name": "FixNothing", "kwargs": {}}]
    with pytest.raises(DataError, match="cannot be made"):
        from_ase(atoms, "start.xyz")
