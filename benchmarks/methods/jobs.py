"""One training run: its options, its process, its result."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from benchmarks.methods.rows import METHODS, SCRATCH
from benchmarks.methods.sets import SETS, section

#: The shape of the shipped foundation, for training from scratch.
FOUNDATION_SHAPE = {"num_attention_layers": 1}
_COUNT = re.compile(r"([\d,]+) of ([\d,]+) parameters train")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        data: name of the set.
        method: name of the row.
        learning_rate: its highest.
        seed: of everything random in the run; the split is the same for all.
        epochs: instead of the set's own number.
    """

    data: str
    method: str
    learning_rate: float
    seed: int = 1
    epochs: int = 0

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        method = re.sub(r"[ ,=()]+", "-", self.method)
        name = f"{self.data}_{method}_{self.learning_rate:.2g}_s{self.seed}"
        return f"{name}_e{self.epochs}" if self.epochs else name

    def training(self) -> dict[str, Any]:
        """``architecture.training`` but for the starting checkpoint.

        What decides the errors is written out, so that the run is the same when a default changes.
        """
        plan, method = SETS[self.data], METHODS[self.method]
        training: dict[str, Any] = {
            "batch_size": plan.batch_size,
            "num_epochs": self.epochs or plan.num_epochs,
            "learning_rate": self.learning_rate,
            "scheduler": "cosine",
            "optimizer": "soap",
            "ema": 0.99,
        }
        if method.name != SCRATCH:
            training["finetune"] = {"method": method.name, **method.finetune}
            if method.own_head:
                training["finetune"]["inherit_heads"] = {method.target: "energy"}
            if method.config:
                training["finetune"]["config"] = dict(method.config)
        return training

    def options(self, work: Path, foundation: Path) -> dict[str, Any]:
        """The options file."""
        training, target = self.training(), METHODS[self.method].target
        model: dict[str, Any] = FOUNDATION_SHAPE
        if "finetune" in training:
            model = {}
            training["finetune"] = {
                **training["finetune"],
                "read_from": str(foundation),
                "retention": {"every": training["num_epochs"]},  # no more often than needed
            }
        return {
            "seed": self.seed,
            "device": "cpu",
            "base_precision": 32,
            "architecture": {"name": "pet", "model": model, "training": training},
            "training_set": section(self.data, "train", work, target),
            "validation_set": section(self.data, "validation", work, target),
            "test_set": section(self.data, "test", work, target),
        }


def carry_out(job: Job, work: Path, foundation: Path, threads: int, cost_only: bool) -> dict:
    """Train in a process of its own; returns what is known of the run.

    Args:
        job: the run.
        work: holds the splits; the run gets a folder in it.
        foundation: the checkpoint to start from.
        threads: of the process.
        cost_only: check and evaluate nothing, only time and memory of training count.
    """
    folder = work / "runs" / job.name
    shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was interrupted
    folder.mkdir(parents=True)
    (folder / "options.yaml").write_text(yaml.safe_dump(job.options(work, foundation)))
    words = [sys.executable, "-m", "pet_finetune", "train", "options.yaml", "-o", "run"]
    if cost_only:
        words += ["--no-check", "-r", "final_eval=false"]
    started = time.perf_counter()
    with (folder / "output.log").open("w") as log:
        memory, status = run_and_measure(words, folder, threads, log)
    if status:
        tail = (folder / "output.log").read_text()[-1500:]
        raise RuntimeError(f"{job.name} failed, see {folder}/output.log:\n{tail}")
    row = {"training": job.training(), "wall_seconds": time.perf_counter() - started}
    row |= {"process_mb": memory, "threads": threads}
    return row | _read(folder / "run")


def run_and_measure(words: list[str], folder: Path, threads: int, log: Any) -> tuple[float, int]:
    """Run a command; returns its largest resident memory, MB, and its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / 1024, process.returncode


def import_memory(threads: int, folder: Path) -> float:
    """Largest resident memory, MB, of a process that imports what training needs."""
    words = [sys.executable, "-c", "import pet_finetune.api"]
    memory, status = run_and_measure(words, folder, threads, subprocess.DEVNULL)
    if status:
        raise RuntimeError("the package cannot be imported in a process of its own")
    return memory


def _read(run: Path) -> dict[str, Any]:
    """What the run has left behind; its checkpoint stays, ``last.ckpt`` goes."""
    (run / "last.ckpt").unlink(missing_ok=True)
    with (run / "train.csv").open() as stream:
        epochs = list(csv.DictReader(stream))
    count = _COUNT.search((run / "train.log").read_text())
    adapter = run / "adapter"
    sent = list(adapter.iterdir()) if adapter.is_dir() else [run / "best_model.ckpt"]
    row: dict[str, Any] = {
        "model": str(run / "best_model.ckpt"),
        "epoch_seconds": [float(epoch["seconds"]) for epoch in epochs],
        "best_epoch": max(int(e["epoch"]) for e in epochs if e["best"] == "1"),
        "is_adapter": adapter.is_dir(),
        "bytes": sum(path.stat().st_size for path in sent),
    }
    if count is not None:
        row["trainable"], row["parameters"] = (int(n.replace(",", "")) for n in count.groups())
    results = run / "results.json"
    if results.exists():
        row |= json.loads(results.read_text())
    return row
