"""The network as TorchScript: the same numbers from the same text."""

from __future__ import annotations

import pytest
import torch

from models import KINDS, all_structures, ethanol, random_potential, trained_adapter
from pet_finetune.adapters.inject import merged_copy
from pet_finetune.backends.choice import EAGER, using
from pet_finetune.data.labelled_batch import batch_from_atoms

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")


def outputs_and_slopes(network, batch):
    vectors = batch.edge_vectors.detach().requires_grad_()
    found = network(batch._replace(edge_vectors=vectors), ["energy"])["energy"]
    return found, *torch.autograd.grad(found.square().sum(), vectors)


@pytest.mark.parametrize("hypers", KINDS.values(), ids=KINDS)
def test_the_scripted_network_equals_the_eager_one(hypers):
    network = random_potential(targets=("energy", "energy/pbe"), **hypers).network
    batch = batch_from_atoms(list(all_structures().values()), 3.5)
    scripted = torch.jit.script(network)
    with using(EAGER, network):
        expected = outputs_and_slopes(network, batch)
    for own, value in zip(outputs_and_slopes(scripted, batch), expected, strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=1e-10)
    assert float(expected[1].abs().max()) > 1e-3
    assert list(scripted(batch, ["energy/pbe"])) == ["energy/pbe"]


def test_prompts_and_merged_adapters_can_be_scripted():
    for config in ({"num_prompts": 2}, {"target_modules": "all-linear"}):
        model = merged_copy(trained_adapter(random_potential(), **config))
        batch = batch_from_atoms(ethanol(), model.cutoff)
        found = torch.jit.script(model.network)(batch, ["energy"])["energy"]
        torch.testing.assert_close(found, model.network(batch, ["energy"])["energy"])
