"""metatrain's LLPR against ours: reading, predicting, writing back, over the models' grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError

from pet_finetune import PETCalculator
from pet_finetune.checkpoint.metatrain_formats import uncertainty_name
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.llpr import fit_last_layers, fresh
from pet_finetune.config.finetune import LastLayerOptions
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import CheckpointError
from pet_finetune.export.export import export_model
from pet_finetune.model.potential import Potential
from pet_finetune.units import to_own_unit

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from metatomic.torch import ModelOutput
from metatrain.llpr import LLPRUncertaintyModel
from metatrain.utils.data import get_dataset
from metatrain.utils.io import load_model, model_from_checkpoint
from metatrain_models import _system, random_model, save, structures
from omegaconf import OmegaConf
from test_metatrain_models import ROWS, hypers_of
from test_metatrain_targets import TARGETS

NAMES = ("ethanol", "strained crystal", "surface and lone atom", "isolated atom")


def wrapped(pet: Any, members: dict[str, int] | None = None) -> LLPRUncertaintyModel:
    """An LLPR with random covariances around a PET, as if it had been calibrated."""
    made = LLPRUncertaintyModel({"num_ensemble_members": members or {}}, pet.dataset_info)
    made.set_wrapped_model(pet)
    made.to(torch.float64)
    for index, name in enumerate(pet.dataset_info.targets):
        features = torch.randn(300, made.ll_feat_size, dtype=torch.float64)
        made._get_covariance(uncertainty_name(name))[:] = features.T @ features
        made._get_multiplier(uncertainty_name(name))[:] = 1.5 + index
    made.compute_cholesky_decomposition(None)
    made.generate_ensemble()
    return made.eval()


def save_llpr(model: LLPRUncertaintyModel, path: Path, **changes: Any) -> Path:
    """Write a checkpoint as metatrain's trainer of LLPR does."""
    content = model.get_checkpoint()
    content |= {"trainer_ckpt_version": 1, "train_hypers": {}, "best_metric": None}
    torch.save({**content, **changes}, path)
    return path


