"""Last-layer uncertainties: what they say, while the weights are theirs, and afterwards."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError

from models import (
    KINDS,
    all_structures,
    crystal,
    ethanol,
    random_potential,
    trained_adapter,
    with_last_layer,
)
from pet_finetune import PETCalculator
from pet_finetune.adapters.inject import merged_copy
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.backends.choice import EAGER, using
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.llpr import fresh, predict_uncertain
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import CheckpointError
from pet_finetune.model.prediction import cholesky_of, features_key


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_last_layers_multiply(kind: str) -> None:
    """The output again, from features and weights; the same in TorchScript."""
    network = random_potential(**KINDS[kind]).network
    batch = batch_from_atoms(list(all_structures().values()), 3.5)
    with using(EAGER, network):
        found = network(batch, ["energy"], False, ["energy"])
    features = found[features_key("energy")]
    assert features.shape == (batch.num_atoms, network.last_layer_width)
    assert list(network(batch, ["energy"])) == ["energy"]
    layers = zip(network.node_last_layers["energy"], network.edge_last_layers["energy"])  # noqa: B905
    weights = [next(iter(part.values())) for pair in layers for part in pair]
    hood = network.neighborhood(batch)
    factors = torch.zeros(batch.num_atoms).double().index_add(0, hood.centers, hood.factors)
    expected = features @ torch.cat([layer.weight for layer in weights], 1).T
    for index, layer in enumerate(weights):
        expected = expected + layer.bias * (factors.unsqueeze(1) if index % 2 else 1.0)
    torch.testing.assert_close(found["energy"], expected)
    scripted = torch.jit.script(network)(batch, ["energy"], False, ["energy"])
    torch.testing.assert_close(scripted[features_key("energy")], features)


def test_the_uncertainty_is_the_formula() -> None:
    model = with_last_layer(random_potential())
    layer = fresh(model)["energy"]
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff)
    (found,) = predict_uncertain(
        model, batch, {"energy": (True, False)}, {"energy": layer}
    ).values()
    of_atoms = model.predict_targets(batch, {"energy": (False, False)}, features_of=["energy"])
    rows = of_atoms["energy"].features.split(batch.atoms_per_structure.tolist())
    for index, atoms in enumerate(rows):
        f = atoms.sum(0)
        sigma = 1.7 * torch.sqrt(f @ torch.linalg.inv(layer.covariance) @ f)
        torch.testing.assert_close(found.uncertainty("energy")[index], sigma)
    torch.testing.assert_close(found.members.energy.mean(0), found.energy)
    torch.testing.assert_close(found.members.atom_energies.mean(0), found.atom_energies)


def test_members_forces_are_derivatives_of_their_energies(tmp_path: Path) -> None:
    model = with_last_layer(random_potential(zbl=True))
    calculator = PETCalculator(model, device="cpu")
    atoms = ethanol()
    forces = calculator.get_property("forces_ensemble", atoms)

    for axis in range(3):
        energies = []
        for step in (1e-4, -1e-4):
            moved = atoms.copy()
            moved.positions[2, axis] += step
            energies.append(calculator.get_property("energy_ensemble", moved))
        slopes = (energies[0] - energies[1]) / 2e-4
        np.testing.assert_allclose(forces[:, 2, axis], -slopes, atol=1e-6)
    assert np.abs(forces - forces.mean(0)).max() > 1e-2
    spread = forces.std(0, ddof=1)
    found = calculator.get_property("forces_uncertainty", atoms)
    np.testing.assert_allclose(found, np.sqrt((spread**2).mean(-1)), atol=1e-12)


def test_what_is_computed_when() -> None:
    model = with_last_layer(random_potential())
    atoms = crystal()
    for spread, energy, forces in ((None, 1, 0), ("always", 1, 1), ("on_demand", 0, 0)):
        atoms.calc = PETCalculator(model, device="cpu", spread=spread)
        atoms.get_forces()
        assert ("energy_uncertainty" in atoms.calc.results) == bool(energy)
        assert ("stress_uncertainty" in atoms.calc.results) == bool(forces)
        assert atoms.calc.get_property("energy_uncertainty", atoms) > 0
        assert atoms.calc.get_property("stress_uncertainty", atoms).shape == (6,)


def test_a_mean_over_orientations_is_surer() -> None:
    model = with_last_layer(random_potential())
    plain, mean = (PETCalculator(model, device="cpu", orientations=n) for n in (1, 4))
    atoms = ethanol()
    each = [c.get_property("energy_uncertainty", atoms) for c in (plain, mean)]
    assert 0 < each[1] < each[0] or each[1] == pytest.approx(each[0], rel=0.2)
    for calculator in (plain, mean):
        calculator.get_property("forces_ensemble", atoms)
        spread = calculator.results["energy_ensemble"]
        assert spread.mean() == pytest.approx(calculator.results["energy"])


def test_without_members_it_is_of_energies_alone() -> None:
    model = with_last_layer(random_potential(), members=0)
    calculator = PETCalculator(model, device="cpu", spread="always")
    assert calculator.get_property("energy_uncertainty", ethanol()) > 0
    for name in ("forces_uncertainty", "energy_ensemble"):
        with pytest.raises(PropertyNotImplementedError, match="no ensemble"):
            calculator.get_property(name, ethanol())


def test_other_weights_have_no_uncertainty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not offered, not saved, and one line says so; the base has its own again."""
    base = with_last_layer(random_potential())
    save_checkpoint(tmp_path / "base.ckpt", base)
    adapted = trained_adapter(copy.deepcopy(base))
    save_adapter(adapted, tmp_path / "adapter", "base")
    with caplog.at_level(logging.WARNING):
        calculator = PETCalculator(tmp_path / "base.ckpt", adapter=tmp_path / "adapter")
    assert caplog.text.count("was made for other weights") == 1
    with pytest.raises(PropertyNotImplementedError, match="no uncertainty of 'energy'"):
        calculator.get_property("energy_uncertainty", ethanol())
    assert "energy_uncertainty" not in calculator.results
    calculator.disable_adapters()
    expected = PETCalculator(base, device="cpu").get_property("energy_uncertainty", ethanol())
    found = calculator.get_property("energy_uncertainty", ethanol())
    assert found == pytest.approx(expected, rel=1e-12)
    save_checkpoint(tmp_path / "merged.ckpt", merged_copy(adapted))
    assert not load_checkpoint(tmp_path / "merged.ckpt").model.uncertainties
    kept = load_checkpoint(save_checkpoint(tmp_path / "again.ckpt", base)).model
    assert list(kept.uncertainties) == ["energy"]
    with torch.no_grad():
        kept.network.edge_embedder.weight[0, 0] += 1e-3
    assert not fresh(kept)
    assert not PETCalculator(kept, device="cpu").implemented_properties[5:]


