r"""Beside the peers: the same structures and the same processor seconds as our own defaults.

    python -m benchmarks.peers --data DATA --work WORK --sets ethanol carbon --seconds 80

The parts of the sets are those of ``benchmarks.recipe``, whose rows ``lora`` and ``full`` ours are;
``--seconds`` says what the longer of them took, start and all. Each tool trains as many epochs as
fit into that, as two short runs of it tell. metatrain starts from the same checkpoint, at the
learning rates that ``benchmarks.accuracy`` gives it (its own, 1e-4, is far too low for so few
steps); MACE from nothing (64 channels, scalars and vectors, 5 A, second stage in the last quarter).
Errors are those of the best model on structures that no run saw; beside them stand the size of what
has to be kept (of our LoRA and of metatrain's the foundation is not counted; metatrain's checkpoint
holds it all the same) and processor time of a step of MD, of the first test structure, with each
tool's own ASE calculator.

MACE is no dependency: ``mace-torch`` has to be installed for its row.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from benchmarks.accuracy import LEARNING_RATES
from benchmarks.recipe import FOUNDATION, RECIPES, ROOT, SETS, options_of, section, write_set
from metatomic_ase import MetatomicCalculator

import pet_finetune as pf

PEERS = ("ours-lora", "ours-full", "metatrain-lora", "metatrain-full", "mace")
SEED, TARGET = 1, "energy/ft"


def metatrain_command(peer: str, files: dict[str, Path], batch: int, epochs: int) -> list[str]:
    """Writes the options into the working directory; what trains by them."""
    foundation = pf.load(FOUNDATION)
    pf.export(foundation, "foundation.ckpt", format="metatrain")
    method = peer.partition("-")[2]
    # A target of its own: of one that it knows metatrain keeps the baseline. Heads that it inherits
    # are of use with the scale that they were trained with.
    finetune: dict[str, Any] = {"method": method, "read_from": "foundation.ckpt"}
    finetune["inherit_heads"] = {TARGET: "energy"}
    if method == "lora":
        modules = ["input_linear", "output_linear", "w_in", "w_out"]
        finetune["config"] = {"rank": 32, "alpha": 32, "target_modules": modules}
    training = {
        "batch_size": batch, "num_epochs": epochs, "learning_rate": LEARNING_RATES[method],
        "finetune": finetune,
        "fixed_scaling_weights": {TARGET: float(foundation.potential.scale.get("energy"))},
    }  # fmt: skip
    options = {
        "seed": SEED,
        "device": "cpu",
        "base_precision": 32,
        "architecture": {"name": "pet", "training": training},
    }
    for part in ("train", "validation"):
        found = section(files[part])
        found["targets"] = {TARGET: found["targets"]["energy"]}
        options["training_set" if part == "train" else "validation_set"] = found
    Path("options.yaml").write_text(yaml.safe_dump(options))
    words = ["train", "options.yaml", "-o", "model.pt", "-r", "final_eval=false"]
    return [sys.executable, "-m", "metatrain", *words]


def our_command(method: str, name: str, epochs: int, work: Path, data: Path) -> list[str]:
    """Writes the options into the working directory; what trains by them."""
    steps = epochs * -(-SETS[name].counts[0] // SETS[name].batch)
    job = {"set": name, "asked": steps, "size": None, "seed": SEED}
    options, _ = options_of(job, RECIPES[method], argparse.Namespace(data=data, work=work))
    Path("options.yaml").write_text(yaml.safe_dump(options))
    words = ["train", "options.yaml", "-o", "run", "--no-check", "-r", "final_eval=false"]
    return [sys.executable, "-m", "pet_finetune", *words]


def mace_command(files: dict[str, Path], batch: int, epochs: int) -> list[str]:
    """What trains a small MACE."""
    for part in ("train", "validation"):  # MACE reads labels by names that ASE does not reserve
        frames = ase.io.read(files[part], ":")
        for atoms in frames:
            atoms.info["REF_energy"] = atoms.get_potential_energy()
            atoms.arrays["REF_forces"] = atoms.get_forces()
            atoms.calc = None
        ase.io.write(f"{part}.xyz", frames)
    settings = {
        "name": "mace", "train_file": "train.xyz", "valid_file": "validation.xyz", "E0s": "average",
        "model": "MACE", "num_channels": 64, "max_L": 1, "r_max": 5.0, "batch_size": batch,
        "valid_batch_size": 20, "max_num_epochs": epochs, "start_swa": max(1, 3 * epochs // 4),
        "ema_decay": 0.99, "default_dtype": "float32", "device": "cpu", "seed": SEED,
        "eval_interval": max(1, epochs // 20),
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "mace.cli.run_train", *flags, "--swa", "--ema", "--amsgrad"]


def trained(peer: str, name: str, epochs: int, folder: Path, work: Path, data: Path) -> float:
    """Train in a process of its own, in ``folder``; its processor seconds."""
    files, _ = write_set(name, None, data, work)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    batch = SETS[name].batch
    tool, _, method = peer.partition("-")
    if tool == "mace":
        words = mace_command(files, batch, epochs)
    elif tool == "ours":
        words = our_command(method, name, epochs, work, data)
    else:
        words = metatrain_command(peer, files, batch, epochs)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path("log").open("w") as log:
        subprocess.run(words, stdout=log, stderr=log, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime


def calculators(peer: str, folder: Path) -> tuple[Any, Any, list[Path]]:
    """For the errors and for MD, and the files that have to be kept."""
    if peer == "mace":
        from mace.calculators import MACECalculator

        model = next(iter(sorted(folder.glob("mace_stagetwo.model"))), folder / "mace.model")
        calculator: Any = MACECalculator(model, device="cpu", default_dtype="float32")
        return calculator, calculator, [model]
    if peer.startswith("ours"):
        model = folder / "run" / "best_model.ckpt"
        calculator = pf.PETCalculator(model)
        kept = [*(folder / "run" / "adapter").glob("*")] or [model]
        return calculator, calculator, kept
    exported = MetatomicCalculator(folder / "model.pt", device="cpu", variants={"energy": "ft"})
    model = folder / "model.ckpt"
    return pf.PETCalculator(model, target=TARGET), exported, [model]


def step_of_md(calculator: Any, atoms: Atoms, steps: int = 300) -> float:
    """Processor seconds of a step of 0.5 fs, after a third as many that do not count."""
    moved = atoms.copy()
    moved.calc = calculator
    MaxwellBoltzmannDistribution(moved, temperature_K=300, rng=np.random.default_rng(SEED))
    motion = VelocityVerlet(moved, 0.5 * units.fs)
    motion.run(steps // 3)
    started = time.process_time()
    motion.run(steps)
    return (time.process_time() - started) / steps


def errors(calculator: Any, frames: Sequence[Atoms]) -> dict[str, float]:
    """Mean absolute errors, meV/atom and meV/A."""
    energies, forces = [], []
    for atoms in frames:
        moved = atoms.copy()
        moved.calc = calculator
        wrong = moved.get_potential_energy() - atoms.get_potential_energy()
        energies.append(1e3 * abs(wrong) / len(atoms))
        forces.append(1e3 * np.abs(moved.get_forces() - atoms.get_forces()).ravel())
    return {
        "energy_mae": float(np.mean(energies)),
        "forces_mae": float(np.mean(np.concatenate(forces))),
    }


def main() -> None:
    """Run what is missing, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/recipe"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["ethanol", "carbon"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=80.0, help="of a processor, for each run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, data = arguments.work.resolve(), arguments.data.resolve()
    store = work / "peers.json"
    rows: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for name in arguments.sets:
        for peer in arguments.peers:
            key = f"{name} {peer} {arguments.seconds:g}"
            if key not in rows:
                folder = work / f"peer-{os.getpid()}"
                place = (folder, work, data)
                one, four = (trained(peer, name, epochs, *place) for epochs in (1, 4))
                epochs = max(4, 1 + int((arguments.seconds - one) / ((four - one) / 3)))
                seconds = trained(peer, name, epochs, *place)
                frames = ase.io.read(work / "sets" / f"{name}-test.xyz", ":")
                judged, moved, kept = calculators(peer, folder)
                rows[key] = {
                    "epochs": epochs, "seconds": seconds, **errors(judged, frames),
                    "step": step_of_md(moved, frames[0]),
                    "bytes": sum(path.stat().st_size for path in kept),
                }  # fmt: skip
                store.write_text(json.dumps(rows, indent=2))
                os.chdir(work)
                shutil.rmtree(folder)
            row = rows[key]
            print(
                f"| {name} | {peer} | {row['epochs']} | {row['energy_mae']:.2f} | "
                f"{row['forces_mae']:.1f} | {row['seconds']:.0f} | "
                f"{row['bytes'] / 1e6:.1f} | {row['step'] * 1e3:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
