"""Checkpoints that metatrain wrote: what they predict, and how they are upgraded."""

from __future__ import annotations

import copy
import gzip
import json
import os

import numpy as np
import pytest
import torch
from ase.io import read

from pet_finetune.checkpoint.archive import TorchArchive
from pet_finetune.checkpoint.metatrain import read_raw
from pet_finetune.checkpoint.metatrain_formats import RawCheckpoint, upgrade
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint, load_numbers
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import CheckpointError

VERSIONS = ["v1_trainer-v1", "v4_trainer-v3", "v6_trainer-v5", "v7_trainer-v7", "v8_trainer-v7"]
VERSIONS += ["v9_trainer-v10", "v10_trainer-v12", "v12_trainer-v13", "v15_trainer-v13"]
VERSIONS += ["v16_trainer-v15"]
FILES = [f"model-{version}.ckpt" for version in VERSIONS]


@pytest.fixture
def reference(shared_dir, tmp_path):
    """Unpack one of the reference files and return its path."""
    folder = shared_dir / "reference" / "metatrain-checkpoints"
    if not folder.is_dir():
        pytest.skip("needs ../shared/reference/metatrain-checkpoints")

    def unpack(name):
        path = tmp_path / name
        path.write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
        return path

    return unpack


@pytest.fixture
def foundation(shared_dir):
    path = shared_dir / "foundation" / "pet-xtb-v0.ckpt"
    if not path.is_file():
        pytest.skip("needs ../shared/foundation")
    return path


def check_predictions(model, folder, name):
    frames = read(folder / "structures.xyz", ":")
    expected = json.loads((folder / "predictions.json").read_text())[name]
    energies = np.array([frame["energy"] for frame in expected])
    forces = np.concatenate([frame["forces"] for frame in expected])
    sizes = np.array([len(frame) for frame in frames])
    predicted = model.predict(batch_from_atoms(frames, model.cutoff, model.dtype))
    np.testing.assert_allclose(
        predicted.energy.detach().numpy() / sizes, energies / sizes, rtol=0, atol=1e-5
    )
    # The reference is float32 as well, and the oldest models have forces of 24 eV/A; the test in
    # double precision below is the sharp one.
    np.testing.assert_allclose(predicted.forces.detach().numpy(), forces, rtol=5e-5, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_era_predict_what_metatrain_says(reference, shared_dir, name):
    model = load_checkpoint(reference(name)).model
    check_predictions(model, shared_dir / "reference" / "metatrain-checkpoints", name)


def test_the_foundation_predicts_what_metatrain_says(foundation, shared_dir):
    loaded = load_checkpoint(foundation)
    assert loaded.notices == ()
    assert loaded.model.species == (1, 6, 7, 8, 9, 15, 16, 17)
    check_predictions(loaded.model, shared_dir / "foundation", foundation.name)


def test_the_foundation_in_our_format_is_the_same_and_small(foundation, tmp_path):
    model = load_checkpoint(foundation).model
    path = save_checkpoint(tmp_path / "foundation.ckpt", model)
    assert path.stat().st_size < 8_000_000 < foundation.stat().st_size
    copied = load_checkpoint(path).model
    one, two = model.state_dict(), copied.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)
    assert (model.hypers, model.targets) == (copied.hypers, copied.targets)


def metatrain_upgrade(path):
    """A file as metatrain itself reads and upgrades it."""
    pytest.importorskip("metatrain.pet")
    from metatrain.pet import PET

    return PET.upgrade_checkpoint(torch.load(path, weights_only=False, map_location="cpu"))


@pytest.mark.parametrize("name", FILES)
def test_the_upgrade_is_metatrains_own(reference, name):
    path = reference(name)
    theirs = metatrain_upgrade(path)
    with TorchArchive(path) as archive:
        ours = upgrade(read_raw(archive, archive.content()), name)
    expected = {
        key: value
        for key, value in theirs["best_model_state_dict"].items()
        if key.startswith("backend.")
    }
    network = {key: value for key, value in ours.state.items() if key.startswith("backend.")}
    assert network.keys() == expected.keys()
    assert all(torch.equal(network[key], expected[key]) for key in expected)
    assert ours.hypers == theirs["model_data"]["model_hypers"]


