"""A potential that is written down as instructions predicts what it predicts module by module."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms

from models import METHODS, crystal, ethanol, heat, random_potential, trained_adapter
from pet_finetune import PETCalculator
from pet_finetune.backends.choice import (
    EAGER,
    FUSED_BFLOAT16,
    use_backend,
    using,
)
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.graph import Batch
from pet_finetune.model import inference as module
from pet_finetune.model.inference import StaticEnergy
from pet_finetune.model.potential import Potential

WIDE = {"d_pet": 32, "d_node": 48, "d_head": 16, "d_feedforward": 32, "num_heads": 2}
VARIANTS = {
    "default": {},
    "two blocks a layer": {"num_attention_layers": 2},
    "equal widths": {"d_node": 32},
    "layer norm, silu": {"normalization": "LayerNorm", "activation": "SiLU"},
    "post norm": {"transformer_type": "PostLN"},
    "post norm, equal widths": {"transformer_type": "PostLN", "d_node": 32},
    "residual": {"featurizer_type": "residual"},
    "cosine": {"cutoff_function": "Cosine"},
    "adaptive cutoff": {"num_neighbors_adaptive": 4.0},
    "repulsion": {"zbl": True},
    "conditioned": {"system_conditioning": True},
}
# In float32 both ways are off by a few 1e-5 of the largest value, measured against float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def _any_size(with_kernels, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 1_000_000)


def assert_same(model: Potential, structures: list[Atoms], margin: float = 0.0) -> None:
    """The margin is that of a neighbour list with a skin: edges beyond the cutoff are left out."""
    model = model.eval().requires_grad_(False)
    batch = batch_from_atoms(structures, model.cutoff + margin, model.dtype)
    found = StaticEnergy(model, "energy").predict(batch, stress=True)
    assert found is not None
    with using(EAGER, model):
        wanted = model.predict(batch, forces=True, stress=True)
    for name in ("energy", "atom_energies", "forces", "stress"):
        value = getattr(wanted, name)
        size = max(float(value.abs().max()), 1e-30)
        got = getattr(found, name)
        assert got.dtype == value.dtype
        assert not got.requires_grad
        torch.testing.assert_close(
            got / size, value / size, atol=TOLERANCE[model.dtype], rtol=0, msg=name
        )


@DTYPES
@pytest.mark.parametrize("hypers", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_network_is_the_same(hypers, dtype):
    model = random_potential(**{**WIDE, **hypers}).to(dtype)
    assert_same(model, [ethanol(), crystal()], margin=0.5)


def test_a_fault_is_found(monkeypatch):
    predict = StaticEnergy.predict

    def a_little_more(self: StaticEnergy, batch: Batch, **options):
        found = predict(self, batch, **options)
        return replace(found, forces=found.forces * (1 + 1e-9))

    monkeypatch.setattr(StaticEnergy, "predict", a_little_more)
    with pytest.raises(AssertionError):
        assert_same(random_potential(**WIDE), [ethanol()])


def test_more_rows_than_a_piece_and_odd_numbers_of_threads():
    model = random_potential(**WIDE)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(model, [crystal().repeat((2, 2, 1)), ethanol()])
    finally:
        torch.set_num_threads(before)


def test_atoms_without_neighbours():
    alone = Atoms("HO", positions=[[0, 0, 0], [9, 0, 0]])
    assert_same(random_potential(**WIDE), [alone])
    assert_same(random_potential(**WIDE), [Atoms("H"), ethanol()])


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_adapters_are_part_of_it_or_left_to_the_modules(config):
    model = trained_adapter(random_potential(**WIDE), **config)
    model = model.eval().requires_grad_(False)
    batch = batch_from_atoms(ethanol(), model.cutoff, model.dtype)
    found = StaticEnergy(model, "energy").predict(batch)
    if "num_prompts" in config:
        assert found is None
        return
    wanted = model.predict(batch)
    torch.testing.assert_close(found.forces, wanted.forces, atol=1e-10, rtol=0)


def test_weights_that_change_are_read_again():
    model = random_potential(**WIDE).eval().requires_grad_(False)
    frozen = StaticEnergy(model, "energy")
    batch = batch_from_atoms(ethanol(), model.cutoff, torch.float64)
    before = frozen.predict(batch).energy
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.1)
    after = frozen.predict(batch).energy
    torch.testing.assert_close(after, model.predict(batch).energy)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("what", ["narrow", "many", "halves", "off"])
def test_what_is_left_to_the_modules(what, monkeypatch):
    hypers = {"d_pet": 8, "d_node": 12, "d_head": 6} if what == "narrow" else {}
    model = random_potential(**{**WIDE, **hypers}, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    batch = batch_from_atoms(ethanol(), model.cutoff, torch.float32)
    if what == "many":
        monkeypatch.setattr(module, "MOST_ROWS", 8)
    frozen = StaticEnergy(model, "energy")
    if what == "off":
        with using(EAGER, model):
            assert frozen.predict(batch) is None
    elif what == "halves":
        with using(FUSED_BFLOAT16, model):
            assert frozen.predict(batch) is None
    else:
        assert frozen.predict(batch) is None


def test_a_calculator_uses_it_and_says_the_same(monkeypatch):
    calls = []
    predict = StaticEnergy.predict

    def counted(self: StaticEnergy, batch: Batch, **options):
        found = predict(self, batch, **options)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(StaticEnergy, "predict", counted)
    model = random_potential(**WIDE)
    calc = PETCalculator(model, device="cpu")
    atoms = ethanol()
    heat(atoms, 300)
    for _ in range(3):
        atoms.positions += 0.05 * atoms.get_momenta()
        forces = calc.get_forces(atoms)
        eager = PETCalculator(model, device="cpu")
        use_backend(eager.model, EAGER)
        wanted = eager.get_forces(atoms)
        assert np.allclose(forces, wanted, atol=1e-12)
    assert calls[::2] == [True] * 3
