"""The fused kernels change how fast a potential is, and nothing else."""

from __future__ import annotations

import pytest
import torch

from models import METHODS, crystal, ethanol, random_potential, trained_adapter
from pet_finetune.backends.choice import EAGER, using
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential

# Widths that the fused projections take (multiples of 16), and the variants of a block.
WIDE = {"d_pet": 32, "d_node": 48, "d_head": 16, "d_feedforward": 32, "num_heads": 2}
VARIANTS = {
    "default": {},
    "equal widths": {"d_node": 32},
    "layer norm, silu": {"normalization": "LayerNorm", "activation": "SiLU"},
    "post norm": {"transformer_type": "PostLN"},
    "residual": {"featurizer_type": "residual"},
    "adaptive cutoff": {"num_neighbors_adaptive": 4.0},
    "conditioned": {"system_conditioning": True},
    "narrow": {"d_pet": 8, "d_node": 12, "d_head": 6, "d_feedforward": 10},
}
# In float32 both ways are off by a few 1e-5 of the largest value, measured against float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


pytestmark = pytest.mark.usefixtures("with_kernels")


def everything(model: Potential, batch: Batch) -> dict[str, torch.Tensor]:
    """Energies, forces, stresses and the parameter gradients of a loss on all three."""
    parameters = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    got = model.predict(batch, forces=True, stress=True, create_graph=True)
    loss = (got.energy**2).sum() + (got.forces**2).sum() + (got.stress**2).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    result = {"energy": got.energy, "forces": got.forces, "stress": got.stress}
    result |= dict(zip(parameters, gradients, strict=True))
    return {name: value.detach() for name, value in result.items() if value is not None}


def assert_same_both_ways(model: Potential, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff, dtype)
    fused = everything(model, batch)
    with using(EAGER, model):
        plain = everything(model, batch)
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        size = max(float(value.abs().max()), 1e-30)
        torch.testing.assert_close(
            fused[name] / size, value / size, atol=TOLERANCE[dtype], rtol=0, msg=name
        )


def operations(model: Potential) -> set[str]:
    """The names of our own operations that a prediction goes through."""
    batch = batch_from_atoms(ethanol(), model.cutoff, model.dtype)
    with torch.profiler.profile() as seen:
        model.predict(batch)
    return {e.key for e in seen.key_averages() if e.key.startswith("pet_finetune::")}


def test_a_prediction_runs_them():
    """Compiled and loaded is not yet used."""
    model = random_potential(**WIDE)
    assert {"pet_finetune::attention", "pet_finetune::projection"} <= operations(model)
    with using(EAGER, model):
        assert operations(model) == set()


def test_a_fault_in_one_of_them_is_found(monkeypatch):
    multiply = torch.ops.pet_finetune.attention
    monkeypatch.setattr(
        torch.ops.pet_finetune, "attention", lambda *given: multiply(*given) * (1 + 1e-9)
    )
    with pytest.raises(AssertionError):
        assert_same_both_ways(random_potential(**WIDE), torch.float64)


@DTYPES
@pytest.mark.parametrize("hypers", VARIANTS.values(), ids=VARIANTS)
def test_a_whole_potential_is_the_same(hypers, dtype):
    assert_same_both_ways(random_potential(**{**WIDE, **hypers}), dtype)


@DTYPES
@pytest.mark.parametrize(
    "config",
    [*METHODS.values(), {"target_modules": "all-linear"}, {"rank": 17, "alpha": 5.0}],
    ids=[*METHODS, "all linear", "high rank"],
)
def test_a_potential_with_an_adapter_is_the_same(config, dtype):
    model = trained_adapter(random_potential(**WIDE), **config)
    assert_same_both_ways(model.train(), dtype)


def test_frozen_weights_that_change_are_read_again():
    """Their packed form is kept from call to call."""
    model = random_potential(**WIDE).requires_grad_(False)
    batch = batch_from_atoms(ethanol(), model.cutoff, torch.float64)
    before = model.predict(batch).energy
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.1)
    after = model.predict(batch).energy
    with using(EAGER, model):
        torch.testing.assert_close(after, model.predict(batch).energy)
    assert not torch.allclose(before, after)
