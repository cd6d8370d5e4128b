"""How much a prediction of a large structure keeps, counted in tensors; and it costs no bit."""

from __future__ import annotations

import pytest
import torch
from ase.build import bulk

from models import random_potential, trained_adapter
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential

WIDTH = 32
# The proportions of metatrain's defaults.
SHAPE = {"d_pet": WIDTH, "d_node": 2 * WIDTH, "d_head": WIDTH, "d_feedforward": 2 * WIDTH,
         "num_heads": 2, "num_attention_layers": 2, "cutoff": 5.0, "normalization": "RMSNorm",
         "activation": "SwiGLU"}  # fmt: skip
# Numbers an edge, in units of its token: two for each of four blocks, one for each of two layers'
# inputs, two for each of two combinations, two for the head; and centre tokens in the same arrays.
MOST = 17
# What it would be with all that lies between the layers.
USUAL = 45


pytestmark = pytest.mark.usefixtures("with_kernels")


@pytest.fixture(autouse=True)
def few_numbers_are_many(monkeypatch):
    monkeypatch.setattr("pet_finetune.nn.projection.MANY_NUMBERS", 512 * WIDTH)


def silicon(model: Potential) -> Batch:
    atoms = bulk("Si", cubic=True) * (3, 3, 3)
    atoms.rattle(0.05, seed=0)
    return batch_from_atoms([atoms], model.cutoff, model.dtype)


def kept(model: Potential, batch: Batch, create_graph: bool) -> float:
    """Bytes that a prediction's graph holds on to for its edges, in units of their tokens."""
    storages: dict[int, int] = {}
    edges = len(model.network.neighborhood(batch).centers)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dim() > 1 and len(tensor) >= edges:  # not those of weights and atoms
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        energies = model.network(batch, ("energy",), not create_graph)["energy"]
    del energies
    return sum(storages.values()) / (edges * WIDTH * model.dtype.itemsize)


def test_a_prediction_keeps_the_inputs_of_its_layers_alone():
    model = random_potential(dtype=torch.float32, **SHAPE).requires_grad_(False)
    batch = silicon(model)
    batch.edge_vectors.requires_grad_()
    assert kept(model, batch, create_graph=True) > USUAL
    assert kept(model, batch, create_graph=False) < MOST


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapted"])
def test_what_is_predicted_is_the_same_to_the_last_bit(trains, adapter):
    model = random_potential(dtype=torch.float32, **SHAPE)
    model = (trained_adapter(model) if adapter else model).eval()
    model.requires_grad_(trains)
    batch = silicon(model)
    usual = model.predict(batch, stress=True, create_graph=True)
    compact = model.predict(batch, stress=True)
    for name in ("energy", "atom_energies", "forces", "stress"):
        assert torch.equal(getattr(usual, name).detach(), getattr(compact, name)), name


def test_several_energies_of_one_graph():
    model = random_potential(targets=("energy", "other"), dtype=torch.float32, **SHAPE)
    batch = silicon(model)
    both = model.predict_many(batch, {"energy": (True, True), "other": (True, False)})
    for name, found in both.items():
        assert torch.equal(found.forces, model.predict(batch, name).forces)
