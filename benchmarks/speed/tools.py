"""Both tools made ready: metatrain's environment, the model, the workers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.speed.inputs import training_options, water_box, write_sets, write_structure
from benchmarks.speed.protocol import Worker
from benchmarks.speed.settings import OURS, REPOSITORY, SETS, THEIRS, Settings

_MODULES = {OURS: "worker_ours", THEIRS: "worker_metatrain"}
_PACKAGES = ("metatrain", "metatomic_ase")

#: Of float32, in which metatrain sums the energy: relative to it, and to the largest force.
ENERGY_TOLERANCE, FORCE_TOLERANCE = 1e-5, 1e-4


def metatrain_python(work: Path) -> str:
    """An interpreter that has metatrain: this one, or that of an environment made on first use."""
    if all(importlib.util.find_spec(package) for package in _PACKAGES):
        return sys.executable
    folder = work / "metatrain-env"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing metatrain into {folder} ...", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        constraints = REPOSITORY / "constraints.txt"
        pinned = {line.split("==")[0]: line for line in constraints.read_text().splitlines()}
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, pinned["torch"]], check=True)
        wanted = [pinned["metatrain"], pinned["metatomic-ase"]]
        subprocess.run([*pip, "-c", str(constraints), *wanted], check=True)
        (folder / "complete").touch()
    return str(python)


class Tools:
    """The workers of both tools and the model that they measure.

    Attributes:
        checkpoint: as metatrain wrote it, for training and for our calculator.
        exported: the same for metatrain's calculator and evaluation.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._python = {OURS: sys.executable, THEIRS: metatrain_python(settings.work)}
        self._workers: dict[str, Worker] = {}
        folder = settings.work / "model"
        self.checkpoint, self.exported = folder / "model.ckpt", folder / "model.pt"

    def model_of(self, tool: str) -> str:
        """The file that a tool's calculator and evaluation read."""
        return str(self.checkpoint if tool == OURS else self.exported)

    def fresh(self, tool: str) -> Worker:
        """A new worker, which the caller ends."""
        threads = str(self.settings.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.settings.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [self._python[tool], "-m", f"benchmarks.speed.{_MODULES[tool]}"]
        return Worker(command, environment, REPOSITORY, self.settings.work / f"{tool}.log")

    def __getitem__(self, tool: str) -> Worker:
        """The worker of a tool that lasts as long as this object."""
        if tool not in self._workers:
            self._workers[tool] = self.fresh(tool)
        return self._workers[tool]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the files of one run."""
        with tempfile.TemporaryDirectory(dir=self.settings.work, prefix="run-") as folder:
            yield Path(folder) / "run"

    def about(self) -> dict[str, Any]:
        """Versions and threads of both."""
        return {tool: self[tool].ask("about") for tool in (OURS, THEIRS)}

    def make_model(self) -> None:
        """Let metatrain make and export a model of its default shape with random weights.

        It is a run of one epoch that learns nothing, so that the checkpoint is as real as any.
        """
        if self.exported.exists():
            return
        source = SETS[0]
        options = training_options(self.settings, source, THEIRS, "scratch", None, epochs=1)
        with self.scratch() as folder:
            self[THEIRS].ask("train", options=str(options), folder=str(folder))
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / "model.ckpt", self.checkpoint)
            shutil.move(folder / "model.pt", self.exported)  # last: it says that both are there

    def agreement(self) -> dict[str, dict[str, float]]:
        """How far the tools' predictions are apart, by structure.

        Raises:
            RuntimeError: further than rounding explains.
        """
        structures = {s.name: write_sets(self.settings, s)[0] for s in SETS}
        structures["box"] = write_structure(self.settings.work, "box-81", water_box((3, 3, 9)))
        found = {name: self._apart(path) for name, path in structures.items()}
        for name, apart in found.items():
            if apart["energy"] > ENERGY_TOLERANCE or apart["forces"] > FORCE_TOLERANCE:
                raise RuntimeError(
                    f"The tools disagree about '{name}': relative deviations {apart}, allowed "
                    f"{ENERGY_TOLERANCE} and {FORCE_TOLERANCE}."
                )
        return found

    def _apart(self, structure: Path) -> dict[str, float]:
        """Relative deviations: of the energy, and of forces from the largest of them."""
        energies, forces = {}, {}
        for tool in (OURS, THEIRS):
            self.open(self[tool], tool, structure)
            answer = self[tool].ask("predict")
            energies[tool], forces[tool] = answer["energy"], np.array(answer["forces"])
        largest = np.abs(forces[THEIRS]).max()
        return {
            "energy": abs(energies[OURS] / energies[THEIRS] - 1.0),
            "forces": float(np.abs(forces[OURS] - forces[THEIRS]).max() / largest),
        }

    def open(self, worker: Worker, tool: str, structure: Path) -> None:
        """Let a worker make the calculator of a structure."""
        device = self.settings.device
        worker.ask("open", model=self.model_of(tool), structure=str(structure), device=device)