def theirs(
    model: LLPRUncertaintyModel, atoms: ase.Atoms, target: str = "energy", kind: str = "system"
) -> dict[str, np.ndarray]:
    """What metatrain says: the uncertainty and, where there is one, the ensemble."""
    name = uncertainty_name(target)
    ensemble = name.replace("_uncertainty", "_ensemble")
    outputs = {name: ModelOutput(sample_kind=kind)}
    gradients = ["positions", "strain"] if kind == "system" else []
    if ensemble in model.capabilities.outputs:
        outputs[ensemble] = ModelOutput(sample_kind=kind, explicit_gradients=gradients)
    system = _system(atoms, model.model, torch.float64)
    found = {key: value.block() for key, value in model([system], outputs).items()}
    result = {"uncertainty": found[name].values.detach().numpy()}
    if ensemble in found:
        result["ensemble"] = found[ensemble].values.detach().numpy()
        if gradients:
            slopes = found[ensemble].gradient("positions").values.detach().numpy()
            result["forces"] = -np.moveaxis(slopes, 2, 0)
            strain = found[ensemble].gradient("strain").values.detach().numpy()[0]
            result["strain"] = np.moveaxis(strain, 2, 0)
    return result


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_uncertainties_are_metatrains(row: int, tmp_path: Path) -> None:
    hypers, targets = hypers_of(ROWS[row])
    oracle = wrapped(random_model(row, targets, **hypers), dict.fromkeys(targets, 3))
    path = save_llpr(oracle, tmp_path / "wrapped.ckpt")
    frames = structures(charged=hypers["system_conditioning"])
    for target in targets:
        calculator = PETCalculator(path, target=target, device="cpu", spread="always")
        for name in NAMES:
            atoms = frames[name].copy()
            expected = theirs(oracle, atoms, target)
            atoms.calc = calculator
            atoms.get_potential_energy()
            found = calculator.results
            sure = expected["uncertainty"].item()
            assert sure > 1e-3
            assert found["energy_uncertainty"] == pytest.approx(sure, rel=1e-9), name
            each = expected["ensemble"][0]
            np.testing.assert_allclose(found["energy_ensemble"], each, rtol=1e-10)
            assert each.std() > 1e-3
            np.testing.assert_allclose(found["forces_ensemble"], expected["forces"], atol=1e-8)
            spread = np.sqrt((expected["forces"].std(0, ddof=1) ** 2).mean(-1))
            np.testing.assert_allclose(found["forces_uncertainty"], spread, atol=1e-8)
            if atoms.pbc.all():
                strain = expected["strain"]
                stress = (strain + strain.transpose(0, 2, 1)) / (2 * atoms.get_volume())
                voigt = stress[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
                np.testing.assert_allclose(found["stress_ensemble"], voigt, atol=1e-9)


def test_of_every_target(tmp_path: Path) -> None:
    """Direct heads, vectors, properties of atoms: calibrated as metatrain's, and kept."""
    pet = random_model(3, others=TARGETS)
    oracle = wrapped(pet, {"energy": 2})
    model = load_checkpoint(save_llpr(oracle, tmp_path / "wrapped.ckpt")).model
    assert set(fresh(model)) == set(model.targets)
    again = load_checkpoint(save_checkpoint(tmp_path / "ours.ckpt", model)).model
    for name, layer in fresh(again).items():
        for part, values in model.uncertainties[name].named_buffers():
            assert torch.equal(values, layer.get_buffer(part)), (name, part)
    direct = PETCalculator(
        tmp_path / "ours.ckpt", device="cpu", non_conservative="forces", spread="always"
    )
    atoms = structures()["ethanol"]
    atoms.calc = direct
    expected = theirs(oracle, atoms)["uncertainty"].item()
    assert direct.get_property("energy_uncertainty", atoms) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(PropertyNotImplementedError, match="not direct heads"):
        direct.get_property("forces_uncertainty", atoms)


def test_of_variants(tmp_path: Path) -> None:
    """Each energy has its own; one that was left out of the ensembles has no members."""
    oracle = wrapped(random_model(2, ("energy", "energy/pbe")), {"energy/pbe": 3})
    path = save_llpr(oracle, tmp_path / "wrapped.ckpt")
    atoms = structures()["ethanol"]
    found = []
    for target in ("energy", "energy/pbe"):
        calculator = PETCalculator(path, target=target, device="cpu")
        expected = theirs(oracle, atoms, target)
        found.append(calculator.get_property("energy_uncertainty", atoms))
        assert found[-1] == pytest.approx(expected["uncertainty"].item(), rel=1e-9)
        assert ("forces_uncertainty" in calculator.implemented_properties) == ("/" in target)
        if "ensemble" in expected:
            each = calculator.get_property("energy_ensemble", atoms)
            np.testing.assert_allclose(each, expected["ensemble"][0], rtol=1e-10)
    assert abs(found[0] - found[1]) > 1e-3


def test_a_unit_of_the_file_is_that_of_its_uncertainty(tmp_path: Path) -> None:
    oracle = wrapped(random_model(0, unit="kcal/mol"), {"energy": 3})
    calculator = PETCalculator(save_llpr(oracle, tmp_path / "wrapped.ckpt"), device="cpu")
    atoms = structures()["water"]
    expected = theirs(oracle, atoms)
    factor = ase.units.kcal / ase.units.mol
    found = calculator.get_property("energy_uncertainty", atoms)
    assert found == pytest.approx(factor * expected["uncertainty"].item(), rel=1e-7)
    each = calculator.results["energy_ensemble"]
    np.testing.assert_allclose(each, factor * expected["ensemble"][0], rtol=1e-7)


def old_state(model: LLPRUncertaintyModel, version: int) -> dict[str, Any]:
    """The state as formats 1 to 3 have it."""
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("model.")}
    for name in [name for name in state if name.startswith("cholesky_")]:
        lower = state.pop(name)
        state[name.replace("cholesky_", "inv_covariance_")] = torch.cholesky_inverse(lower)
    if version < 3:
        weights = state.pop("llpr_ensemble_layers.energy.weight")
        state["energy_ensemble_weights"] = weights.T.contiguous()
    return state


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_formats(version: int, tmp_path: Path) -> None:
    oracle = wrapped(random_model(0), {"energy": 3})
    state = old_state(oracle, version)
    parts = {"state_dict": state} if version < 3 else {"model_state_dict": state}
    content = {**oracle.get_checkpoint(), **parts, "model_ckpt_version": version}
    for name in ("best_model_state_dict", *(("model_state_dict",) if version < 3 else ())):
        content.pop(name)
    torch.save(content, tmp_path / "old.ckpt")
    calculator = PETCalculator(tmp_path / "old.ckpt", device="cpu", spread="always")
    atoms = structures()["water"]
    atoms.calc = calculator
    atoms.get_potential_energy()
    expected = theirs(oracle, atoms)
    found = calculator.results
    assert found["energy_uncertainty"] == pytest.approx(expected["uncertainty"].item(), rel=1e-9)
    np.testing.assert_allclose(found["energy_ensemble"], expected["ensemble"][0], rtol=1e-10)