def test_the_large_models_are_upgraded_as_metatrain_does():
    """No such file is small enough to keep, so names and shapes are checked on made-up ones."""
    checkpoints = pytest.importorskip("metatrain.pet.checkpoints")
    state = {
        "species_to_species_index": torch.tensor([-1, 0, 1]),
        "node_embedding.weight": torch.rand(3, 16),
        "embedding.weight": torch.rand(3, 4),
        "combination_rmsnorms.0.weight": torch.rand(8),
        "gnn_layers.0.edge_embedder.weight": torch.rand(4, 4),
        "gnn_layers.1.neighbor_embedder.weight": torch.rand(3, 4),
        "gnn_layers.0.trans.layers.0.mlp.w_in.weight": torch.rand(16, 4),
        "gnn_layers.0.trans.layers.0.center_mlp.w_in.weight": torch.rand(16, 4),
        "node_last_layers.energy.0.energy___0.weight": torch.rand(1, 4),
    }
    hypers = {"d_pet": 4, "cutoff_width": 0.2}
    theirs = {
        "model_ckpt_version": 7,
        "model_state_dict": copy.deepcopy(state),
        "best_model_state_dict": {},
        "model_data": {"model_hypers": dict(hypers)},
    }
    for version in (7, 8, 9, 10, 11, 13, 14, 15):
        getattr(checkpoints, f"model_update_v{version}_v{version + 1}")(theirs)
    ours = upgrade(RawCheckpoint(7, dict(hypers), state, ("energy",)), "file")
    expected = theirs["best_model_state_dict"]
    assert ours.state.keys() == expected.keys()
    assert all(torch.equal(ours.state[key], expected[key]) for key in expected)
    assert ours.hypers == theirs["model_data"]["model_hypers"]


STRUCTURES = ["CH3OH", "H2O", "CO2", "H", "crystal"]


def frames_of(names):
    from ase import Atoms
    from ase.build import molecule

    crystal = Atoms("CO", [[0, 0, 0], [0.9, 0.3, 0.2]], cell=[3.0, 3.3, 3.6], pbc=True)
    frames = [crystal if n == "crystal" else Atoms("H") if n == "H" else molecule(n) for n in names]
    generator = np.random.default_rng(0)
    for frame in frames:
        frame.positions += generator.normal(scale=0.05, size=frame.positions.shape)
    return frames


def metatrain_model(unit="eV", lora=False, **hypers):
    """A small random model of metatrain in float64, with a baseline and a scale."""
    pytest.importorskip("metatrain.pet")
    import metatensor.torch as mts
    from metatensor.torch import TensorMap
    from metatrain.pet import PET
    from metatrain.pet.modules.finetuning import apply_finetuning_strategy
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info
    from omegaconf import OmegaConf

    target = OmegaConf.create({"quantity": "energy", "unit": unit})
    info = DatasetInfo(
        "angstrom",
        [1, 6, 8],
        {name: get_energy_target_info(name, target) for name in ("energy", "energy/other")},
    )
    options = get_default_hypers("pet")["model"]
    small = {"cutoff": 3.0, "d_pet": 8, "d_node": 12, "d_head": 6, "d_feedforward": 10}
    options |= {**small, "num_heads": 2, **hypers}
    torch.manual_seed(0)
    model = PET(options, info)
    if lora:
        config = {"rank": 2, "alpha": 5.0, "target_modules": ["input_linear", "w_in"]}
        strategy = {"method": "lora", "config": config, "inherit_heads": {}}
        model = apply_finetuning_strategy(model, strategy)
    model = model.to(torch.float64).eval()
    for index, name in enumerate(info.targets):
        composition, scaler = model.additive_models[0], model.scaler
        for module, suffix, change in (
            (composition, "_composition_buffer", lambda v: v - 40 * torch.arange(1.0, len(v) + 1)),
            (scaler, "_scaler_buffer", lambda v, i=index: v * (0.3 + i)),
        ):
            old = mts.load_buffer(getattr(module, name + suffix))
            blocks = [block.copy() for block in old.blocks()]
            for block in blocks:
                block.values[:] = change(block.values.flatten()).reshape(block.values.shape)
            setattr(module, name + suffix, mts.save_buffer(TensorMap(old.keys, blocks)))
    model.additive_models[0].sync_tensor_maps()
    model.scaler.sync_tensor_maps()
    return model


