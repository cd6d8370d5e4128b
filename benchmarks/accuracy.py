"""Fine-tuning on 3BPA: ours against metatrain and against training from scratch.

    python benchmarks/accuracy.py --data DATA --foundation FOUNDATION.ckpt --work WORK

Every run starts from the same checkpoint and has the same structures, epochs, batches and learning
rates. Runs
that WORK holds the result of are not done again, so an interrupted benchmark goes on. Errors are
those of the best model of each run on the test file. metatrain's checkpoints are evaluated with
our reader of them, which `tests/parity` holds to 1e-5 eV/atom and 1e-4 eV/A.

DATA holds `3bpa_train_300K.xyz` and `3bpa_test_300K.xyz`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
import yaml

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms

SIZES = {"50": (50, 60), "all": (480, 7)}  # training structures, epochs
BATCH = 5
#: Of both tools. metatrain's own, 1e-4 for every method, is far too low for so few steps.
LEARNING_RATES = {"lora": 2e-3, "full": 5e-4, "scratch": 5e-4}
#: metatrain's way; our defaults are others since these tables were made.
ADAMW: dict[str, Any] = {"optimizer": "adamw", "ema": None}
SEED = 1


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    tool: str
    method: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.method}-{self.size}"


RUNS = [
    *(Run("pet-finetune", m, s) for s in SIZES for m in ("lora", "full", "scratch")),
    *(Run("metatrain", m, "50") for m in ("lora", "full")),
]


def write_splits(data: Path, work: Path) -> None:
    """Cut the training file: validation is the same 20 frames for every run."""
    frames = ase.io.read(data / "3bpa_train_300K.xyz", ":")
    order = np.random.default_rng(0).permutation(len(frames))
    validation = order[50:70]
    for size, (count, _) in SIZES.items():
        train = np.concatenate([order[:50], order[70:]])[:count]
        ase.io.write(work / f"train_{size}.xyz", [frames[i] for i in train])
    ase.io.write(work / "validation.xyz", [frames[i] for i in validation])


def dataset(path: Path, target: str) -> dict[str, Any]:
    """A set in metatrain's layout, which is ours too."""
    return {
        "systems": {"read_from": str(path), "length_unit": "angstrom"},
        "targets": {
            target: {
                "quantity": "energy",
                "key": "energy",
                "unit": "eV",
                "forces": {"key": "forces"},
            }
        },
    }


def options(run: Run, work: Path, foundation: Path) -> dict[str, Any]:
    """The options file of a run. Defaults but for epochs, batch and learning rate."""
    target = "energy" if run.method == "scratch" else "energy/ft"
    training: dict[str, Any] = {
        "batch_size": BATCH,
        "num_epochs": SIZES[run.size][1],
        "learning_rate": LEARNING_RATES[run.method],
    }
    if run.tool == "pet-finetune":
        training |= ADAMW
    model: dict[str, Any] = {}
    if run.method == "scratch":
        model = {"num_attention_layers": 1}  # the shape of the foundation
    else:
        training["finetune"] = {
            "method": run.method,
            "read_from": str(foundation),
            "inherit_heads": {"energy/ft": "energy"},
        }
    if run.method == "lora":
        modules = ["input_linear", "output_linear", "w_in", "w_out"]
        training["finetune"]["config"] = {"rank": 8, "alpha": 8, "target_modules": modules}
        if run.tool == "pet-finetune":
            del training["finetune"]["config"]["target_modules"]  # our default names them
    return {
        "seed": SEED,
        "device": "cpu",
        "base_precision": 32,
        "architecture": {"name": "pet", "model": model, "training": training},
        "training_set": dataset(work / f"train_{run.size}.xyz", target),
        "validation_set": dataset(work / "validation.xyz", target),
    }


def command(tool: str) -> list[str]:
    """Trains as ``options.yaml`` of the working directory says."""
    if tool == "pet-finetune":
        words = ["-m", "pet_finetune", "train", "options.yaml", "-o", "run"]
    else:
        words = ["-m", "metatrain", "train", "options.yaml", "-o", "model.pt"]
    return [sys.executable, *words, "-r", "final_eval=false"]


def carry_out(run: Run, work: Path, foundation: Path, threads: int) -> dict[str, Any]:
    """Train in a process of its own; returns its wall time and the path of its best model."""
    folder = work / run.name
    shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was interrupted
    folder.mkdir(parents=True)
    (folder / "options.yaml").write_text(yaml.safe_dump(options(run, work, foundation)))
    best = folder / ("run/best_model.ckpt" if run.tool == "pet-finetune" else "model.ckpt")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with (folder / "output.log").open("w") as log:
        subprocess.run(
            command(run.tool), cwd=folder, env=environment, stdout=log, stderr=log, check=True
        )
    return {"seconds": time.perf_counter() - started, "model": str(best)}


def errors(model_path: str, target: str, test: Path) -> dict[str, float]:
    """Errors on the test file, energies with and without their median offset."""
    frames = ase.io.read(test, ":")
    model = load_checkpoint(model_path).model
    energies, forces = [], []
    for start in range(0, len(frames), 16):
        batch = batch_from_atoms(frames[start : start + 16], model.cutoff, torch.float32)
        prediction = model.predict(batch, target)
        energies.append(prediction.energy.numpy())
        forces.append(prediction.forces.numpy())
    wrong = np.concatenate(energies) - np.array([f.get_potential_energy() for f in frames])
    atoms = np.array([len(f) for f in frames])
    off = np.concatenate(forces) - np.concatenate([f.get_forces() for f in frames])
    return {
        "energy_mae": float(np.mean(np.abs(wrong / atoms)) * 1e3),
        "energy_rmse": float(np.sqrt(np.mean((wrong / atoms) ** 2)) * 1e3),
        "energy_mae_no_offset": float(np.mean(np.abs(wrong - np.median(wrong)) / atoms) * 1e3),
        "forces_mae": float(np.mean(np.abs(off)) * 1e3),
        "forces_rmse": float(np.sqrt(np.mean(off**2)) * 1e3),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| tool | method | structures | E MAE (RMSE), meV/atom | E MAE without offset | "
        "F MAE (RMSE), meV/A | seconds | checkpoint, MB | adapter, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        row = results.get(run.name)
        if row is None:
            continue
        adapter = f"{row['adapter_mb']:.2f}" if row.get("adapter_mb") else ""
        lines.append(
            f"| {run.tool} | {run.method} | {SIZES[run.size][0]} | "
            f"{row['energy_mae']:.2f} ({row['energy_rmse']:.2f}) | "
            f"{row['energy_mae_no_offset']:.2f} | "
            f"{row['forces_mae']:.1f} ({row['forces_rmse']:.1f}) | {row['seconds']:.0f} | "
            f"{row['model_mb']:.1f} | {adapter} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--foundation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of runs, such as pet-finetune-lora-50")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    data, work = arguments.data.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_splits(data, work)
    store = work / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for run in RUNS:
        if run.name in results or (arguments.only and run.name not in arguments.only):
            continue
        print(f"{run.name} ...", flush=True)
        row = carry_out(run, work, arguments.foundation.resolve(), arguments.threads)
        target = "energy" if run.method == "scratch" else "energy/ft"
        row |= errors(row["model"], target, data / "3bpa_test_300K.xyz")
        row["model_mb"] = Path(row["model"]).stat().st_size / 1e6
        adapter = Path(row["model"]).parent / "adapter"
        if adapter.is_dir():
            row["adapter_mb"] = sum(f.stat().st_size for f in adapter.iterdir()) / 1e6
        results[run.name] = row
        store.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()
