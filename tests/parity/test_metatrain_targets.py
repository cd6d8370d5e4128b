"""Targets that are no energies, of random models: metatrain's predictions and ours."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.units import to_own_unit

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from metatrain_models import random_model, reference_properties, save, structures

VECTOR, TENSOR = ({"cartesian": {"rank": rank}} for rank in (1, 2))
TARGETS: dict[str, dict[str, Any]] = {
    "mtt::gap": {"quantity": "energy_gap", "unit": "eV"},
    "mtt::dos": {"num_subtargets": 3},
    "mtt::charges": {"quantity": "charge", "unit": "e", "sample_kind": "atom"},
    "mtt::multipoles": {"sample_kind": "atom", "num_subtargets": 2},
    "mtt::shares": {"quantity": "energy", "unit": "eV", "sample_kind": "atom"},
    "mtt::dipole": {"type": VECTOR, "unit": "Debye"},
    "mtt::dipoles": {"type": VECTOR, "sample_kind": "atom", "num_subtargets": 2},
    "mtt::polarizability": {"type": TENSOR},
    "non_conservative_forces": {"quantity": "force", "unit": "kcal/mol/A", "sample_kind": "atom",
                                "type": VECTOR},
    "non_conservative_force/pbe": {"unit": "eV/Angstrom", "sample_kind": "atom", "type": VECTOR},
    "non_conservative_stress": {"quantity": "pressure", "unit": "eV/A^3", "type": TENSOR},
}  # fmt: skip


@lru_cache(maxsize=4)
def oracle(zbl: bool, featurizer: str) -> Any:
    return random_model(4, others=TARGETS, zbl=zbl, featurizer_type=featurizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("zbl", "featurizer"), [(False, "feedforward"), (True, "residual")])
def test_predictions_are_metatrains(
    zbl: bool, featurizer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = oracle(zbl, featurizer).to(dtype)
    model = load_checkpoint(save(theirs, tmp_path / "random.ckpt")).model
    assert set(model.targets) == {"energy", *TARGETS}
    save_checkpoint(tmp_path / "ours.ckpt", model)
    again = load_checkpoint(tmp_path / "ours.ckpt").model
    frames = list(structures().values())
    batch = batch_from_atoms(frames, model.cutoff, dtype)
    wanted = {"energy": (True, True), **dict.fromkeys(TARGETS, (False, False))}
    together = model.predict_targets(batch, wanted)
    reference = reference_properties(theirs, frames, dtype, list(TARGETS))
    for name in TARGETS:
        spec = model.targets[name]
        expected = reference[name] * to_own_unit(spec.quantity, TARGETS[name].get("unit", ""))
        found = model.predict_property(batch, name).detach()
        assert found.shape == (len(expected), *spec.shape)
        assert np.abs(expected).max() > 1e-2, name
        difference = np.abs(found.double().numpy().reshape(expected.shape) - expected).max()
        print(f"{name}: {difference:.1e} of {np.abs(expected).max():.1e}")
        limit = 1e-9 if dtype == torch.float64 else 1e-4
        assert difference <= limit * max(1.0, np.abs(expected).max()), name
        assert torch.equal(again.predict_property(batch, name), found), name
        # In one pass with an energy and its derivatives the same, and free of their graph.
        assert torch.allclose(together[name].values, found, rtol=1e-5, atol=1e-6), name
        assert not together[name].values.requires_grad


def test_units_and_forms_are_read(tmp_path: Path) -> None:
    model = load_checkpoint(save(oracle(False, "feedforward"), tmp_path / "random.ckpt")).model
    assert {name: (spec.unit, spec.form) for name, spec in model.targets.items()} == {
        "energy": ("eV", "a scalar for each structure"),
        "mtt::gap": ("eV", "a scalar for each structure"),
        "mtt::dos": ("", "3 scalars for each structure"),
        "mtt::charges": ("e", "a scalar for each atom"),
        "mtt::multipoles": ("", "2 scalars for each atom"),
        "mtt::shares": ("eV", "a scalar for each atom"),
        "mtt::dipole": ("Debye", "a vector for each structure"),
        "mtt::dipoles": ("", "2 vectors for each atom"),
        "mtt::polarizability": ("", "a tensor for each structure"),
        "non_conservative_forces": ("eV/A", "a vector for each atom"),
        "non_conservative_force/pbe": ("eV/A", "a vector for each atom"),
        "non_conservative_stress": ("eV/A^3", "a tensor for each structure"),
    }
    assert model.targets["non_conservative_stress"].per_volume
