"""A foundation in ten minutes of one GPU, from nothing: data, options, training and errors.

    python scripts/foundation/ten_minutes.py train.xyz.gz validation.xyz OUT [--minutes 10]

Needs neither a network nor anything beside the two files, which are packed into OUT first (the
9,008 structures that the first foundation learned from take 6 MB). Two epochs tell how many fit
into the time; the run itself has a schedule of that length, saves after each epoch and is stopped
when the time is up. ``OUT/best_model.ckpt`` is what to take home.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

MOST_MEGABYTES = 60


def options(folder: Path, device: str, quick: bool) -> dict:
    """Of the default model, trained on energies and forces."""
    energy = {"key": "energy", "unit": "eV", "forces": {"key": "forces"}, "stress": "off"}

    def data(name: str) -> dict:
        systems = {"read_from": str(folder / name), "length_unit": "angstrom"}
        return {"systems": systems, "targets": {"energy": energy}}

    small = {"d_pet": 16, "d_node": 16, "d_feedforward": 16, "d_head": 16, "num_gnn_layers": 1}
    return {
        "device": device,
        "seed": 1,
        "final_eval": False,
        "architecture": {
            "name": "pet",
            "model": small if quick else {},
            "training": {
                "batch_size": 32, "learning_rate": 1e-3, "warmup_fraction": 0.05, "ema": 0.999,
                "checkpoint_interval": 1, "finetune": {"method": "full", "retention": "off"},
            },
        },
        "training_set": data("train"),
        "validation_set": data("validation"),
    }  # fmt: skip


def pet_finetune(*arguments: str, limit: float | None = None) -> float:
    """Run a command; what is still running at the limit is asked to save. Returns seconds."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "pet_finetune", *arguments]) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            code = 0
    if code:
        raise SystemExit(f"pet-finetune {' '.join(arguments)} failed")
    return time.perf_counter() - began


def main() -> None:
    """Pack, time one epoch, train for as long as there is time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does every step run?")
    given = parser.parse_args()
    end = time.perf_counter() + 60 * given.minutes
    given.out.mkdir(parents=True)
    for name in ("train", "validation"):
        pet_finetune("convert", str(getattr(given, name)), str(given.out / name))
    size = sum(file.stat().st_size for file in given.out.rglob("*") if file.is_file()) / 1e6
    print(f"packed: {size:.1f} MB", flush=True)
    if size > MOST_MEGABYTES:
        raise SystemExit(f"That is more than {MOST_MEGABYTES} MB: take fewer structures.")
    file = given.out / "options.yaml"
    file.write_text(yaml.safe_dump(options(given.out, given.device, given.quick)))

    def train(folder: str, epochs: int, limit: float | None = None) -> float:
        length = f"architecture.training.num_epochs={epochs}"
        run = str(given.out / folder)
        return pet_finetune("train", str(file), "-o", run, "-r", length, limit=limit)

    whole = train("once", 2)
    rows = list(csv.DictReader((given.out / "once" / "train.csv").open()))
    start, epoch = whole - sum(float(r["seconds"]) for r in rows), float(rows[-1]["seconds"])
    left = end - time.perf_counter()
    epochs = max(1, int(0.9 * (left - start) / epoch))
    print(f"start {start:.0f} s, epoch {epoch:.1f} s: {epochs} fit into {left:.0f} s", flush=True)
    train("run", epochs, limit=left)
    shutil.copy(given.out / "run" / "best_model.ckpt", given.out / "best_model.ckpt")
    print(given.out / "best_model.ckpt")


if __name__ == "__main__":
    main()
