"""Labels of targets that are no energies: reading, collating, rotating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.epochs import random_rotations, rotate_batch
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.readers import read_structures
from pet_finetune.data.structure import Structure
from pet_finetune.errors import DataError
from pet_finetune.units import to_own_unit

VECTOR, TENSOR = ({"cartesian": {"rank": rank}} for rank in (1, 2))
NO_ENERGY = {"quantity": "y"}
ATOMS = {"sample_kind": "atom"}
RNG = np.random.default_rng(3)
WATER, SILICON = molecule("H2O"), bulk("Si")
#: Options of a target, its value in a file (of a water molecule) and the shape it is kept in.
FORMS: dict[str, tuple[dict[str, Any], np.ndarray, tuple[int, ...]]] = {
    "scalar": ({}, RNG.normal(size=()), ()),
    "scalars": ({"num_subtargets": 2}, RNG.normal(size=2), (2,)),
    "of atoms": (ATOMS, RNG.normal(size=3), (3,)),
    "several of atoms": ({**ATOMS, "num_subtargets": 2}, RNG.normal(size=(3, 2)), (3, 2)),
    "vector": ({"type": VECTOR}, RNG.normal(size=3), (3,)),
    "vectors of atoms": ({**ATOMS, "type": VECTOR}, RNG.normal(size=(3, 3)), (3, 3)),
    "tensor": ({"type": TENSOR}, RNG.normal(size=(3, 3)), (3, 3)),
    "tensors of atoms, flat": ({**ATOMS, "type": TENSOR}, RNG.normal(size=(3, 9)), (3, 3, 3)),
    "several vectors": (
        {**ATOMS, "type": VECTOR, "num_subtargets": 2}, RNG.normal(size=(3, 6)), (3, 3, 2),
    ),
}  # fmt: skip


def labelled(atoms: Atoms, value: np.ndarray | float, per_atom: bool) -> Atoms:
    atoms = atoms.copy()
    if per_atom:
        atoms.arrays["y"] = np.asarray(value)
    else:
        atoms.info["y"] = value if np.ndim(value) else float(value)
    return atoms


def read(folder: Path, frames: list[Atoms], name: str = "y", **target: Any) -> list[Structure]:
    path = folder / "set.xyz"
    ase.io.write(path, frames, format="extxyz")
    return read_structures(
        DatasetOptions.model_validate(
            {"systems": str(path), "targets": {name: {"key": "y", **target}}}
        )
    )


@pytest.mark.parametrize("form", FORMS)
def test_values_are_read_in_the_shape_of_their_target(tmp_path: Path, form: str) -> None:
    target, value, shape = FORMS[form]
    frame = labelled(WATER, value, ATOMS.items() <= target.items())
    (structure,) = read(tmp_path, [frame], **target)
    assert structure.labels["y"].shape == shape
    kept = structure.labels["y"].numpy().reshape(value.shape)
    np.testing.assert_allclose(kept, value, atol=1e-7)  # the file has eight digits


@pytest.mark.parametrize(
    ("name", "unit", "quantity"),
    [
        ("non_conservative_forces", "Hartree/Bohr", "force"),
        ("non_conservative_force/pbe", "kcal/mol/A", "force"),
        ("shift", "meV", "energy"),
        ("bond", "Bohr", "length"),
    ],
)
def test_units_are_converted(tmp_path: Path, name: str, unit: str, quantity: str) -> None:
    per_atom = quantity == "force"
    value = np.ones((3, 3)) if per_atom else np.ones(())
    given = {} if per_atom else {"quantity": quantity, "forces": False, "stress": False}
    (structure,) = read(tmp_path, [labelled(WATER, value, per_atom)], name, unit=unit, **given)
    factor = to_own_unit(quantity, unit)
    assert factor != 1.0
    assert structure.labels[name].flatten()[0].item() == pytest.approx(factor, rel=1e-14)


def test_a_direct_stress_may_be_in_voigts_order_and_counts_where_there_is_a_volume(
    tmp_path: Path,
) -> None:
    voigt = np.array([1.0, 2, 3, 4, 5, 6])
    frames = [labelled(atoms, voigt, False) for atoms in (SILICON, WATER)]
    solid, gas = read(tmp_path, frames, "non_conservative_stress", unit="GPa")
    expected = np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3]]) * to_own_unit("pressure", "GPa")
    np.testing.assert_allclose(solid.labels["non_conservative_stress"].numpy(), expected)
    assert not gas.labels
    with pytest.raises(DataError, match=r"no frame of .* is periodic .* Leave the target out"):
        read(tmp_path, frames[1:], "non_conservative_stress")


def test_unknown_values_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    charges = np.array([0.1, np.nan, 0.3])
    frames = [labelled(WATER, charges, True), WATER, labelled(WATER, charges * np.nan, True)]
    with caplog.at_level("INFO"):
        some, none, unknown = read(tmp_path, frames, **ATOMS)
    np.testing.assert_array_equal(some.labels["y"].numpy(), charges)
    assert not none.labels
    assert not unknown.labels
    assert "1 of 3 frames have the values of target 'y'" in caplog.text
    pairs = [(s, structure_neighbors(s, 3.0)) for s in (none, some)]
    batch = collate(pairs, torch.float32)
    assert batch.labels["y"].shape == (6,)
    assert batch.labels["y"].dtype == torch.float64
    assert batch.labels["y"].isnan().tolist() == [True] * 3 + [False, True, False]


@pytest.mark.parametrize(
    ("target", "value", "per_atom", "message"),
    [
        (
            NO_ENERGY,
            np.ones(3),
            True,
            "should be a scalar for each structure, but 'y' .* values of atoms",
        ),
        ({"type": VECTOR}, np.ones(3), True, "should be a vector for each structure"),
        (NO_ENERGY, np.ones(3), False, r"shape \(3,\); expected one number .* `sample_kind: atom`"),
        (ATOMS, np.float64(1.0), False, r"shape \(\); expected .* `sample_kind: system`"),
        ({**ATOMS, "type": VECTOR}, np.ones(3), True, r"expected 3 numbers for each atom"),
        ({}, np.inf, False, "are NaN or infinite in frame 0"),
        ({"key": "yy"}, np.float64(1.0), False, "has no such value .* Did you mean 'y'"),
    ],
)
def test_values_of_another_form(
    tmp_path: Path, target: dict[str, Any], value: Any, per_atom: bool, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [labelled(WATER, value, per_atom)], **target)


def test_direct_forces_are_no_energy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shape \(\); expected 3 numbers for each atom"):
        read(tmp_path, [labelled(WATER, np.float64(1.0), False)], "non_conservative_forces")


@pytest.mark.parametrize("form", FORMS)
def test_labels_turn_with_the_structure(tmp_path: Path, form: str) -> None:
    target, value, _ = FORMS[form]
    per_atom = ATOMS.items() <= target.items()
    frames = [labelled(WATER, value, per_atom), labelled(WATER, 2 * value, per_atom)]
    structures = read(tmp_path, frames, **target)
    batch = collate([(s, structure_neighbors(s, 3.0)) for s in structures], torch.float64)
    rotations = random_rotations(2, torch.Generator().manual_seed(0))
    found = rotate_batch(batch, rotations).labels["y"].numpy()
    rank = target["type"]["cartesian"]["rank"] if "type" in target else 0
    rows = batch.graph.structure_index if per_atom else torch.arange(2)
    for row, (before, after) in enumerate(zip(batch.labels["y"].numpy(), found, strict=True)):
        matrix = rotations[rows[row]].numpy()
        subtargets = before.reshape(*(3,) * rank, -1)
        rotated = np.stack(
            [
                y if rank == 0 else matrix @ y if rank == 1 else matrix @ y @ matrix.T
                for y in np.moveaxis(subtargets, -1, 0)
            ],
            axis=-1,
        )
        np.testing.assert_allclose(after.reshape(rotated.shape), rotated, atol=1e-13)
    assert np.array_equal(found, batch.labels["y"].numpy()) == (rank == 0)
