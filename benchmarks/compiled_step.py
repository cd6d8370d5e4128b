"""Compiled training steps (``compile: on``) beside the kernels and plain torch.

``python -m benchmarks.compiled_step structures.xyz --method lora``: predictions, loss and gradients
of a batch of 8, as training computes them, without the optimiser. Times are those of the processor
(all threads), so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import ase.io
import torch

from pet_finetune.adapters import AdapterConfig, inject
from pet_finetune.backends import EAGER, Arena, choose_backend, prepare, use_backend, using
from pet_finetune.config import ModelOptions, TargetLoss
from pet_finetune.data import collate, structure_neighbors
from pet_finetune.data.batch import LabelledBatch
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.keys import TargetSpec
from pet_finetune.log import setup_logging
from pet_finetune.model import Potential
from pet_finetune.training.compiled_step import CompiledStep
from pet_finetune.training.loss import Objective, batch_loss


def batch_of(frames: list[ase.Atoms], cutoff: float) -> LabelledBatch:
    """The structures with random labels."""
    structures = [atoms_to_structure(atoms, index) for index, atoms in enumerate(frames)]
    batch = collate([(s, structure_neighbors(s, cutoff)) for s in structures], torch.float32)
    energies = torch.randn(batch.graph.num_structures, dtype=torch.float64)
    forces = torch.randn(batch.graph.num_atoms, 3)
    return replace(batch, labels={"energy": energies, "energy/forces": forces})


def milliseconds(work: Callable[[], object], device: torch.device, count: int = 12) -> float:
    """The median; on a GPU what passes, elsewhere what the processor computes."""
    gpu = device.type == "cuda"
    found: list[float] = []
    for _ in range(count + 3):
        start = time.perf_counter() if gpu else time.process_time()
        work()
        if gpu:
            torch.cuda.synchronize()
        found.append((time.perf_counter() if gpu else time.process_time()) - start)
    return 1e3 * median(found[3:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("structures")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    setup_logging()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    frames = ase.io.read(arguments.structures, ":16")
    species = sorted({int(z) for atoms in frames for z in atoms.numbers})
    prepare(device)
    model = Potential(ModelOptions(), species, [TargetSpec("energy")]).train()
    if arguments.method == "lora":
        inject(model, AdapterConfig(rank=8))
    use_backend(model.to(device), choose_backend(device))
    parameters = [p for p in model.parameters() if p.requires_grad]
    objectives = {"energy": Objective("energy", TargetLoss(), True, False, 1.0)}
    wanted = {"energy": (True, False)}
    batches = [batch_of(frames[i : i + 8], model.cutoff).to(device) for i in (0, 8)]

    def plain(batch: LabelledBatch = batches[0]) -> None:
        predictions = model.predict_targets(batch.graph, wanted, create_graph=True)
        batch_loss(batch, predictions, objectives).backward(inputs=parameters)

    step = CompiledStep(model, wanted, None)
    started = time.perf_counter()
    if step(batches[1], objectives, parameters) is None:
        raise SystemExit("not compiled")
    ready = time.perf_counter() - started

    def compiled() -> None:
        step(batches[0], objectives, parameters)

    with Arena().reused():
        times = [milliseconds(plain, device)]
        with using(EAGER, model):
            times.append(milliseconds(plain, device))
        times += [milliseconds(compiled, device), milliseconds(plain, device)]
    print(
        f"{arguments.method}, {arguments.threads} threads, {device}: the first step {ready:.1f} s"
    )
    print("kernels {:.1f} ms, plain {:.1f}, compiled {:.1f}, kernels again {:.1f}".format(*times))


if __name__ == "__main__":
    main()