def metatrain_predict(model, frames, target):
    """Energies and forces of metatrain's own module, in float64."""
    from metatomic.torch import ModelOutput, systems_to_torch
    from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists

    systems = systems_to_torch(frames, dtype=torch.float64, positions_requires_grad=True)
    lists = [nl for module in model.modules() if hasattr(module, "requested_neighbor_lists")
             for nl in module.requested_neighbor_lists()]  # fmt: skip
    systems = [get_system_with_neighbor_lists(system, lists) for system in systems]
    output = model(systems, {target: ModelOutput(unit="", sample_kind="system")})
    energies = output[target].block().values.squeeze(-1)
    gradients = torch.autograd.grad(energies.sum(), [s.positions for s in systems])
    return energies.detach(), -torch.cat(gradients)


@pytest.mark.parametrize(
    ("unit", "factor", "lora", "hypers"),
    [
        ("eV", 1.0, False, {}),
        ("eV", 1.0, False, {"zbl": True}),
        ("kcal/mol", 0.0433641042, False, {}),
        ("eV", 1.0, True, {}),
        ("eV", 1.0, True, {"d_node": 8, "activation": "SiLU"}),
    ],
)
@pytest.mark.parametrize("target", ["energy", "energy/other"])
def test_a_file_written_today_predicts_the_same(tmp_path, unit, factor, lora, hypers, target):
    theirs = metatrain_model(unit, lora, **hypers)
    content = theirs.get_checkpoint()
    content["best_model_state_dict"] = content["model_state_dict"]
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    loaded = load_checkpoint(path)
    assert bool(loaded.notices) == lora
    frames = frames_of(STRUCTURES)
    energies, forces = metatrain_predict(theirs, frames, target)
    ours = loaded.model.predict(
        batch_from_atoms(frames, loaded.model.cutoff, torch.float64), target
    )
    assert forces.abs().max() > 1e-3
    torch.testing.assert_close(ours.energy.detach(), energies * factor, rtol=1e-7, atol=1e-9)
    # metatrain's ZBL has screening lengths of single precision, whatever the model's.
    rtol = 1e-6 if hypers.get("zbl") else 1e-7
    torch.testing.assert_close(ours.forces.detach(), forces * factor, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_era_agree_in_double_precision(reference, shared_dir, name):
    """Against metatrain's own module, filled by metatrain's own upgrade of the same file."""
    from metatrain.pet import PET

    path = reference(name)
    theirs = PET.load_checkpoint(metatrain_upgrade(path), "export").to(torch.float64).eval()
    frames = read(shared_dir / "reference" / "metatrain-checkpoints" / "structures.xyz", ":")
    energies, forces = metatrain_predict(theirs, frames, "energy")
    model = load_checkpoint(path).model.to(torch.float64)
    ours = model.predict(batch_from_atoms(frames, model.cutoff, torch.float64))
    torch.testing.assert_close(ours.energy.detach(), energies, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(ours.forces.detach(), forces, rtol=1e-9, atol=1e-8)


def test_metatrain_is_not_needed(reference):
    """A fresh interpreter in which importing metatrain or metatomic fails."""
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['metatrain'] = sys.modules['metatomic'] = None\n"
        "from pet_finetune.checkpoint.opening import load_checkpoint\n"
        "print(load_checkpoint(sys.argv[1]).model.species)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(reference(FILES[-1]))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.stdout.strip() == "(1, 6, 7, 8)", done.stderr


@pytest.mark.parametrize(("unit", "factor"), [("eV", 1.0), ("kcal/mol", 0.0433641042)])
def test_numbers_of_metatrains_composition_and_scaler(tmp_path, unit, factor):
    """Their files have no network, and the baselines and scales that a PET with them has."""
    theirs = metatrain_model(unit)
    parts = {"composition": theirs.additive_models[0], "scaler": theirs.scaler}
    read = {}
    for name, part in parts.items():
        content = part.get_checkpoint()
        assert content["architecture_name"] == name
        torch.save(content, tmp_path / name)
        read[name] = load_numbers(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"architecture '{name}'"):
            load_checkpoint(tmp_path / name)
    species, baselines = read["composition"]
    assert list(species) == [1, 6, 8]
    for index, (baseline, scale) in enumerate(zip(baselines, read["scaler"][1], strict=True)):
        assert baseline.spec.name == scale.spec.name == ("energy", "energy/other")[index]
        expected = -40.0 * torch.arange(1.0, 4.0, dtype=torch.float64) * factor
        torch.testing.assert_close(baseline.composition, expected, rtol=1e-7, atol=0)
        assert scale.scale == pytest.approx((0.3 + index) * factor, rel=1e-7)
