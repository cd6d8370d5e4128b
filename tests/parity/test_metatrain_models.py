"""Our PET against metatrain's: the same random weights, through metatrain's own checkpoints.

The rows of the table cover every pair of values of any two hyperparameters.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.model.potential import Potential
from pet_finetune.units import energy_to_ev

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from metatrain_models import CUTOFF, Reference, random_model, reference, save, structures

COLUMNS = (
    "transformer_type", "normalization", "activation", "featurizer_type", "cutoff_function",
    "adaptive_cutoff_method", "d_node", "num_gnn_layers", "num_attention_layers",
    "attention_temperature", "zbl", "system_conditioning", "num_targets",
)  # fmt: skip
# A method of None stands for one cutoff for all atoms; d_pet is 16.
ROWS = (
    ("PreLN", "RMSNorm", "SwiGLU", "feedforward", "Bump", None, 16, 1, 1, 1.0, False, False, 1),
    ("PostLN", "LayerNorm", "SiLU", "residual", "Cosine", "solver", 24, 1, 2, 0.7, True, True, 2),
    ("PreLN", "LayerNorm", "SiLU", "residual", "Cosine", "grid", 16, 2, 2, 1.0, False, False, 1),
    ("PostLN", "RMSNorm", "SwiGLU", "feedforward", "Bump", "grid", 24, 3, 1, 0.7, True, True, 2),
    ("PostLN", "RMSNorm", "SwiGLU", "feedforward", "Cosine", None, 24, 2, 2, 1.0, True, True, 1),
    ("PreLN", "LayerNorm", "SiLU", "feedforward", "Bump", "solver", 16, 3, 1, 0.7, False, False, 2),
    ("PostLN", "LayerNorm", "SwiGLU", "residual", "Cosine", None, 24, 3, 1, 0.7, False, False, 1),
    ("PreLN", "RMSNorm", "SwiGLU", "residual", "Bump", "solver", 16, 2, 1, 1.0, True, True, 2),
    ("PostLN", "RMSNorm", "SiLU", "feedforward", "Bump", None, 16, 3, 2, 1.0, True, False, 2),
    ("PreLN", "RMSNorm", "SwiGLU", "feedforward", "Bump", "solver", 24, 2, 1, 0.7, False, True, 1),
    ("PreLN", "RMSNorm", "SwiGLU", "feedforward", "Bump", "grid", 16, 1, 1, 1.0, False, False, 1),
    # What upet's models are like, and the first PET: widths apart, several layers.
    ("PreLN", "RMSNorm", "SwiGLU", "feedforward", "Bump", "solver", 24, 3, 2, 1.0, True, True, 2),
    ("PostLN", "LayerNorm", "SiLU", "residual", "Cosine", None, 16, 2, 1, 1.0, False, False, 1),
    ("PreLN", "LayerNorm", "SwiGLU", "residual", "Bump", "grid", 24, 3, 2, 0.7, True, False, 2),
    (
        "PostLN",
        "LayerNorm",
        "SwiGLU",
        "feedforward",
        "Cosine",
        "grid",
        16,
        2,
        2,
        0.7,
        True,
        True,
        1,
    ),
    ("PreLN", "LayerNorm", "SiLU", "residual", "Bump", None, 24, 1, 1, 1.0, True, True, 2),
)

#: eV/atom, eV/angstrom and eV/angstrom^3.
TOLERANCES = {
    torch.float64: {"energy": 1e-9, "forces": 1e-8, "stress": 1e-9},
    torch.float32: {"energy": 1e-5, "forces": 1e-4, "stress": 1e-5},
}


def hypers_of(row: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A row of the table as metatrain's hyperparameters and the names of its targets."""
    hypers = dict(zip(COLUMNS, row, strict=True))
    targets = ("energy", "mtt::other_level")[: hypers.pop("num_targets")]
    if hypers["adaptive_cutoff_method"] is None:
        del hypers["adaptive_cutoff_method"]
    else:
        hypers["num_neighbors_adaptive"] = 5.0
    return hypers, targets


@lru_cache(maxsize=1)
def metatrain_model(row: int) -> Any:
    """The model of a row; both precisions of a row use it one after the other."""
    hypers, targets = hypers_of(ROWS[row])
    return random_model(row, targets, **hypers)


