"""Predictions and features as tensor maps, beside those that metatrain's model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.export.tensormaps import output_names, tensor_maps

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from metatomic.torch import ModelOutput
from metatrain.utils.evaluate_model import evaluate_model
from metatrain_models import _system, random_model, save, structures
from test_metatrain_models import ROWS, hypers_of
from test_metatrain_targets import TARGETS

#: Whose units are ours in the file.
OTHERS = {name: given for name, given in TARGETS.items() if "kcal" not in given.get("unit", "")}


def same(ours: Any, theirs: Any, name: str, limit: float = 1e-9) -> None:
    """Two blocks: labels, and values in the order of the labels."""
    assert ours.samples.names == theirs.samples.names, name
    assert [c.names for c in ours.components] == [c.names for c in theirs.components], name
    assert ours.properties == theirs.properties, name
    order, other = (sorted(range(len(b.samples)), key=lambda i: b.samples.values[i].tolist())
                    for b in (ours, theirs))  # fmt: skip
    assert torch.equal(ours.samples.values[order], theirs.samples.values[other]), name
    expected = theirs.values.detach()[other].double()
    difference = (ours.values[order].double() - expected).abs().max()
    assert expected.abs().max() > 1e-3, name
    assert difference <= limit * (1 + expected.abs().max()), (name, float(difference))


@pytest.mark.parametrize("row", [1, 2, 7, 11, 14])
def test_features_are_metatrains(row: int, tmp_path: Path) -> None:
    hypers, targets = hypers_of(ROWS[row])
    theirs = random_model(row, targets, **hypers)
    model = load_checkpoint(save(theirs, tmp_path / "random.ckpt")).model
    frames = list(structures(charged=hypers["system_conditioning"]).values())
    names = [name for name in output_names(model) if name not in model.targets]
    assert "mtt::feature::gnn_layers.0_edge" in names
    assert f"mtt::feature::node_heads.{targets[-1]}.0" in names
    found = tensor_maps(model, [atoms_to_structure(a) for a in frames], names, batch_size=4)
    systems = [_system(atoms, theirs, torch.float64) for atoms in frames]
    expected = theirs(systems, {name: ModelOutput(sample_kind="atom") for name in names})
    for name in names:
        assert found[name].keys == expected[name].keys
        same(found[name].block(), expected[name].block(), name)
    kind = {"feature": "system"}
    ours = tensor_maps(model, [atoms_to_structure(a) for a in frames], kind)["feature"].block()
    sums = theirs(systems, {"feature": ModelOutput(sample_kind="system")})["feature"].block()
    same(ours, sums, "feature of systems")


def test_targets_are_metatrains(tmp_path: Path) -> None:
    theirs = random_model(4, ("energy", "mtt::U0"), others=OTHERS, zbl=True)
    model = load_checkpoint(save(theirs, tmp_path / "random.ckpt")).model
    frames = list(structures().values())
    given = [atoms_to_structure(atoms) for atoms in frames]
    found = tensor_maps(model, given, batch_size=5)
    systems = [_system(atoms, theirs, torch.float64) for atoms in frames]
    infos = theirs.dataset_info.targets
    for name in OTHERS:
        asked = {name: ModelOutput(sample_kind=infos[name].sample_kind)}
        same(found[name].block(), theirs(systems, asked)[name].block(), name)
    of_atoms = {"energy": "atom", "mtt::U0": "atom", "mtt::gap": "atom", "mtt::dipole": "atom"}
    atomic = tensor_maps(model, given, of_atoms)
    expected = theirs(systems, {name: ModelOutput(sample_kind="atom") for name in of_atoms})
    for name in of_atoms:
        same(atomic[name].block(), expected[name].block(), f"{name} of atoms")
    crystals = [atoms for atoms in frames if atoms.pbc.all()]
    systems = [_system(atoms, theirs, torch.float64) for atoms in crystals]
    energies = evaluate_model(theirs, systems, {"energy": infos["energy"]}, is_training=False)
    ours = tensor_maps(model, [atoms_to_structure(a) for a in crystals], ["energy"])["energy"]
    same(ours.block(), energies["energy"].block(), "energy")
    positions = [e.block().gradient("positions") for e in (ours, energies["energy"])]
    same(*positions, "positions", 1e-8)
    strain = energies["energy"].block().gradient("strain").values.detach()
    symmetric = 0.5 * (strain + strain.transpose(1, 2))
    assert (ours.block().gradient("strain").values - symmetric).abs().max() < 1e-8