@pytest.mark.parametrize("members", [0, 3])
def test_it_goes_back_to_metatrain(members: int, tmp_path: Path) -> None:
    """Round trips change no uncertainty, for metatrain and for us, of any target."""
    sizes = dict.fromkeys(("energy", "mtt::other_level"), members) if members else {}
    pet = random_model(5, ("energy", "mtt::other_level"), others=TARGETS)
    oracle = wrapped(pet, sizes)
    first = load_checkpoint(save_llpr(oracle, tmp_path / "theirs.ckpt")).model
    path = tmp_path / "back.ckpt"
    written = export_model(save_checkpoint(tmp_path / "ours.ckpt", first), path)
    assert written.format == "metatrain"
    back = load_model(path)
    assert isinstance(back, LLPRUncertaintyModel)
    back.eval()
    atoms = structures()["strained crystal"]
    for target in pet.dataset_info.targets:
        kind = pet.dataset_info.targets[target].sample_kind
        new = next(new for new, old in written.outputs.items() if old == target)
        before, after = theirs(oracle, atoms, target, kind), theirs(back, atoms, new, kind)
        assert before.keys() == after.keys()
        # It is in the unit that pet-finetune has.
        unit = pet.dataset_info.targets[target].unit
        factor = to_own_unit(first.target(target).quantity, unit)
        for name, values in before.items():
            np.testing.assert_allclose(after[name], factor * values, rtol=1e-12, atol=1e-12)
    again = load_checkpoint(path).model
    for name, layer in fresh(again).items():
        old = first.uncertainties[name if name in first.uncertainties else name[5:]]
        for part, values in old.named_buffers():
            assert torch.equal(values, layer.get_buffer(part)), (name, part)
    back.export()
    trained = model_from_checkpoint(torch.load(path, weights_only=False), "finetune")
    assert isinstance(trained, type(pet))


def test_one_that_was_never_calibrated_is_left_out(tmp_path: Path) -> None:
    pet = random_model(0)
    fallow = LLPRUncertaintyModel({"num_ensemble_members": {"energy": 3}}, pet.dataset_info)
    fallow.set_wrapped_model(pet)
    opened = load_checkpoint(save_llpr(fallow, tmp_path / "wrapped.ckpt"))
    plain = load_checkpoint(save(pet, tmp_path / "plain.ckpt"))
    assert any("the model is used without it" in notice for notice in opened.notices)
    assert not opened.model.uncertainties
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, opened.model.state_dict()[name]), name


def test_what_does_not_fit(tmp_path: Path) -> None:
    oracle = wrapped(random_model(0), {"energy": 3})
    good = {k: v for k, v in oracle.state_dict().items() if not k.startswith("model.")}

    def opened(**changes: Any) -> Any:
        state = {**good, **changes}
        state = {k: v for k, v in state.items() if v is not None}
        path = save_llpr(oracle, tmp_path / "m.ckpt", best_model_state_dict=state)
        return load_checkpoint(path)

    ensemble = {"llpr_ensemble_layers.energy.weight": torch.ones(3, 5)}
    strange = opened(**ensemble)
    assert any("the shape (3, 5) and not members x 16" in notice for notice in strange.notices)
    assert strange.model.uncertainties["energy"].num_members == 0
    other = opened(**{"multiplier_mtt::aux::gap_uncertainty": torch.ones(1)})
    assert any("no such target is used" in notice for notice in other.notices)
    wrong = {
        "multiplier_energy_uncertainty": torch.ones(2),
        "covariance_energy_uncertainty": torch.eye(7),
        "cholesky_energy_uncertainty": -good["cholesky_energy_uncertainty"],
    }
    for name, value in wrong.items():
        with pytest.raises(CheckpointError, match="the uncertainty of 'energy'"):
            opened(**{name: value})
    with pytest.raises(CheckpointError, match="formats 1 to 4 are known"):
        load_checkpoint(save_llpr(oracle, tmp_path / "new.ckpt", model_ckpt_version=5))


#: Beside the energy.
OTHERS = {name: TARGETS[name] for name in ("mtt::gap", "mtt::charges", "mtt::dipole")}


def labelled(seed: int, count: int) -> list[ase.Atoms]:
    """Structures with values of all targets drawn at random."""
    rng = np.random.default_rng(seed)
    made = []
    named = list(structures().values())
    for number in range(count):
        atoms = named[number % len(named)].copy()
        atoms.rattle(0.05, seed=number + 100 * seed)
        atoms.info |= {"my_energy": rng.normal(scale=20.0), "my_gap": rng.normal()}
        atoms.info["my_dipole"] = rng.normal(size=3)
        atoms.arrays["my_charges"] = rng.normal(size=len(atoms))
        made.append(atoms)
    return made


