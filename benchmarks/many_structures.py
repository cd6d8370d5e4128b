"""Memory and time of training on a million structures: ``python -m benchmarks.many_structures``.

Water, ammonia and methane, shaken, with the energies and forces of springs between their atoms, are
written as a memory-mapped folder. A run trains on it in a process of its own while its resident
memory is looked at twice a second; ``docs/figures/many_structures.svg`` shows that. A table is
printed: until the first step, most memory, what the process held before it read any data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase.build import molecule

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "many_structures.svg"
KINDS = ("H2O", "NH3", "CH4")
#: Displacement in Angstrom, spring in eV/Angstrom^2, energies of atoms in eV.
SHAKE, SPRING, ATOMS = 0.05, 15.0, {1: -13.6, 6: -1030.0, 7: -1480.0, 8: -2040.0}


def springs(positions: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies and forces of springs between all pairs of atoms of a molecule.

    Args:
        positions: ``[k, n, 3]``.
        rest: ``[n, 3]``, where all springs are at rest.

    Returns:
        ``[k]`` in eV, ``[k, n, 3]`` in eV/Angstrom.
    """
    energy, forces = np.zeros(len(positions)), np.zeros_like(positions)
    for one in range(len(rest)):
        for other in range(one):
            vector = positions[:, one] - positions[:, other]
            length = np.linalg.norm(vector, axis=1)
            stretched = length - np.linalg.norm(rest[one] - rest[other])
            energy += 0.5 * SPRING * stretched**2
            pull = (SPRING * stretched / length)[:, None] * vector
            forces[:, one] -= pull
            forces[:, other] += pull
    return energy, forces


def generate(folder: Path, count: int) -> None:
    """Write so many structures, the three kinds in turn."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frames = [molecule(kind) for kind in KINDS]
    numbers = np.concatenate([frame.numbers for frame in frames]).astype("<i4")
    offsets = [sum(ATOMS[z] for z in frame.numbers.tolist()) for frame in frames]
    sizes = np.array([len(frame) for frame in frames])
    np.save(folder / "ns.npy", np.array(count))
    np.save(folder / "na.npy", np.concatenate([[0], np.cumsum(np.resize(sizes, count))]))
    atoms = int(np.resize(sizes, count).sum())
    files = {name: (folder / name).open("wb") for name in ("x.bin", "a.bin", "forces.bin")}
    energies = np.lib.format.open_memmap(folder / "energy.npy", "w+", "<f8", (count,))
    for first in range(0, count, 30_000):
        rows = min(10_000, -(-(count - first) // 3))
        parts, pulls, found = [], [], []
        for frame, offset in zip(frames, offsets, strict=True):
            shaken = frame.positions + SHAKE * rng.normal(size=(rows, len(frame), 3))
            energy, forces = springs(shaken, frame.positions)
            parts.append(shaken)
            pulls.append(forces)
            found.append(energy + offset)
        some = np.stack(found, axis=1).reshape(-1)[: count - first]
        energies[first : first + len(some)] = some
        left = int(np.resize(sizes, count - first).sum()) if count - first < 30_000 else None
        files["x.bin"].write(np.concatenate(parts, 1).reshape(-1, 3)[:left].astype("<f4").tobytes())
        files["forces.bin"].write(
            np.concatenate(pulls, 1).reshape(-1, 3)[:left].astype("<f4").tobytes()
        )
        files["a.bin"].write(np.tile(numbers, rows)[:left].tobytes())
    for file in files.values():
        file.close()
    energies.flush()
    np.asarray(energies).astype("<f4").tofile(folder / "energy.bin")
    assert (folder / "x.bin").stat().st_size == 12 * atoms


def work(folder: Path, steps: int, settings: dict[str, Any]) -> None:
    """Train; this runs in a process of its own, and tells each step on its standard output."""
    from pet_finetune import Feature, finetune
    from pet_finetune.errors import CheckpointError

    print(json.dumps({"ready": time.time()}), flush=True)

    class Clock(Feature):
        name = "clock"

        def step_ended(self, progress: Any) -> None:
            self.done = getattr(self, "done", 0) + 1
            told = {"step": self.done, "at": time.time(), "worked": time.process_time()}
            print(json.dumps(told), flush=True)
            if self.done == steps:
                os.kill(os.getpid(), signal.SIGINT)

    with contextlib.suppress(CheckpointError):  # the run is stopped before its first epoch ends
        finetune(
            str(ROOT / "checkpoints" / "pet-xtb-s.ckpt"),
            str(folder),
            0.0005,
            features=[Clock()],
            folder=str(folder.with_name(f"run-{int(time.time())}")),
            optimizer="adamw",
            num_epochs=1,
            **settings,
        )


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")]
    return int(found[0]) / 1024 if found else 0.0


def watch(folder: Path, steps: int) -> dict[str, Any]:
    """Run :func:`work`, and look at its memory."""
    command = [sys.executable, "-m", "benchmarks.many_structures", "--work", str(folder),
               "--steps", str(steps)]  # fmt: skip
    began = time.time()
    memory = []
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, cwd=ROOT, stdout=said)
        while child.poll() is None:
            memory.append((time.time() - began, resident(child.pid)))
            time.sleep(0.5)
        said.seek(0)
        told = [json.loads(line) for line in said if line.startswith("{")]
    ready = next(one["ready"] for one in told if "ready" in one) - began
    done = [one["at"] - began for one in told if "step" in one]
    worked = [one["worked"] for one in told if "step" in one]
    before = max(value for at, value in memory if at <= ready + 0.5)
    return {"memory": memory, "ready": ready, "steps": done, "before": before, "worked": worked}


def draw(found: dict[str, Any], count: int, path: Path) -> None:
    """The memory over time, with the first step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.subplots()
    at, values = np.array([pair for pair in found["memory"] if pair[1]]).T
    axes.plot(at, values / 1024, color="#1f77b4", label="resident memory")
    axes.axhline(2.0, color="0.6", linewidth=0.8, linestyle="--", label="2 GiB")
    axes.axvline(found["steps"][0], color="#d62728", linewidth=0.8, label="first step")
    axes.axvline(found["steps"][-1], color="0.3", linewidth=0.8, linestyle=":",
                 label=f"step {len(found['steps'])}")  # fmt: skip
    axes.set(xlabel="time (s)", ylabel="GiB", ylim=(0.0, 2.2),
             title=f"LoRA training on {count:,} structures")  # fmt: skip
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path)


def main() -> None:
    """Generate, train, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "many")
    parser.add_argument("--structures", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--atoms", type=int, default=64, help="of a batch")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = {"max_atoms_per_batch": arguments.atoms, "device": "cpu", "seed": 0}
    if arguments.work is not None:
        work(arguments.work, arguments.steps, settings)
        return
    data = arguments.folder / f"set-{arguments.structures}"
    if not data.exists():
        began = time.time()
        generate(data, arguments.structures)
        print(f"generated in {time.time() - began:.1f} s")
    found = watch(data, arguments.steps)
    draw(found, arguments.structures, arguments.figure)
    steps = found["steps"]
    print(f"structures              {arguments.structures:,}")
    print(f"first step after        {steps[0]:.1f} s ({found['ready']:.1f} s of it imports)")
    print(f"  processor time        {found['worked'][0]:.1f} s")
    print(f"steps                   {len(steps)} in {steps[-1] - steps[0]:.1f} s")
    print(f"  processor time        {found['worked'][-1] - found['worked'][0]:.1f} s")
    print(f"most resident memory    {max(value for _, value in found['memory']):.0f} MiB")
    print(f"before any data         {found['before']:.0f} MiB")


if __name__ == "__main__":
    main()
