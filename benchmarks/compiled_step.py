"""A training step as one compiled graph, beside the kernels and plain torch.

``python -m benchmarks.compiled_step structures.xyz --method lora``: energy, forces, squared errors
and the gradients of all trained parameters for one batch, traced with ``make_fx`` and compiled by
Inductor for the shapes of this batch alone. Labels are random numbers, and there is no optimiser.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import ase.io
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pet_finetune.adapters import AdapterConfig, inject
from pet_finetune.backends import EAGER, prepare, using
from pet_finetune.config import ModelOptions
from pet_finetune.data.batch import batch_from_atoms
from pet_finetune.graph import Batch, make_layout
from pet_finetune.keys import TargetSpec
from pet_finetune.model import Potential
from pet_finetune.model.prediction import forces_of
from pet_finetune.nn import neighborhood

Step = Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]]


def make_step(model: Potential, batch: Batch) -> tuple[Step, list[Tensor]]:
    """The step as a function of edge vectors and trained values, and those values."""
    trained = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in model.network.named_parameters() if not p.requires_grad}
    energies, forces = torch.randn(batch.num_structures), torch.randn(batch.num_atoms, 3)

    def step(vectors: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
        vectors = vectors.detach().requires_grad_(True)
        tree = dict(zip(trained, values, strict=True)) | frozen
        moved = batch._replace(edge_vectors=vectors)
        out = torch.func.functional_call(model.network, tree, (moved, ["energy"]))["energy"]
        (slope,) = torch.autograd.grad(out.sum(), vectors, create_graph=True)
        sums = out.new_zeros(len(energies)).index_add(0, batch.structure_index, out.squeeze(-1))
        errors = ((sums - energies) ** 2).mean() + ((forces_of(batch, slope) - forces) ** 2).mean()
        return torch.autograd.grad(errors, values)

    return step, [p.detach().clone().requires_grad_(True) for p in trained.values()]


def timed(step: Step, vectors: Tensor, values: list[Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    """Milliseconds, the median of 12 after 3 to warm up, and the gradients."""
    seconds: list[float] = []
    for _ in range(15):
        start = time.perf_counter()
        gradients = step(vectors, values)
        seconds.append(time.perf_counter() - start)
    return median(seconds[3:]) * 1e3, gradients


def compiled(step: Step, batch: Batch, values: list[Tensor]) -> Step:
    """Traced and compiled; what depends on the shapes is computed before."""
    layout = make_layout(batch.centers, batch.num_atoms, rectangle=True)
    with (
        mock.patch.object(neighborhood, "make_layout", return_value=layout),
        mock.patch.object(neighborhood, "bool", return_value=True, create=True),  # all within reach
    ):
        graph = torch.compile(make_fx(step)(batch.edge_vectors, values))
    plain = [value.detach() for value in values]
    graph(batch.edge_vectors, plain)
    return lambda vectors, _: graph(vectors, plain)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("structures")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    frames = ase.io.read(arguments.structures, ":8")
    species = sorted({int(z) for atoms in frames for z in atoms.numbers})
    prepare()
    model = Potential(ModelOptions(), species, [TargetSpec("energy")]).train()
    if arguments.method == "lora":
        inject(model, AdapterConfig(rank=8))
    batch = batch_from_atoms(frames, model.cutoff, torch.float32)
    step, values = make_step(model, batch)
    before, _ = timed(step, batch.edge_vectors, values)
    with using(EAGER, model):
        plain, expected = timed(step, batch.edge_vectors, values)
        start = time.perf_counter()
        graph = compiled(step, batch, values)
        compiling = time.perf_counter() - start
        fast, gradients = timed(graph, batch.edge_vectors, values)
    after, _ = timed(step, batch.edge_vectors, values)
    error = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(gradients, expected, strict=True)
    )
    print(f"plain {plain:.0f} ms, kernels {before:.0f} and {after:.0f} ms, compiled {fast:.0f} ms")
    print(f"compiling {compiling:.0f} s; gradients differ by {error:.1e} of the largest")


if __name__ == "__main__":
    main()
