"""The file of an exported model: its metadata, its reach, and that it is whole or not there."""

from __future__ import annotations

import copy
import json
import resource
import sys
import warnings
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from ase import Atoms
from metatomic.torch import AtomisticModel, load_atomistic_model, read_model_metadata

from models import ethanol, random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import CheckpointError
from pet_finetune.export.export import export_model
from pet_finetune.export.write import ModelCheck, interaction_range, write_model
from pet_finetune.model.potential import Potential

OUTPUTS = {"energy": "energy"}


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    model = random_potential(targets=("energy/pbe",), dtype=torch.float32, zbl=True)
    parent = {"parent": "some foundation"}
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", model, provenance=parent)
    path = tmp_path / "deep" / "water.pt"
    export_model(checkpoint, path, authors=["A. Uthor"])
    metadata = read_model_metadata(str(path))
    assert (metadata.name, metadata.authors) == ("water", ["A. Uthor"])
    assert "2305.19302" in metadata.references["architecture"][0]
    assert json.loads(metadata.extra["provenance"]) == parent
    assert len(metadata.extra["fingerprint"]) == 64
    known = load_atomistic_model(str(path)).capabilities()
    assert known.atomic_types == list(model.species)
    assert (known.dtype, known.length_unit) == ("float64", "angstrom")
    assert known.supported_devices == ["cuda", "cpu"]
    assert known.interaction_range == interaction_range(model)
    assert {name: known.outputs[name].unit for name in known.outputs} == {
        "energy": "eV",
        "energy/pbe": "eV",
    }
    with ZipFile(path) as archive:
        # The fused kernels are loaded in this process and are not asked for in another one.
        (listed,) = (n for n in archive.namelist() if n.endswith("extra/extensions"))
        assert archive.read(listed) == b"[]"
    assert [entry.name for entry in path.parent.iterdir()] == ["water.pt"]


def test_a_unit_of_ones_own_is_left_out(tmp_path: Path) -> None:
    from pet_finetune.keys import TargetSpec

    model = random_potential()
    model.add_target(TargetSpec("mtt::smell", "smell", "olf"))
    write_model(tmp_path / "model.pt", [model], {"mtt::smell": "mtt::smell"}, "model")
    known = load_atomistic_model(str(tmp_path / "model.pt")).capabilities()
    assert known.outputs["mtt::smell"].unit == ""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def save(self: AtomisticModel, file: str) -> None:
        Path(file).write_bytes(b"half of")
        raise error

    monkeypatch.setattr(AtomisticModel, "save", save)
    wanted = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        write_model(path, [random_potential()], OUTPUTS, "model")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_torchs_warnings_of_torchscript_end_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing metatensor makes such warnings, errors under ``python -W error``."""

    def find(name: str) -> Path:
        warnings.warn("`torch.jit.interface` is deprecated", DeprecationWarning, stacklevel=1)
        raise CheckpointError("there is none")

    monkeypatch.setattr(sys.modules["pet_finetune.export.export"], "find_model", find)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="there is none"):
            export_model("model.ckpt", "model.pt")


def test_a_write_that_fails_on_the_way_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # torch's own writer would end the process here
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(CheckpointError, match=r"cannot be written \(File too large\)"):
            write_model(path, [random_potential()], OUTPUTS, "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_a_file_that_says_something_else_is_not_written(tmp_path: Path) -> None:
    model = random_potential()
    check = ModelCheck([model], [atoms_to_structure(ethanol(), 0)], OUTPUTS)
    other = copy.deepcopy(model)
    other.composition.set("energy", other.composition.get("energy") + 1e-3)
    with pytest.raises(CheckpointError, match="'energy' differs"):
        write_model(tmp_path / "model.pt", [other], OUTPUTS, "model", check=check)
    assert not list(tmp_path.iterdir())


CHAINS = {
    "feedforward": {"num_gnn_layers": 2},
    "residual": {"num_gnn_layers": 2, "featurizer_type": "residual"},
    "adaptive": {"num_gnn_layers": 1, "num_neighbors_adaptive": 1.0},
    "adaptive residual": {
        "num_gnn_layers": 2,
        "featurizer_type": "residual",
        "num_neighbors_adaptive": 1.0,
    },
    "zbl": {"num_gnn_layers": 1, "featurizer_type": "residual", "cutoff": 1.0, "zbl": True},
}


@pytest.mark.parametrize("hypers", CHAINS.values(), ids=CHAINS)
def test_the_interaction_range_is_how_far_an_atom_sees(hypers: dict) -> None:
    """On a chain of atoms that see their nearest neighbours only: which ones the end depends on."""
    model = random_potential(**hypers)
    spacing = 0.9 * model.cutoff
    chain = Atoms("Si" * 8, positions=[[spacing * index, 0.1 * index, 0] for index in range(8)])
    reached = farthest_atom_seen(model, chain)
    assert reached == pytest.approx(interaction_range(model) / model.cutoff)


def farthest_atom_seen(model: Potential, chain: Atoms) -> int:
    """The last atom whose position the energy of the first one depends on."""
    batch = batch_from_atoms(chain, model.cutoff)
    batch.edge_vectors.requires_grad_(True)
    first = model.network(batch, ("energy",))["energy"][0].sum()
    repulsion = model._repulsion(batch)
    if repulsion is not None:
        first = first + repulsion[0]
    (slopes,) = torch.autograd.grad(first, batch.edge_vectors)
    seen = slopes.abs().sum(1) > 0
    return int(torch.maximum(batch.centers[seen], batch.neighbors[seen]).max())
