"""On a GPU all of a model is on the GPU: followed on torch's device without numbers, `meta`.

Whatever is made on the CPU by default is seen there as it would be beside a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import KINDS, METHODS, PROPERTIES, crystal, ethanol, random_potential, trained_adapter
from pet_finetune.backends.choice import EAGER, use_backend
from pet_finetune.data.labelled_batch import batch_from_atoms

AWAY = torch.device("meta")


class OnTheCpu(TorchDispatchMode):
    """Notes operations whose result, of more than one number, is on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        results = operation(*arguments, **(named or {}))
        tensors = [leaf for leaf in tree_leaves(results) if torch.is_tensor(leaf)]
        if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
            self.found.add(str(operation))
        return results


@pytest.mark.parametrize(
    ("hypers", "method"),
    [
        ({}, None),
        *((hypers, None) for hypers in KINDS.values()),
        *(({}, METHODS[name]) for name in ("lora", "dora", "prompt")),
    ],
)
@pytest.mark.parametrize("trains", [True, False], ids=["training", "prediction"])
def test_nothing_of_a_step_is_on_the_cpu(hypers, method, trains):
    model = random_potential(**hypers)
    if method is not None:
        trained_adapter(model, **method)
    for spec in PROPERTIES[:4] if method is None else ():
        model.add_target(spec)
    model.train(trains)
    use_backend(model, EAGER)
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff)
    batch = model.network.neighborhood.with_edges(batch)  # what reads numbers
    model, batch = model.to(AWAY), batch.to(AWAY)
    with OnTheCpu() as listener:
        wanted = {name: (spec.is_energy,) * 2 for name, spec in model.targets.items()}
        found = model.predict_targets(batch, wanted, create_graph=trains)
        forces, stress = found["energy"].forces, found["energy"].stress
        assert forces.device == stress.device == AWAY
        if trains:
            loss = found["energy"].energy.sum() + forces.square().sum() + stress.square().sum()
            loss.backward(inputs=[p for p in model.parameters() if p.requires_grad])
    assert listener.found == set()


def test_what_is_on_the_cpu_is_seen():
    with OnTheCpu() as listener:
        torch.zeros(3, device=AWAY) * 2
        assert listener.found == set()
        torch.zeros(3) * 2
    assert listener.found
