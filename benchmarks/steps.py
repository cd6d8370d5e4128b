"""One table of what a step costs on a device, in a few minutes and without files or network.

``python -m benchmarks.steps --device cuda``: training steps (LoRA, full; plain, kernels, compiled),
MD steps of 9 to 20,000 atoms, evaluation, and the memory of each, with the default model and random
weights. ``--device cpu --quick`` runs every row in tiny sizes. ``--structures FILE`` trains on
batches of 8 of a file instead of generated molecules. On a CPU, times are those of the processor,
which what else runs on the machine changes little; threads that wait count, so take one.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet
from benchmarks.speed.inputs import water_box
from benchmarks.speed.memory import MemoryMeter

from pet_finetune import PETCalculator
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.backends.choice import (
    EAGER,
    Arena,
    choose_backend,
    loaded,
    prepare,
    use_backend,
    using,
)
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.config.target import TargetLoss
from pet_finetune.data.labelled_batch import LabelledBatch, collate
from pet_finetune.data.loader import Loader
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.keys import TargetSpec
from pet_finetune.log import setup_logging
from pet_finetune.model.potential import Potential
from pet_finetune.training.compiled_step import CompiledStep
from pet_finetune.training.objectives import Objective, batch_loss

SPECIES = [1, 6, 8]
WANTED = {"energy": (True, False)}
OBJECTIVES = {"energy": Objective("energy", TargetLoss(), True, False, 1.0)}
NAMES = ("CH3CH2OH", "C6H6", "CH3COCH3", "H2O2")
#: Molecules of the cells of water with about 243, 2,000 and 20,000 atoms.
WATER = {"243": (3, 3, 9), "2,000": (8, 9, 9), "20,000": (17, 20, 20)}
FRAMES = 1000
_BEGAN = time.perf_counter()

Row = tuple[str, str, float, float]


def model_of(method: str, device: torch.device, quick: bool, species: Sequence[int]) -> Potential:
    """The default model with random weights, and what trains."""
    torch.manual_seed(0)
    small = {"d_pet": 32, "d_node": 32, "d_feedforward": 32, "d_head": 32, "num_gnn_layers": 1}
    options = ModelOptions.model_validate(small if quick else {})
    model = Potential(options, species, [TargetSpec("energy")])
    if method == "lora":
        inject(model, AdapterConfig(rank=8))
    use_backend(model.to(device), choose_backend(device))
    return model.train()


def molecules(count: int) -> list[Atoms]:
    """Rattled molecules of several sizes."""
    frames = [molecule(NAMES[index % len(NAMES)]) for index in range(count)]
    for index, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=index)
    return frames


def labelled(frames: Sequence[Atoms], cutoff: float) -> LabelledBatch:
    """A batch with random labels."""
    structures = [atoms_to_structure(atoms, index) for index, atoms in enumerate(frames)]
    batch = collate([(s, structure_neighbors(s, cutoff)) for s in structures], torch.float32)
    energies = torch.randn(batch.graph.num_structures, dtype=torch.float64)
    forces = torch.randn(batch.graph.num_atoms, 3)
    return replace(batch, labels={"energy": energies, "energy/forces": forces})


class Clock:
    """Milliseconds and megabytes of repeated work."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.gpu = device.type == "cuda"

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self.gpu else time.process_time()

    def measure(self, work: Callable[[], object]) -> tuple[float, float]:
        """The median of as many as fit into the time, three at least; and the most memory."""
        work()
        work()
        meter = MemoryMeter(self.device.type)
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < 3 or (time.perf_counter() - began < self.seconds and len(found) < 50):
            start = self.now()
            work()
            found.append(self.now() - start)
        return 1e3 * median(found), meter.peak()


