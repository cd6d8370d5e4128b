"""The way back: models written for metatrain, as metatrain reads them, and read again by us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.checkpoint.to_metatrain import save_metatrain
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.export.export import export_model
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction
from pet_finetune.units import to_own_unit

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from metatrain.utils.data import DatasetInfo
from metatrain.utils.io import load_model, model_from_checkpoint
from metatrain_models import (
    SPECIES,
    random_model,
    reference,
    reference_properties,
    save,
    structures,
)
from test_metatrain_models import ROWS, check, hypers_of
from test_metatrain_targets import TARGETS


def predictions(model: Potential, frames: list[Any]) -> dict[str, torch.Tensor]:
    batch = batch_from_atoms(frames, model.cutoff, model.dtype)
    wanted = {name: (spec.is_energy, spec.is_energy) for name, spec in model.targets.items()}
    found: dict[str, torch.Tensor] = {}
    for name, value in model.predict_targets(batch, wanted).items():
        if isinstance(value, Prediction):
            assert value.forces is not None
            assert value.stress is not None
            found |= {name: value.energy, f"{name} F": value.forces, f"{name} S": value.stress}
        else:
            found[name] = value.values
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_a_round_trip_changes_no_prediction(row: int, tmp_path: Path) -> None:
    hypers, targets = hypers_of(ROWS[row])
    theirs = random_model(row, targets, **hypers)
    first = load_checkpoint(save(theirs, tmp_path / "theirs.ckpt")).model
    save_metatrain(tmp_path / "back.ckpt", first)
    frames = list(structures(charged=hypers["system_conditioning"]).values())
    again = load_checkpoint(tmp_path / "back.ckpt").model
    expected = predictions(first, frames)
    for name, value in predictions(again, frames).items():
        assert torch.equal(value, expected[name]), name
    back = load_model(tmp_path / "back.ckpt").eval()
    for target in targets:
        before, after = (reference(m, frames, torch.float64, target) for m in (theirs, back))
        assert np.array_equal(before.energies, after.energies)
        assert all(map(np.array_equal, before.forces, after.forces))
        batch = batch_from_atoms(frames, first.cutoff)
        ours = first.predict(batch, target)
        assert ours.forces is not None
        difference = {
            "energy": float(np.abs(ours.energy.numpy() - after.energies).max() / 20),
            "forces": float(np.abs(ours.forces.numpy() - np.concatenate(after.forces)).max()),
            "stress": 0.0,
        }
        check(difference, torch.float64, f"row {row} {target}")


def same_content(written: dict[str, Any], theirs: dict[str, Any]) -> None:
    """What metatrain itself writes of the same model, key by key; training records aside."""
    assert theirs.keys() <= written.keys()
    for part in ("model_state_dict", "best_model_state_dict"):
        ours, expected = written[part], theirs[part]
        assert ours.keys() == expected.keys()
        assert list(ours)[:2] == list(expected)[:2]
        for name, value in expected.items():
            if not isinstance(value, torch.Tensor):
                assert ours[name] == value, name
            elif "dummy_buffer" not in name and "type_to_index" not in name:
                # Tensor maps as bytes are as long; their numbers are compared by predictions.
                assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
                if value.dtype != torch.uint8:
                    assert torch.equal(ours[name], value), name
    mine, other = written["model_data"], theirs["model_data"]
    assert mine["model_hypers"] == other["model_hypers"]
    info: DatasetInfo = mine["dataset_info"]
    assert vars(info).keys() == vars(other["dataset_info"]).keys()
    assert info.targets.keys() == other["dataset_info"].targets.keys()
    for name, target in info.targets.items():
        expected = other["dataset_info"].targets[name]
        assert target == expected, name
        assert target.gradients == expected.gradients, name
        assert vars(target).keys() == vars(expected).keys()
        assert target.blocks_shape == expected.blocks_shape


def test_the_content_is_what_metatrain_writes(tmp_path: Path) -> None:
    units = {
        name: {**given, "quantity": "force" if "force" in name else given.get("quantity", ""),
               "unit": "eV/A" if "force" in name else given.get("unit", "")}
        for name, given in TARGETS.items()
    }  # fmt: skip
    theirs = random_model(
        5, ("energy", "energy/pbe"), others=units, zbl=True, system_conditioning=True
    )
    model = load_checkpoint(save(theirs, tmp_path / "theirs.ckpt")).model
    save_metatrain(tmp_path / "back.ckpt", model)
    written = torch.load(tmp_path / "back.ckpt", weights_only=False)
    same_content(written, torch.load(tmp_path / "theirs.ckpt", weights_only=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_target_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = random_model(4, ("energy", "energy/pbe"), others=TARGETS, zbl=True).to(dtype)
    first = load_checkpoint(save(theirs, tmp_path / "theirs.ckpt")).model
    written = save_metatrain(tmp_path / "back.ckpt", first)
    assert not written.notices
    frames = list(structures().values())
    expected = predictions(first, frames)
    found = predictions(load_checkpoint(tmp_path / "back.ckpt").model, frames)
    for name, value in found.items():
        # Scales within a target are split into a mean and factors, which rounds.
        limit = 1e-14 if dtype == torch.float64 else 1e-6
        assert (value - expected[name]).abs().max() <= limit * (1 + value.abs().max()), name
    back = load_model(tmp_path / "back.ckpt").eval()
    before = reference_properties(theirs, frames, dtype, list(TARGETS))
    after = reference_properties(back, frames, dtype, list(TARGETS))
    for name, options in TARGETS.items():
        # Ours are in our units.
        wanted = before[name] * to_own_unit(first.target(name).quantity, options.get("unit", ""))
        limit = 1e-9 if dtype == torch.float64 else 1e-4
        assert np.abs(after[name] - wanted).max() <= limit * (1 + np.abs(wanted).max()), name


def test_new_elements_and_the_contexts_of_metatrain(tmp_path: Path) -> None:
    model = load_checkpoint(save(random_model(2, zbl=True), tmp_path / "theirs.ckpt")).model
    model.add_species([7, 16], {7: 6})
    outcome = export_model(_saved(model, tmp_path), tmp_path / "back.ckpt")
    assert (outcome.format, outcome.difference) == ("metatrain", 0.0)
    frames = list(structures().values())
    frames[0].numbers[0], frames[1].numbers[0] = 7, 16
    for context in ("restart", "finetune", "export"):
        content = torch.load(tmp_path / "back.ckpt", weights_only=False)
        back = model_from_checkpoint(content, context=context).eval()
        assert back.atomic_types == sorted([*SPECIES, 7, 16])
        batch = batch_from_atoms(frames, model.cutoff)
        energies = reference(back, frames, torch.float64).energies
        assert np.abs(energies - model.predict(batch).energy.numpy()).max() < 1e-8


def _saved(model: Potential, folder: Path) -> Path:
    from pet_finetune.checkpoint.native import save_checkpoint

    return save_checkpoint(folder / "ours.ckpt", model)
