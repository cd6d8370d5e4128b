"""Cost of a committee beside its members one by one: energy and forces, by system size.

    python benchmarks/committee.py [--members 4] [--rounds 20] [--device cuda]

A molecule and two boxes of water, the shipped foundation, LoRA adapters of rank 8 with random
weights. One model, the members (merged) one by one and the committee take turns; each number is the
shortest of all rounds, and on the CPU it is the process's own time, so that other work on the
machine disturbs it little. Run it with one thread (`OMP_NUM_THREADS=1`).
Neighbour lists are made beforehand: a committee needs one where its members need one each.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

from pet_finetune import kernels
from pet_finetune.adapters import AdapterConfig, inject, merged_copy
from pet_finetune.adapters.committee import Committee
from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.data.batch import batch_from_atoms
from pet_finetune.model import Potential

FOUNDATION = Path(__file__).resolve().parents[1] / "checkpoints" / "pet-xtb-v0.ckpt"
VOLUME = 29.9  # of a water molecule at 1 g/cm^3, cubic angstrom


def water(count: int) -> Atoms:
    """A periodic box of randomly turned water molecules on a grid."""
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


def member(base: Potential, seed: int) -> Potential:
    """The base with a random adapter, merged."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    inject(model, AdapterConfig(rank=8))
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return merged_copy(model).requires_grad_(False).eval()


def shortest(works: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """The shortest time of each, seconds; they take turns."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = {name: float("inf") for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name] = min(times[name], clock() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    kernels.prepare(arguments.device)
    base = load_checkpoint(FOUNDATION).model.to(arguments.device)
    models = [member(base, seed) for seed in range(arguments.members)]
    committee = Committee([copy.deepcopy(model) for model in models], "energy")
    assert committee.one_pass
    print("| atoms | edges | one model | one by one | committee | committee / one by one |")
    print("|---:|---:|---:|---:|---:|---:|")
    for atoms in (molecule("CH3CH2OH"), water(33), water(81)):
        batch = batch_from_atoms(atoms, base.cutoff, torch.float32).to(arguments.device)
        works: dict[str, Callable[[], object]] = {
            "one": lambda batch=batch: models[0].predict(batch),
            "each": lambda batch=batch: [model.predict(batch) for model in models],
            "committee": lambda batch=batch: committee.predict(batch, "energy"),
        }
        rounds = arguments.rounds * (5 if len(atoms) < 20 else 1)
        found = shortest(works, rounds, arguments.device)
        ratio = found["committee"] / found["each"]
        cells = " | ".join(f"{1e3 * found[name]:.1f} ms" for name in works)
        print(f"| {len(atoms)} | {batch.num_edges} | {cells} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
