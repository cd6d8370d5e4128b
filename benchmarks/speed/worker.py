"""What a worker can be asked to measure: the same code around either tool."""

from __future__ import annotations

import gc
import logging
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import units
from ase.calculators.calculator import Calculator
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from benchmarks.speed.memory import MemoryMeter, peak_memory
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

TIME_STEP = 0.5  # fs
TEMPERATURE = 300.0  # K
RATTLE = 0.01  # A, between two evaluations that are not MD


class Tool(ABC):
    """One of the two tools, used as its users do."""

    #: The logger to which the tool writes a line that begins with "epoch" after each epoch.
    epoch_logger: str
    #: The class whose ``zero_grad`` begins a training step.
    optimizer: type[Optimizer] = Optimizer

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that matter."""

    @abstractmethod
    def train(self, options: Path, folder: Path) -> None:
        """A training run, as the command line does it; its files go into ``folder``."""

    @abstractmethod
    def calculator(self, model: Path, device: str) -> Calculator:
        """The ASE calculator with its defaults."""

    @abstractmethod
    def evaluate(self, model: Path, options: Path, batch_size: int, device: str) -> None:
        """Errors on the structures of a file with options, the model read from its file."""


class _EpochClock(logging.Handler):
    """Notes when an epoch's line is written."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().lower().startswith("epoch"):
            self.times.append(time.perf_counter())


class Bench:
    """Measures a tool; paths are strings and times seconds, as they travel as JSON."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._md: VelocityVerlet | None = None
        self._random = np.random.default_rng(0)

    def about(self) -> dict[str, Any]:
        """Versions and threads."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "versions": {"torch": torch.__version__, **self._tool.versions()},
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        }

    def train(self, options: str, folder: str) -> list[float]:
        """A run; returns the times at which its epochs ended."""
        clock = _EpochClock()
        logger = logging.getLogger(self._tool.epoch_logger)
        logger.addHandler(clock)
        try:
            self._tool.train(Path(options), Path(folder))
        finally:
            logger.removeHandler(clock)
        return clock.times

    def training_peak(self, options: str, folder: str, device: str) -> float:
        """A run; returns the peak in MB from its first step's start to its last step's end."""
        meters: list[MemoryMeter] = []
        peaks: list[float] = []
        optimizer, zero_grad = self._tool.optimizer, self._tool.optimizer.zero_grad

        def first_step(self: Optimizer, set_to_none: bool = True) -> None:
            """Both tools begin a step with this call."""
            optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
            meters.append(MemoryMeter(device))
            zero_grad(self, set_to_none)

        optimizer.zero_grad = first_step  # type: ignore[method-assign]
        hook = register_optimizer_step_post_hook(lambda *_: peaks.append(meters[0].peak()))
        try:
            self._tool.train(Path(options), Path(folder))
        finally:
            hook.remove()
        return peaks[-1]

    def open(self, model: str, structure: str, device: str) -> int:
        """Make the structure's calculator and velocities; returns the number of atoms."""
        self._md = None
        gc.collect()
        atoms = ase.io.read(structure, 0)
        atoms.calc = self._tool.calculator(Path(model), device)
        generator = np.random.default_rng(0)
        MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=generator)
        if len(atoms) > 1:
            Stationary(atoms)
        self._md = VelocityVerlet(atoms, TIME_STEP * units.fs)
        self._start, self._velocities = atoms.positions.copy(), atoms.get_velocities()
        return len(atoms)

    def restart(self) -> None:
        """Put the atoms back to where they started, and take a first step."""
        atoms = self._dynamics.atoms
        atoms.positions = self._start
        atoms.set_velocities(self._velocities)
        self._dynamics.run(1)

    @property
    def _dynamics(self) -> VelocityVerlet:
        assert self._md is not None, "open a structure first"
        return self._md

    def predict(self) -> dict[str, Any]:
        """Energy and forces of the open structure."""
        atoms = self._dynamics.atoms
        forces = atoms.get_forces()
        return {"energy": float(atoms.get_potential_energy()), "forces": forces.tolist()}

    def steps(self, count: int) -> float:
        """Seconds of MD that goes on from where the last one stopped."""
        md = self._dynamics
        gc.collect()
        begin = time.perf_counter()
        md.run(count)
        return time.perf_counter() - begin

    def temperature(self) -> float:
        """Of the moving atoms, K."""
        return float(self._dynamics.atoms.get_temperature())

    def evaluations(self, count: int) -> float:
        """Seconds of energy and forces of slightly different positions."""
        atoms = self._dynamics.atoms
        gc.collect()
        begin = time.perf_counter()
        for _ in range(count):
            atoms.positions = self._start + self._random.normal(0.0, RATTLE, self._start.shape)
            atoms.get_potential_energy()
            atoms.get_forces()
        return time.perf_counter() - begin

    def evaluate(self, model: str, options: str, batch_size: int, device: str) -> float:
        """Seconds of the tool's evaluation of a file, reading the model included."""
        gc.collect()
        begin = time.perf_counter()
        self._tool.evaluate(Path(model), Path(options), batch_size, device)
        return time.perf_counter() - begin

    def peak(self, device: str) -> float:
        """The most memory the process ever had, MB."""
        return peak_memory(device)
