"""Batches against the memory: parts give the gradient of the whole, and `auto` finds a size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pet_finetune.data.loader import Loader
from pet_finetune.training import batch_memory
from pet_finetune.training.batch_memory import InParts, largest_batch
from trainers import TRAIN, curve, make_trainer, watch, weights


def run(limit=None, error=torch.OutOfMemoryError, **kind):
    """A run whose steps on more structures than the limit run out of memory; and how many did."""
    torch.manual_seed(11)
    trainer, records, failed = make_trainer(optimizer="adamw", **kind), [], []
    watch(trainer, epoch=records.append)
    real = trainer.model.predict_targets

    def predict_targets(batch, *arguments, **more):
        if limit is not None and trainer.model.training and batch.num_structures > limit:
            failed.append(batch.num_structures)
            raise error("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(batch, *arguments, **more)

    trainer.model.predict_targets = predict_targets
    assert trainer.fit().finished
    return trainer, records, failed


@pytest.mark.parametrize(
    "kind",
    [{}, {"extra": True}, {"gradient_accumulation_steps": 2}, {"method": "lora", "config": {}}],
)
@pytest.mark.parametrize("limit", [1, 2])
def test_parts_give_the_run_of_the_whole(kind, limit, caplog):
    whole, lines, _ = run(**kind)
    parts, told, failed = run(limit, **kind)
    # Each size fails once; afterwards batches are computed in parts from the start.
    assert len(failed) == (2 if limit == 1 else 1)
    for (name, one), other in zip(weights(parts).items(), weights(whole).values(), strict=True):
        if "attention.input_linear.bias" in name:  # keys: no gradient but rounding errors
            continue
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    for one, other in zip(told, lines, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        for target, metrics in one.train.items():
            assert metrics.as_dict() == pytest.approx(other.train[target].as_dict(), rel=1e-4)
            expected = {kind: sums[2] for kind, sums in other.train[target].state().items()}
            assert {k: sums[2] for k, sums in metrics.state().items()} == expected
    assert "each batch is computed in 2 parts, which changes only the time" in caplog.text
    assert len(curve(told)) == len(curve(lines))


def test_what_does_not_fit_alone_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        run(0)


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        run(0, error=RuntimeError)
    assert type(raised.value) is RuntimeError
    with pytest.raises(ValueError, match="out of memory"):
        run(0, error=ValueError)


def test_gradients_that_were_there_are_not_counted_twice():
    """The first part of a batch has been added when the second one fails."""
    loader = Loader(TRAIN, 3.5, batch_size=4)
    parameter = torch.nn.Parameter(torch.zeros(()))
    parameter.grad = torch.tensor(10.0)
    calls = []

    def take(part, metrics):
        calls.append(part.graph.num_structures)
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("full")
        parameter.grad = parameter.grad + part.share
        return {"loss": torch.tensor(part.share)}

    parts = InParts(loader, lambda made: made)
    found = parts.losses(take, next(iter(loader)), (0, 0), [parameter], {})
    assert calls == [4, 2, 2, 1, 1, 1, 1]
    assert float(parameter.grad) == pytest.approx(11.0)
    assert float(found["loss"]) == pytest.approx(1.0)


def auto(free, monkeypatch, **more):
    monkeypatch.setattr(batch_memory, "_free_mib", lambda: free)
    trainer = make_trainer()
    loader = Loader(TRAIN, 3.5, batch_size=3)
    random = torch.get_rng_state()
    before = weights(trainer)
    found = largest_batch(trainer.model, loader, trainer.objectives, trainer.options)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, before[name]) for name, one in weights(trainer).items())
    assert all(p.grad is None for p in trainer.model.network.parameters())
    return found, loader


def test_auto_on_a_cpu_goes_by_the_free_memory(monkeypatch):
    atoms = np.array([s.num_atoms for s in TRAIN])
    taken = []
    mib = {"bytes": 1.0}
    monkeypatch.setattr(
        batch_memory._Trial, "mib", lambda self, n: taken.append(n) or n * mib["bytes"]
    )
    monkeypatch.setattr(batch_memory, "_STEPS", 1)
    monkeypatch.setattr(batch_memory, "_SMALL", 1)
    monkeypatch.setattr(batch_memory, "_LARGE", 2)
    found, _ = auto(2.0 * (atoms.max() + 3), monkeypatch)
    assert found == atoms.max() + 3  # half of what is free, one MiB an atom
    assert taken == [atoms.max(), min(2 * atoms.max(), atoms.sum())]
    assert auto(0.0, monkeypatch)[0] == atoms.max()  # never less than the largest structure
    assert auto(1e9, monkeypatch)[0] == atoms.sum()


def test_auto_measures_real_steps_and_leaves_ten_of_an_epoch(monkeypatch):
    atoms = np.array([s.num_atoms for s in TRAIN])
    monkeypatch.setattr(batch_memory, "_SMALL", 1)
    assert auto(1e6, monkeypatch)[0] == max(atoms.max(), atoms.sum() // 10)
    monkeypatch.setattr(batch_memory, "_STEPS", 1)
    assert atoms.max() <= auto(1e6, monkeypatch)[0] <= atoms.sum()


@pytest.mark.parametrize(
    ("fits", "limit", "expected"),
    [
        (1000, 1e9, 640),  # doubled until it fails: 640 fits, 1280 does not
        (10**9, 3000.0, 2550),  # as many as 0.85 of what is free, one MiB an atom
        (10**9, 1e9, 5000),  # all that is wanted
        (5, 1e9, 10),  # never less than the largest structure
    ],
)
def test_auto_on_a_gpu_tries(monkeypatch, fits, limit, expected):
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (int(limit * 2**20), 0),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(batch_memory.torch, "cuda", cuda)
    monkeypatch.setattr(batch_memory, "_SMALL", 1)

    class Trial:
        device = "cuda"

        def mib(self, atoms):
            if atoms > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return float(atoms)

    found = batch_memory._on_gpu(Trial(), 10, 5000)
    assert max(10, found) == expected
