r"""Learning curves: what a foundation is worth at 10, 25, 50, 100 and all structures.

    python -m benchmarks.learning_curves --data DATA --work WORK \
        --starts scratch checkpoints/pet-xtb-v0.ckpt checkpoints/pet-xtb-s.ckpt

Full fine-tuning from each checkpoint, and training from scratch in the same shape, on nested parts
of the same structures, with the same number of updates. Errors are those of the best model of a run
on test structures that no run saw. Runs whose result is in WORK are not done again. Writes
``learning_curves.json``, ``.md`` and ``.svg``.

DATA holds `3bpa_train_300K.xyz`, `3bpa_test_300K.xyz` and `ethanol_pbe_train1000.xyz`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import yaml
from benchmarks.accuracy import ADAMW, dataset, errors
from benchmarks.methods.jobs import FOUNDATION_SHAPE

from pet_finetune.report.figures import log_ticks

BATCH = 5
VALIDATION = 20
SEED = 1
SCRATCH = "scratch"
LEARNING_RATES = {SCRATCH: 5e-4, "full": 2e-4}  # the defaults with AdamW


@dataclass(frozen=True)
class Curve:
    """A set of structures: ``test`` of its own, or what is left of ``train``."""

    title: str
    train: str
    test: str
    sizes: tuple[int, ...]
    tested: int = 134


CURVES = {
    "3bpa": Curve(
        "3BPA, 300 K, wB97X/6-31G(d)", "3bpa_train_300K.xyz", "3bpa_test_300K.xyz",
        (10, 25, 50, 100, 480),
    ),
    "ethanol": Curve(
        "ethanol, PBE/def2-SVP", "ethanol_pbe_train1000.xyz", "", (10, 25, 50, 100, 800)
    ),
}  # fmt: skip


def write_parts(name: str, data: Path, work: Path) -> None:
    """Nested training files of each size, and the same validation and test file for all."""
    curve = CURVES[name]
    frames = ase.io.read(data / curve.train, ":")
    order = np.random.default_rng(0).permutation(len(frames))
    own = [frames[i] for i in order]
    tests = ase.io.read(data / curve.test, ":") if curve.test else own[-curve.tested :]
    ase.io.write(work / f"{name}-test.xyz", tests)
    ase.io.write(work / f"{name}-validation.xyz", own[:VALIDATION])
    for size in curve.sizes:
        ase.io.write(work / f"{name}-{size}.xyz", own[VALIDATION : VALIDATION + size])


def options(name: str, size: int, start: str, work: Path, updates: int) -> dict[str, Any]:
    """The options file of a run: defaults but for batch and epochs."""
    kind = SCRATCH if start == SCRATCH else "full"
    training: dict[str, Any] = {
        "batch_size": BATCH,
        "num_epochs": max(1, round(updates / -(-size // BATCH))),
        "learning_rate": LEARNING_RATES[kind],
        **ADAMW,
    }
    model: dict[str, Any] = FOUNDATION_SHAPE
    if kind != SCRATCH:
        model = {}
        training["finetune"] = {"method": "full", "read_from": start, "retention": "off"}
    return {
        "seed": SEED,
        "device": "cpu",
        "architecture": {"name": "pet", "model": model, "training": training},
        "training_set": dataset(work / f"{name}-{size}.xyz", "energy"),
        "validation_set": dataset(work / f"{name}-validation.xyz", "energy"),
    }


def carry_out(name: str, size: int, start: str, work: Path, updates: int, threads: int) -> dict:
    """Train in a process of its own; returns its errors on the test structures."""
    folder = work / f"{name}-{size}-{Path(start).stem}-{updates}"
    shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was interrupted
    folder.mkdir(parents=True)
    settings = options(name, size, start, work, updates)
    (folder / "options.yaml").write_text(yaml.safe_dump(settings))
    words = ["-m", "pet_finetune", "train", "options.yaml", "-o", "run", "-r", "final_eval=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "output.log").open("w") as log:
        subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )
    (folder / "run" / "last.ckpt").unlink(missing_ok=True)
    model = str(folder / "run" / "best_model.ckpt")
    found = errors(model, "energy", work / f"{name}-test.xyz")
    return found | {"epochs": settings["architecture"]["training"]["num_epochs"]}


def key(name: str, size: int, start: str, updates: int) -> str:
    """Of a run among the results."""
    return f"{name} {size} {Path(start).stem} {updates}"


def table(results: dict[str, dict], starts: list[str], updates: int) -> str:
    """The results as Markdown: energy / forces for every size and start."""
    lines = []
    for name, curve in CURVES.items():
        lines += [f"{curve.title}: E MAE, meV/atom / F MAE, meV/Å", ""]
        lines.append("| structures | " + " | ".join(Path(s).stem for s in starts) + " |")
        lines.append("|---" * (len(starts) + 1) + "|")
        for size in curve.sizes:
            rows = [results.get(key(name, size, start, updates)) for start in starts]
            cells = [f"{r['energy_mae']:.2f} / {r['forces_mae']:.0f}" if r else "" for r in rows]
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict], starts: list[str], updates: int, path: Path) -> None:
    """Force errors against the number of structures, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(CURVES), 3.6), layout="constrained")
    for axes, (name, curve) in zip(
        np.atleast_1d(figure.subplots(1, len(CURVES))), CURVES.items(), strict=True
    ):
        drawn: list[float] = []
        for start in starts:
            found = [(n, results.get(key(name, n, start, updates))) for n in curve.sizes]
            points = [(size, row["forces_mae"]) for size, row in found if row]
            if points:
                axes.loglog(*zip(*points, strict=True), "o-", label=Path(start).stem)
                drawn += [error for _, error in points]
        axes.set(title=curve.title, xlabel="training structures", ylabel="force MAE, meV/Å")
        log_ticks(axes.xaxis, curve.sizes)
        log_ticks(axes.yaxis, drawn)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.88))
    figure.savefig(path)


def main() -> None:
    """Run what is missing and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/learning-curves"))
    parser.add_argument("--starts", nargs="+", required=True, help="checkpoints, and 'scratch'")
    parser.add_argument("--sets", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--updates", type=int, default=400, help="of each run")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    starts = [s if s == SCRATCH else str(Path(s).resolve()) for s in arguments.starts]
    store = work / "learning_curves.json"
    results: dict[str, dict] = json.loads(store.read_text()) if store.exists() else {}
    for name in arguments.sets:
        write_parts(name, arguments.data, work)
        for size in CURVES[name].sizes:
            for start in starts:
                mark = key(name, size, start, arguments.updates)
                if mark not in results:
                    run = (name, size, start, work, arguments.updates, arguments.threads)
                    results[mark] = carry_out(*run)
                    store.write_text(json.dumps(results, indent=2))
                    print(mark, f"F {results[mark]['forces_mae']:.1f} meV/A", flush=True)
    text = table(results, starts, arguments.updates)
    (work / "learning_curves.md").write_text(text)
    plot(results, starts, arguments.updates, work / "learning_curves.svg")
    print(text)


if __name__ == "__main__":
    main()
