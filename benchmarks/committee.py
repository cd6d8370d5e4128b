"""Cost of a committee beside its members one by one: energy and forces, by system size.

    python -m benchmarks.committee [--members 4] [--sizes 9 27 96 243] [--kinds lora last heads]

A molecule and boxes of water, the shipped foundation, members with random weights that differ in

* ``lora``: all that LoRA of rank 8 adapts by default, and the heads;
* ``last``: the same in the last GNN layer alone;
* ``heads``: the heads alone, beside updates that are still zero.

One model, the members one by one and the committee take turns, each as an ASE calculator in a
simulation: atoms that have moved a little, a neighbour list that still holds. The committee is
timed as it is and with ``spread="on_demand"``, which leaves the forces of the members out. Each
number is the shortest of all rounds, and on the CPU it is the process's own time, so that other
work on the machine disturbs it little. Run it with one thread (`OMP_NUM_THREADS=1`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

from pet_finetune import PETCalculator
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms

FOUNDATION = Path(__file__).resolve().parents[1] / "checkpoints" / "pet-xtb-v0.ckpt"
KINDS = ("lora", "last", "heads")
LAST = r"gnn_layers\.1\..*(attention\.(in|out)put_linear|mlp\.w_(in|out))"
VOLUME = 29.9  # of a water molecule at 1 g/cm^3, cubic angstrom


def water(count: int) -> Atoms:
    """A periodic box of randomly rotated water molecules on a grid."""
    side = (count * VOLUME) ** (1 / 3)
    points = int(np.ceil(count ** (1 / 3)))
    box = Atoms(cell=[side] * 3, pbc=True)
    rng = np.random.default_rng(0)
    for place in np.ndindex(points, points, points):
        if len(box) < 3 * count:
            one = molecule("H2O")
            one.rotate(rng.uniform(0, 360), rng.normal(size=3))
            one.translate(np.array(place) * side / points)
            box += one
    return box


def folders(kind: str, count: int, work: Path) -> list[Path]:
    """Adapters of the foundation, with random weights."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = load_checkpoint(FOUNDATION).model
        inject(model, AdapterConfig(rank=8, **({"target_modules": LAST} if kind != "lora" else {})))
        with torch.no_grad():
            for name, parameter in model.network.named_parameters():
                if parameter.requires_grad and (kind != "heads" or ".lora_" not in name):
                    parameter += 0.02 * torch.randn_like(parameter)
        made.append(save_adapter(model, work / f"{kind}-{seed}"))
    return made


def shortest(works: dict[str, Callable[[Atoms], object]], frames: list[Atoms], cpu: bool) -> dict:
    """The shortest time of each, seconds; they take turns, and each sees every frame."""
    clock = time.process_time if cpu else time.perf_counter
    times = {name: float("inf") for name in works}
    for turn, atoms in enumerate(frames):
        for name, work in works.items():
            started = clock()
            work(atoms)  # ends with results on the CPU
            if turn:  # the first warms up
                times[name] = min(times[name], clock() - started)
    return times


def moved(atoms: Atoms, count: int) -> list[Atoms]:
    """Steps of a simulation, as far as the cost of one depends on where the atoms are."""
    frames = []
    for seed in range(count):
        frames.append(atoms.copy())
        frames[-1].rattle(0.02, seed=seed)
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[9, 27, 96, 243])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size and kind")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(
        "| differ in | atoms | edges | one model | one by one | committee | ratio | mean | ratio |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as work:
            made = folders(kind, arguments.members, Path(work))
            one = {"device": arguments.device}
            models = [PETCalculator(FOUNDATION, adapter=folder, **one) for folder in made]
            whole = PETCalculator(FOUNDATION, adapters=made, **one)
            mean = PETCalculator(FOUNDATION, adapters=made, spread="on_demand", **one)
        works: dict[str, Callable[[Atoms], object]] = {
            "one": lambda atoms, models=models: models[0].calculate(atoms, ["forces"]),
            "each": lambda a, models=models: [model.calculate(a, ["forces"]) for model in models],
            "committee": lambda atoms, whole=whole: whole.calculate(atoms, ["forces"]),
            "mean": lambda atoms, mean=mean: mean.calculate(atoms, ["forces"]),
        }
        for size in arguments.sizes:
            atoms = molecule("CH3CH2OH") if size == 9 else water(size // 3)
            rounds = 2 + round(arguments.seconds / (0.0015 * size * (2 + 3 * arguments.members)))
            found = shortest(works, moved(atoms, rounds), arguments.device == "cpu")
            edges = batch_from_atoms(atoms, whole.model.cutoff).num_edges
            cells = f"{kind} | {len(atoms)} | {edges} | {1e3 * found['one']:.1f} ms"
            cells += f" | {1e3 * found['each']:.1f} ms"
            for name in ("committee", "mean"):
                cells += f" | {1e3 * found[name]:.1f} ms | {found[name] / found['each']:.2f}"
            print(f"| {cells} |", flush=True)


if __name__ == "__main__":
    main()