def deviations(
    model: Potential,
    frames: list[ase.Atoms],
    dtype: torch.dtype,
    target: str,
    expected: Reference,
    factor: float = 1.0,
) -> dict[str, float]:
    """Largest differences over the frames: eV/atom, eV/angstrom, eV/angstrom^3."""
    batch = batch_from_atoms(frames, model.cutoff, dtype)
    prediction = model.predict(batch, target, stress=True)
    energies = prediction.energy.numpy() - factor * expected.energies
    forces = prediction.forces.double().numpy() - factor * np.concatenate(expected.forces)
    stress = prediction.stress.double().numpy() - factor * np.stack(expected.stresses)
    return {
        "energy": float(np.abs(energies / [len(atoms) for atoms in frames]).max()),
        "forces": float(np.abs(forces).max()),
        "stress": float(np.abs(stress).max()),
    }


def check(found: dict[str, float], dtype: torch.dtype, what: str) -> None:
    print(what, {name: f"{value:.1e}" for name, value in found.items()})
    for name, limit in TOLERANCES[dtype].items():
        assert found[name] <= limit, f"{what}: {name} differs by {found[name]:.2e} > {limit:.0e}"


def test_the_rows_cover_every_pair_of_values():
    seen = {
        (a, str(row[a]), b, str(row[b]))
        for row in ROWS
        for a, b in itertools.combinations(range(len(COLUMNS)), 2)
    }
    values = [{str(row[column]) for row in ROWS} for column in range(len(COLUMNS))]
    for a, b in itertools.combinations(range(len(COLUMNS)), 2):
        for x, y in itertools.product(values[a], values[b]):
            assert (a, x, b, y) in seen, f"{COLUMNS[a]}={x} never meets {COLUMNS[b]}={y}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_predictions_are_metatrains(row: int, dtype: torch.dtype, tmp_path: Path):
    oracle = metatrain_model(row).to(dtype)
    hypers, targets = hypers_of(ROWS[row])
    model = load_checkpoint(save(oracle, tmp_path / "random.ckpt")).model
    assert model.dtype == dtype
    named = structures(charged=hypers["system_conditioning"])
    frames = list(named.values())
    for target in targets:
        together = reference(oracle, frames, dtype, target)
        assert min(np.abs(values).max() for values in together.forces[:7]) > 1e-3
        label = f"row {row} {str(dtype)[6:]} {target}"
        check(deviations(model, frames, dtype, target, together), dtype, f"{label}, one batch")
    for index, (name, atoms) in enumerate(named.items()):
        alone = Reference(
            together.energies[index : index + 1],
            together.forces[index : index + 1],
            together.stresses[index : index + 1],
        )
        check(deviations(model, [atoms], dtype, target, alone), dtype, f"{label}, {name} alone")


@pytest.mark.parametrize("name", ["isolated atom", "dimer outside the cutoff", "surface"])
def test_metatrain_alone_agrees_too(name: str, tmp_path: Path):
    """Without neighbours anywhere in the batch metatrain takes another path."""
    oracle = metatrain_model(0).to(torch.float64)
    model = load_checkpoint(save(oracle, tmp_path / "random.ckpt")).model
    atoms = structures()[name]
    alone = reference(oracle, [atoms], torch.float64)
    check(deviations(model, [atoms], torch.float64, "energy", alone), torch.float64, name)


def test_units_of_energy_are_converted(tmp_path: Path):
    """metatrain predicts in the target's unit, we predict in eV."""
    oracle = random_model(3, unit="kcal/mol")
    model = load_checkpoint(save(oracle, tmp_path / "random.ckpt")).model
    frames = list(structures().values())
    expected = reference(oracle, frames, torch.float64)
    factor = energy_to_ev("kcal/mol")
    found = deviations(model, frames, torch.float64, "energy", expected, factor)
    check(found, torch.float64, "kcal/mol")


def test_adaptive_cutoffs_matter(tmp_path: Path):
    """Guards the rows with an adaptive cutoff in the same way: it must drop edges."""
    for row in (1, 2):
        hypers, targets = hypers_of(ROWS[row])
        model = load_checkpoint(
            save(random_model(row, targets, **hypers), tmp_path / "a.ckpt")
        ).model
        batch = batch_from_atoms(list(structures().values()), CUTOFF)
        assert len(model.network.neighborhood(batch).centers) < 0.9 * batch.num_edges


def test_charges_matter():
    """Guards the rows with conditioning: without an effect they would show nothing."""
    oracle = random_model(1, system_conditioning=True)
    named = [structures(charged)["ethanol"] for charged in (False, True)]
    plain, charged = reference(oracle, named, torch.float64).energies
    assert abs(plain - charged) > 1e-3