def test_heads_of_others_do_not_matter(tmp_path: Path) -> None:
    model = with_last_layer(random_potential(targets=("energy", "energy/pbe")))
    model.remove_target("energy/pbe")
    assert list(fresh(model.float())) == ["energy"]
    model.remove_target("energy")
    assert not model.uncertainties


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("cholesky", -torch.eye(12), "not positive"),
        ("cholesky", torch.eye(7), r"has the shape \(12, 12\), and \(7, 7\) is needed"),
        ("members", torch.full((2, 12), torch.nan), "holds what is no number"),
        ("members", torch.ones(2, 5), r"\(2, 5\), and \(2, 12\) is needed"),
        ("multiplier", torch.tensor(-1.0), "not positive"),
        ("all", torch.eye(5), "it is of 5 features, and the last layer sees 12"),
    ],
)
def test_what_cannot_be_is_damage(
    part: str, value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    """In a checkpoint of ours, as in metatrain's (see the parity tests)."""
    path = save_checkpoint(tmp_path / "model.ckpt", with_last_layer(random_potential()))
    content = torch.load(path, weights_only=True)
    parts = content["uncertainty"]["energy"]
    if part == "all":
        parts |= {"covariance": value, "cholesky": value, "members": torch.ones(0, 5)}
    else:
        parts[part] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_covariance_is_decomposed_with_as_little_as_it_takes() -> None:
    features = torch.randn(3, 6, dtype=torch.float64)
    covariance = features.T @ features
    lower = cholesky_of(covariance)
    torch.testing.assert_close(lower @ lower.T, covariance, atol=1e-8, rtol=0)
    stated = cholesky_of(covariance, 0.5)
    torch.testing.assert_close(stated @ stated.T, covariance + 0.5 * torch.eye(6).double())
    with pytest.raises(ValueError, match="cannot be decomposed with the regularizer -1"):
        cholesky_of(covariance, -1.0)
