"""What makes a CPU wait for a GPU, found without one; and what is made on the CPU by default.

A GPU computes while the CPU is steps ahead, until the CPU asks for a number. Every operation goes
through torch's dispatcher, and reading goes through a few methods of tensors: both are listened to.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pet_finetune
from models import crystal, ethanol, random_potential
from pet_finetune import PETCalculator
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.backends.choice import EAGER, use_backend, using
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from pet_finetune.nn.neighborhood import NeighborhoodBuilder, SteadyEdges
from pet_finetune.training.optimizer import make_optimizer
from trainers import make_trainer

#: Operations that read a number, or whose result's shape depends on values.
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "item", "is_nonzero", "equal", "bincount",
}  # fmt: skip
#: Ways of a tensor to plain numbers that torch's dispatcher does not hear of on a CPU.
METHODS = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")
#: What still waits in training: where a part of a batch is rotated again. Shorten this list.
KNOWN = {"near", "_cuts", "keep_edges", "rotate_batch", "first", "rotate_graphs"}
SOURCES = Path(pet_finetune.__file__).parent


def place():
    """The innermost function of the package that is being run."""
    lines = [f for f in traceback.extract_stack() if str(SOURCES) in f.filename]
    return lines[-1].name if lines else "the test"


class Listener(TorchDispatchMode):
    """Counts what would make a CPU wait, by the place in the code."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        name = operation.__name__.partition(".")[0]
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in arguments[1]
        )
        if name in READS or masks:
            self.found[place(), name] += 1
        return operation(*arguments, **(named or {}))


@contextmanager
def listening(monkeypatch, model=None):
    """What was found to wait while the context was open: places and ways, with how often."""
    listener = Listener()
    models = [] if model is None else [model]
    with monkeypatch.context() as patched, listener, using(EAGER, *models):
        for method in METHODS:
            original = getattr(torch.Tensor, method)

            def heard(self, *arguments, _method=method, _original=original, **named):
                listener.found[place(), _method] += 1
                return _original(self, *arguments, **named)

            patched.setattr(torch.Tensor, method, heard)
        yield listener.found


def step(trainer, group, metrics):
    trainer.step(iter(group), len(group), metrics)
    trainer.progress.step += 1


@pytest.mark.parametrize(
    "kind",
    [
        {"method": "lora"},
        {"method": "full", "gradient_checkpointing": True, "ema": 0.9},
        {"method": "lora", "rotational_consistency": {"weight": 1.0, "fraction": 0.5}},
        {"method": "full", "gradient_accumulation_steps": 2, "label_noise": {"energy": 0.1}},
    ],
    ids=["lora", "full", "consistency", "accumulation"],
)
def test_a_training_step_reads_one_tensor(kind, monkeypatch):
    trainer = make_trainer(optimizer="adamw", **kind)
    batches = list(trainer.batches(0))[:2]
    with using(EAGER, trainer.model):  # as the loader's thread does for a GPU
        ready = trainer.model.network.neighborhood.with_edges
        batches = [replace(batch, graph=ready(batch.graph)) for batch in batches]
        metrics = trainer.progress.metrics(list(trainer.objectives))
        step(trainer, batches, metrics)  # what is made once is there
    with listening(monkeypatch, trainer.model) as found:
        step(trainer, batches, metrics)
    assert found.pop(("check_and_clip", "tolist")) == 1
    assert {where for where, _ in found} <= (KNOWN if "rotational_consistency" in kind else set())


def test_evaluation_reads_nothing_of_a_batch(monkeypatch):
    model = random_potential().eval()
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff, model.dtype)
    with using(EAGER, model):  # as the loader's thread does for a GPU
        batch = model.network.neighborhood.with_edges(batch)
    with listening(monkeypatch, model) as found:
        model.predict(batch, "energy", stress=True)
    assert not found


def md_step(calculator, monkeypatch):
    """What waits in a step between two builds of the neighbour list; forces before and after."""
    atoms = crystal()
    atoms.calc = calculator
    forces = []
    for position in (0.0, 0.01):
        atoms.positions[0, 0] += position
        with listening(monkeypatch, atoms.calc.model) as found:
            forces.append(atoms.get_forces())
    # `_holds` looks at positions that ASE has on the CPU.
    return {where: n for where, n in found.items() if where[0] != "_holds"}, np.stack(forces)


#: One cutoff for all, and two kinds of adaptive ones, with what chooses edges on a CPU.
CUTOFFS = [
    ({}, 1),
    ({"num_neighbors_adaptive": 4.0, "adaptive_cutoff_method": "solver"}, 2),
    ({"num_neighbors_adaptive": 4.0, "adaptive_cutoff_method": "grid"}, 2),
]


