"""Long-range features against metatrain's, which computes them with torch-pme as we do.

metatrain reads the lengths of edges in another order than their indices where a neighbour list is
not sorted by its first atom; the lists here are sorted, as those of its own training are. With
adaptive cutoffs it computes molecules only, and no structure that is periodic in part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.checkpoint.to_metatrain import save_metatrain
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.export.tensormaps import output_names, tensor_maps
from pet_finetune.model.prediction import forces_of, with_leaves

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
pytest.importorskip("torchpme", reason="torch-pme comes with the extra long-range")
from metatomic.torch import ModelOutput
from metatrain.utils.io import load_model
from metatrain_models import _system, random_model, reference, save, structures
from test_metatrain_models import check, deviations
from test_metatrain_writing import predictions, same_content

ROWS: dict[str, dict[str, Any]] = {
    "feedforward": {"zbl": True, "system_conditioning": True},
    "residual": {"featurizer_type": "residual", "num_gnn_layers": 3, "d_node": 24},
    "other sums": {
        "long_range": {
            "use_ewald": True, "smearing": 1.1, "kspace_resolution": 0.9, "interpolation_nodes": 4,
        },
    },
    "adaptive": {"num_neighbors_adaptive": 5.0},
}  # fmt: skip
DEFAULTS = {
    "enable": True, "use_ewald": False, "smearing": 1.4, "kspace_resolution": 1.33,
    "interpolation_nodes": 5,
}  # fmt: skip


def oracle(row: str) -> Any:
    hypers = dict(ROWS[row])
    return random_model(3, long_range={**DEFAULTS, **hypers.pop("long_range", {})}, **hypers)


def frames_of(row: str) -> list[Atoms]:
    charged = bool(ROWS[row].get("system_conditioning"))
    whole = [a for a in structures(charged).values() if a.pbc.all() or not a.pbc.any()]
    return [a for a in whole if row != "adaptive" or not a.pbc.any()]


@pytest.mark.parametrize("row", ROWS)
def test_predictions_are_metatrains(row: str, tmp_path: Path) -> None:
    theirs, frames = oracle(row), frames_of(row)
    model = load_checkpoint(save(theirs, tmp_path / "random.ckpt")).model
    expected = reference(theirs, frames, torch.float64)
    check(deviations(model, frames, torch.float64, "energy", expected), torch.float64, row)
    charges = model.network.long_range_featurizer.charges_map
    with torch.no_grad():
        charges.weight.zero_()
        charges.bias.zero_()
    without = model.predict(batch_from_atoms(frames, model.cutoff)).energy.numpy()
    assert np.abs(without - expected.energies).max() > 1e-3  # they matter


@pytest.mark.parametrize("row", ["feedforward", "residual"])
def test_features_of_atoms_are_metatrains(row: str, tmp_path: Path) -> None:
    """The backbone's are those before long-range features come to them."""
    theirs, frames = oracle(row), frames_of(row)
    model = load_checkpoint(save(theirs, tmp_path / "random.ckpt")).model
    systems = [_system(atoms, theirs, torch.float64) for atoms in frames]
    names = [n for n in output_names(model) if "feature" in n and "edge" not in n]
    assert {"mtt::feature::node_backbone.0", "mtt::feature::node_heads.energy.0"} <= set(names)
    found = tensor_maps(model, [atoms_to_structure(atoms) for atoms in frames], names)
    for name in names:
        expected = theirs(systems, {name: ModelOutput(sample_kind="atom")})[name].block().values
        values = found[name].block().values
        torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_a_training_step_are_metatrains(row: str, tmp_path: Path) -> None:
    """Of outputs and forces as the networks have them in training, by every parameter."""
    theirs, frames = oracle(row).train(), frames_of(row)
    model = load_checkpoint(save(theirs, tmp_path / "random.ckpt")).model.train()
    systems = [_system(atoms, theirs, torch.float64) for atoms in frames]
    batch, leaves = with_leaves(batch_from_atoms(frames, model.cutoff), True, True)
    energies = model.network(batch, ["energy"])["energy"]
    slopes = torch.autograd.grad(energies.sum(), leaves, create_graph=True, materialize_grads=True)
    ours = energies.square().sum() + forces_of(batch, slopes).square().sum()
    for system in systems:
        system.positions.requires_grad_()
    wanted = {"energy": ModelOutput(sample_kind="atom")}
    said = theirs(_with_own_lists(systems, theirs), wanted)["energy"].block().values
    positions = [system.positions for system in systems]
    found = torch.autograd.grad(said.sum(), positions, create_graph=True, materialize_grads=True)
    expected = said.square().sum() + torch.cat(found).square().sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-10)
    ours.backward()
    expected.backward()
    own = dict(model.network.named_parameters())
    assert any("long_range" in name for name in own)
    for name, parameter in theirs.named_parameters():
        gradient = own[name.removeprefix("backend.")].grad
        if parameter.grad is None:
            assert gradient is None or not gradient.any(), name
            continue
        scale = 1.0 + float(parameter.grad.abs().max())
        assert float((gradient - parameter.grad).abs().max()) < 1e-9 * scale, name


def _with_own_lists(systems: list[Any], model: Any) -> list[Any]:
    """The same systems: the vectors of the lists follow their positions."""
    from metatomic.torch import System
    from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists

    made = []
    for system in systems:
        new = System(system.types, system.positions, system.cell, system.pbc)
        for name in system.known_data():
            new.add_data(name, system.get_data(name))
        made.append(get_system_with_neighbor_lists(new, model.requested_neighbor_lists()))
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("row", ROWS)
def test_a_round_trip_changes_nothing(row: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, frames = oracle(row).to(dtype), frames_of(row)
    first = load_checkpoint(save(theirs, tmp_path / "theirs.ckpt")).model
    save_metatrain(tmp_path / "back.ckpt", first)
    written, content = (
        torch.load(tmp_path / name, weights_only=False) for name in ("back.ckpt", "theirs.ckpt")
    )
    if dtype == torch.float64:  # radii of ZBL are in float64 always
        same_content(written, content)
    written, content = written["model_state_dict"], content["model_state_dict"]
    for name in (name for name in content if name.startswith("long_range")):
        assert torch.equal(written[name], content[name]), name
        assert written[name].dtype == content[name].dtype, name
    again = load_checkpoint(tmp_path / "back.ckpt").model
    expected = predictions(first, frames)
    for name, value in predictions(again, frames).items():
        assert torch.equal(value, expected[name]), name
    back = load_model(tmp_path / "back.ckpt").eval()
    before, after = (reference(model, frames, dtype) for model in (theirs, back))
    assert np.array_equal(before.energies, after.energies)
    assert all(map(np.array_equal, before.forces, after.forces))