def training(clock: Clock, frames: Sequence[Atoms], quick: bool, compiled: bool) -> Iterator[Row]:
    """Steps of both methods, without the optimiser, and with it compiled or not."""
    species = sorted({int(z) for atoms in frames for z in atoms.numbers})
    for method in ("lora", "full"):
        model = model_of(method, clock.device, quick, species)
        parameters = [p for p in model.parameters() if p.requires_grad]
        batches = [labelled(frames[i : i + 8], model.cutoff).to(clock.device) for i in (0, 8)]
        batch = batches[0]

        def plain(
            model: Potential = model, batch: LabelledBatch = batch, parameters: Any = parameters
        ) -> None:
            predictions = model.predict_targets(batch.graph, WANTED, create_graph=True)
            batch_loss(batch, predictions, OBJECTIVES).backward(inputs=parameters)
            for parameter in parameters:
                parameter.grad = None

        with Arena().reused():
            if loaded() and clock.device.type == "cpu":
                yield f"{method} step, 8 molecules", "kernels", *clock.measure(plain)
            with using(EAGER, model):
                yield f"{method} step, 8 molecules", "plain", *clock.measure(plain)
        if not compiled:
            continue
        step = CompiledStep(model, WANTED, None)
        start = time.perf_counter()
        if step(batches[1], OBJECTIVES, parameters) is None:
            continue  # a warning says why
        first = time.perf_counter() - start
        again = CompiledStep(model, WANTED, None)
        start = time.perf_counter()
        again(batches[1], OBJECTIVES, parameters)
        warm = time.perf_counter() - start
        yield f"{method}: first step of a compiled run", "cold", 1e3 * first, float("nan")
        yield f"{method}: first step of a compiled run", "warm", 1e3 * warm, float("nan")

        def graph(
            step: CompiledStep = step, batch: LabelledBatch = batch, parameters: Any = parameters
        ) -> None:
            step(batch, OBJECTIVES, parameters)

        with Arena().reused():
            yield f"{method} step, 8 molecules", "compiled", *clock.measure(graph)


def dynamics(clock: Clock, quick: bool) -> Iterator[Row]:
    """Steps of molecular dynamics, neighbour lists and all."""
    model = model_of("full", clock.device, quick, SPECIES).eval()
    boxes = {"9": molecule("CH3CH2OH")}
    boxes |= {name: water_box(cells) for name, cells in WATER.items() if not quick}
    if quick:
        boxes["24"] = water_box((2, 2, 2))
    for name, atoms in boxes.items():
        atoms.calc = PETCalculator(model, device=clock.device)
        width = np.sqrt(atoms.get_masses() * units.kB * 300.0)
        atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)) * width[:, None])
        md = VelocityVerlet(atoms, timestep=0.5 * units.fs)
        mode = "kernels" if loaded() and clock.device.type == "cpu" else "plain"
        yield f"MD step, {name} atoms", mode, *clock.measure(lambda md=md: md.run(1))


def evaluation(clock: Clock, quick: bool) -> Iterator[Row]:
    """Energies and forces of many molecules in batches of 32."""
    model = model_of("full", clock.device, quick, SPECIES).eval()
    count = 32 if quick else FRAMES
    frames = molecules(count)
    structures = [atoms_to_structure(atoms, index) for index, atoms in enumerate(frames)]
    loader = Loader(structures, model.cutoff, batch_size=32)

    def evaluate() -> None:
        for batch in loader:
            model.predict(batch.graph.to(clock.device))

    mode = "kernels" if loaded() and clock.device.type == "cpu" else "plain"
    yield f"evaluation of {count:,} molecules", mode, *clock.measure(evaluate)


def before(minutes: float, name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows, each measured when it is asked for, until the time since the start is up."""
    while time.perf_counter() - _BEGAN < 60 * minutes:
        row = next(rows, None)
        if row is None:
            return
        yield row
    print(f"| {name}: the rest is left out, {minutes:g} minutes are over | | | |", flush=True)


def main() -> None:
    """Measure and print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--structures", help="a file to train on, instead of generated molecules")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row, about")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins later")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does every row run?")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", choices=("training", "md", "evaluation"))
    arguments = parser.parse_args()
    setup_logging()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    prepare(device)
    clock = Clock(device, 0.2 if arguments.quick else arguments.seconds)
    frames = ase.io.read(arguments.structures, ":16") if arguments.structures else molecules(16)
    made = {
        "training": training(clock, frames, arguments.quick, not arguments.no_compile),
        "md": dynamics(clock, arguments.quick),
        "evaluation": evaluation(clock, arguments.quick),
    }
    where = torch.cuda.get_device_name(device) if gpu else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {where}, {arguments.threads} threads, float32")
    kind = "passing" if gpu else "of the processor"
    print(f"| | | ms ({kind}) | MB |\n|---|---|---|---|", flush=True)
    with torch.cuda.device(device) if gpu else nullcontext():
        for name, rows in made.items():
            if arguments.only not in (None, name):
                continue
            for what, mode, milliseconds, megabytes in before(arguments.minutes, name, rows):
                print(f"| {what} | {mode} | {milliseconds:.1f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