def calculators(hypers):
    """One that computes as on a GPU, and one as on a CPU."""
    own, other = (
        PETCalculator(random_potential(**hypers), device="cpu", skin=2.0) for _ in range(2)
    )
    own._steady = SteadyEdges(own.model.network.neighborhood)
    return own, other


@pytest.mark.parametrize(("hypers", "reads"), CUTOFFS)
def test_a_step_of_md_reads_its_results_alone_and_at_once(hypers, reads, monkeypatch):
    own, other = calculators(hypers)
    found, forces = md_step(own, monkeypatch)
    assert found == {("to_numpy", "numpy"): 1}
    chosen, expected = md_step(other, monkeypatch)
    kept = {("choose", "nonzero"): 1} if reads == 2 else {}
    assert chosen == {("near", "nonzero"): 1, ("_cuts", "tolist"): 1, **kept, **found}
    np.testing.assert_allclose(forces, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("hypers", "reads"), CUTOFFS)
def test_steady_edges_are_those_that_count(hypers, reads):
    """Over small steps, of which the last make some more edges count; large ones; another list."""
    own, other = calculators(hypers)
    atoms = crystal()
    chosen = []
    choose = NeighborhoodBuilder.choose
    with pytest.MonkeyPatch.context() as patched:
        builder = type(own.model.network.neighborhood)
        patched.setattr(builder, "choose", lambda *given: chosen.append(1) or choose(*given))
        small = [partial(atoms.rattle, 0.15, seed=k) for k in range(12)]
        for change in (*small, partial(atoms.rattle, 0.5, seed=1), atoms.pop):
            change()
            with using(EAGER, own.model):
                own.calculate(atoms)
            times = len(chosen)
            other.calculate(atoms)
            for name in ("forces", "stress", "energies"):
                np.testing.assert_allclose(own.results[name], other.results[name], atol=1e-11)
            del chosen[times:]
    assert 2 <= len(chosen) < 14


#: Operations that compute nothing: others start at least one kernel on a GPU.
FREE = {
    "empty", "empty_like", "new_empty", "detach", "view", "_unsafe_view", "_reshape_alias",
    "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
#: A step of the default model with LoRA has so many on a GPU (2,085 with derivatives by autograd,
#: and fewer adapted layers). More is slower there however small the batch.
MOST_LAUNCHES = 1039


class Launches(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        name = operation.__name__.partition(".")[0]
        self.count += not (operation.is_view or name in FREE)
        return operation(*arguments, **(named or {}))


def test_a_step_starts_few_kernels(monkeypatch):
    # One kernel of a GPU, which is taken apart where there is none.
    by_one = lambda x, *_: (x.abs(), x.new_empty(*x.shape[:-1], 1))  # noqa: E731
    monkeypatch.setattr(torch, "_fused_rms_norm", by_one)
    model = Potential(ModelOptions(), [1, 6, 8], [TargetSpec("energy")]).train()
    inject(model, AdapterConfig(rank=8))
    parameters = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model.network, parameters, TrainingOptions(optimizer="adamw"), 1e-3)
    for _ in range(2):  # at first the optimiser makes its moments
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        with Launches() as update:
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    use_backend(model, EAGER)
    batch = batch_from_atoms([ethanol()] * 2, model.cutoff, model.dtype)
    batch = model.network.neighborhood.with_edges(batch).to("meta")
    model.to("meta")  # where operations are those of a GPU, and nothing is computed
    with Launches() as step:
        found = model.predict(batch, create_graph=True)
        loss = found.energy.square().sum() + found.forces.square().sum()
        loss.backward(inputs=[p for p in model.parameters() if p.requires_grad])
    assert 900 < step.count + update.count <= MOST_LAUNCHES


#: Functions that make a tensor on the CPU unless they are told a device.
MAKERS = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.tensor, torch.eye,
    torch.rand, torch.randn, torch.linspace, torch.as_tensor,
}  # fmt: skip


class Makers(TorchFunctionMode):
    """Notes where a tensor with numbers in it is made without a device."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        made_from = arguments[0] if arguments else None
        if function in MAKERS and "device" not in named and not torch.is_tensor(made_from):
            self.found.add(place())
        return function(*arguments, **named)


def test_a_step_makes_nothing_on_the_cpu_by_default():
    trainer = make_trainer(method="full", optimizer="adamw", ema=0.9)
    batches = list(trainer.batches(0))[:1]
    metrics = trainer.progress.metrics(list(trainer.objectives))
    with Makers() as makers, using(EAGER, trainer.model):
        step(trainer, batches, metrics)
    assert makers.found == set()
    with Makers() as makers:
        torch.zeros(2)
        torch.zeros(2, device="cpu")
    assert makers.found == {"the test"}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
    ],
)
def test_what_waits_is_heard(wait, monkeypatch):
    values = torch.tensor([0.0, 1.0, 2.0])
    with listening(monkeypatch) as found:
        wait(values)
    assert found