def their_set(pet: Any, frames: list[ase.Atoms], path: Path) -> Any:
    """Structures as metatrain reads them."""
    ase.io.write(path, frames, format="extxyz")
    usual = {
        "quantity": "",
        "unit": "",
        "sample_kind": "system",
        "type": "scalar",
        "num_subtargets": 1,
        "forces": False,
        "stress": False,
        "virial": False,
        "read_from": str(path),
        "reader": "ase",
        "description": "",
    }
    targets = {
        name: {**usual, "key": f"my_{name.removeprefix('mtt::')}", **OTHERS.get(name, {})}
        for name in pet.dataset_info.targets
    }
    targets["energy"] |= {"quantity": "energy", "unit": "eV"}
    systems = {"read_from": str(path), "reader": "ase"}
    options = OmegaConf.create({"systems": systems, "targets": targets})
    return get_dataset(options)[0]


def our_set(model: Potential, frames: list[ase.Atoms]) -> Loader:
    """The same as batches of ours."""
    made = []
    for atoms in frames:
        labels = {f"mtt::{name}": atoms.info[f"my_{name}"] for name in ("gap", "dipole")}
        labels |= {"energy": atoms.info["my_energy"], "mtt::charges": atoms.arrays["my_charges"]}
        tensors = {n: torch.as_tensor(v, dtype=torch.float64) for n, v in labels.items()}
        kinds = {name: spec.label_kind for name, spec in model.targets.items()}
        made.append(atoms_to_structure(atoms, labels=tensors, kinds=kinds))
    return Loader(made, model.cutoff, batch_size=5, dtype=torch.float64)


@pytest.mark.parametrize("regularizer", [1e-3, None])
@pytest.mark.parametrize("method", ["absolute_residuals", "squared_residuals", "crps"])
def test_recalibration_is_metatrains(
    method: str, regularizer: float | None, tmp_path: Path
) -> None:
    """Covariance, decomposition and factor of each kind of target."""
    pet = random_model(1, others=OTHERS)
    model = load_checkpoint(save(pet, tmp_path / "plain.ckpt")).model
    training, validation = labelled(1, 33), labelled(2, 11)
    oracle = LLPRUncertaintyModel({"num_ensemble_members": {}}, pet.dataset_info)
    oracle.set_wrapped_model(pet)
    oracle.to(torch.float64)
    oracle.compute_covariance([their_set(pet, training, tmp_path / "t.xyz")], 5, False)
    oracle.compute_cholesky_decomposition(regularizer)
    oracle.calibrate([their_set(pet, validation, tmp_path / "v.xyz")], 5, False, method)
    options = LastLayerOptions(regularizer=regularizer, calibration_method=method)
    # As they are in the files, where positions have eight digits.
    loaders = [our_set(model, ase.io.read(tmp_path / f"{n}.xyz", ":")) for n in "tv"]
    found = fit_last_layers(model, *loaders, list(model.targets), options)
    assert set(found) == {"energy", *OTHERS}
    # Without a regularizer ours begins at the rounding of the features, not at 1e-20.
    close = {"rtol": 1e-8 if regularizer else 1e-4, "atol": 1e-8}
    for target, (layer, _) in found.items():
        name = uncertainty_name(target)
        torch.testing.assert_close(layer.covariance, oracle._get_covariance(name))
        torch.testing.assert_close(layer.cholesky, oracle._get_cholesky(name), **close)
        multiplier = oracle._get_multiplier(name).reshape(())
        torch.testing.assert_close(layer.multiplier, multiplier, **close)
        assert multiplier != 1.0
        model.set_uncertainty(target, layer)
    atoms = structures()["ethanol"]
    sure = PETCalculator(model, device="cpu").get_property("energy_uncertainty", atoms)
    assert sure == pytest.approx(theirs(oracle, atoms)["uncertainty"].item(), rel=close["rtol"])


def test_members_are_drawn_around_the_last_layer_as_metatrain_draws_them(tmp_path: Path) -> None:
    """Their mean is the model's last layer, and their spread the uncertainty."""
    pet = random_model(1, others=OTHERS)
    model = load_checkpoint(save(pet, tmp_path / "plain.ckpt")).model
    frames = labelled(1, 33)
    loader = our_set(model, frames)
    options = LastLayerOptions(num_ensemble_members=20000)
    layer, _ = fit_last_layers(model, loader, loader, ["energy"], options)["energy"]
    names = pet.last_layer_parameter_names["energy"]
    own = torch.cat([pet.state_dict()[name] for name in names], dim=1)[0]
    probe = torch.eye(layer.width, dtype=torch.float64)
    spread = layer(probe)
    torch.testing.assert_close(layer.deviations(probe).std(1), spread, rtol=0.05, atol=0.0)
    assert ((layer.members.mean(0) - own).abs() < 5 * spread / 20000**0.5).all()
