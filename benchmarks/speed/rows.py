"""The rows of the table: what is measured, how, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ase.io
from benchmarks.speed.inputs import (
    evaluation_options,
    training_options,
    water_box,
    write_structure,
)
from benchmarks.speed.protocol import Worker
from benchmarks.speed.settings import (
    EVALUATION_BATCH,
    EVALUATION_STRUCTURES,
    OURS,
    SETS,
    THEIRS,
    UNTIMED_EPOCHS,
    TrainingSet,
)
from benchmarks.speed.tools import Tools

#: Values by tool, the n-th of both measured one right after the other.
Pairs = dict[str, list[float]]
Kind = Literal["rate", "time", "memory"]

#: Peaks of memory vary little, and each takes a process of its own.
MEMORY_PAIRS = 3
QUICK_STRUCTURES = 64  # of the evaluation
WARM_UP = 3  # calls before the first that is timed: TorchScript optimises in them


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: for the command line.
        title: for the table.
        kind: a rate is better when higher; a time or memory when lower. The ratio of rates and
            times is metatrain's time over ours, that of memory ours over metatrain's.
        unit: of the values.
        measure: returns them.
        goals: by device, the least that is wanted and the aim.
    """

    name: str
    title: str
    kind: Kind
    unit: str
    measure: Callable[[Tools], Pairs]
    goals: dict[str, tuple[float, float]] = field(default_factory=dict)


def alternate(measure: Callable[[str], float], pairs: int) -> Pairs:
    """Measure both tools in turn; which one begins a pair alternates too."""
    values: Pairs = {OURS: [], THEIRS: []}
    for pair in range(pairs):
        for tool in (OURS, THEIRS) if pair % 2 == 0 else (THEIRS, OURS):
            values[tool].append(measure(tool))
    return values


def _training_arguments(
    tools: Tools, source: TrainingSet, tool: str, method: str, epochs: int, folder: Path
) -> dict[str, Any]:
    options = training_options(tools.settings, source, tool, method, tools.checkpoint, epochs)
    return {"options": str(options), "folder": str(folder)}


def training_rate(tools: Tools, source: TrainingSet, method: str) -> Pairs:
    """Structures a second over whole epochs.

    With all that belongs to them: shuffling, rotating, validation, keeping the best model.
    """
    source = source.tiny() if tools.settings.quick else source
    epochs = UNTIMED_EPOCHS + source.epochs

    def rate(tool: str) -> float:
        with tools.scratch() as folder:
            arguments = _training_arguments(tools, source, tool, method, epochs, folder)
            ends = tools[tool].ask("train", **arguments)
        if len(ends) != epochs:
            raise RuntimeError(f"{tool} logged {len(ends)} epochs of {epochs}.")
        return source.train * source.epochs / (ends[-1] - ends[UNTIMED_EPOCHS - 1])

    return alternate(rate, tools.settings.pairs)


def training_memory(tools: Tools, source: TrainingSet, method: str) -> Pairs:
    """The peak in MB during the steps of one epoch, model and data being loaded before."""
    source = source.tiny() if tools.settings.quick else source

    def peak(tool: str) -> float:
        with tools.fresh(tool) as worker, tools.scratch() as folder:
            arguments = _training_arguments(tools, source, tool, method, 1, folder)
            value: float = worker.ask("training_peak", **arguments, device=tools.settings.device)
            return value

    return alternate(peak, min(MEMORY_PAIRS, tools.settings.pairs))


@dataclass(frozen=True)
class System:
    """Atoms to move: a box of water, or the first structure of the ethanol set.

    Attributes:
        cells: molecules along each edge; None for ethanol.
        steps: in a block.
    """

    cells: tuple[int, int, int] | None
    steps: int

    def write(self, tools: Tools) -> Path:
        if self.cells is None:
            ethanol = next(s for s in SETS if s.name == "ethanol")
            atoms = ase.io.read(tools.settings.data / ethanol.file, 0)
            return write_structure(tools.settings.work, "ethanol", atoms)
        atoms = water_box(self.cells)
        return write_structure(tools.settings.work, f"water-{len(atoms)}", atoms)


def _open_everywhere(tools: Tools, system: System, call: str) -> int:
    """The system opened and warmed up in both workers; returns the steps of a block."""
    quick = tools.settings.quick
    structure = replace(system, cells=system.cells and (4, 4, 4)) if quick else system
    path = structure.write(tools)
    for tool in (OURS, THEIRS):
        tools.open(tools[tool], tool, path)
        tools[tool].ask(call, count=1 if quick else WARM_UP)
    return 2 if quick else system.steps


def md_time(tools: Tools, system: System) -> Pairs:
    """Milliseconds of a velocity Verlet step.

    With random weights there is next to no force, so the atoms fly at the speed of 300 K. A box
    stays a box all the same and goes on from block to block; a molecule would fly apart and
    begins anew.
    """
    steps = _open_everywhere(tools, system, "steps")

    def milliseconds(tool: str) -> float:
        worker: Worker = tools[tool]
        if system.cells is None:
            worker.ask("restart")
        return float(worker.ask("steps", count=steps)) / steps * 1e3

    return alternate(milliseconds, tools.settings.pairs)


def call_time(tools: Tools, system: System) -> Pairs:
    """Milliseconds of energy and forces of a structure whose atoms were moved a little."""
    calls = _open_everywhere(tools, system, "evaluations")

    def milliseconds(tool: str) -> float:
        return float(tools[tool].ask("evaluations", count=calls)) / calls * 1e3

    return alternate(milliseconds, tools.settings.pairs)


def evaluation_time(tools: Tools) -> Pairs:
    """Seconds of each tool's evaluation of labelled structures, reading of the model included."""
    settings = tools.settings
    count = QUICK_STRUCTURES if settings.quick else EVALUATION_STRUCTURES
    options = str(evaluation_options(settings, count))

    def seconds(tool: str) -> float:
        return float(
            tools[tool].ask(
                "evaluate", model=tools.model_of(tool), options=options,
                batch_size=EVALUATION_BATCH, device=settings.device,
            )
        )  # fmt: skip

    return alternate(seconds, settings.pairs)


_SYSTEMS = {
    "9": (System(None, 100), {"cpu": (3.0, 5.0)}),
    "243": (System((3, 3, 9), 40), {"cpu": (1.7, 2.5), "cuda": (2.0, 4.0)}),
    "1944": (System((9, 9, 8), 10), {"cpu": (1.7, 2.5), "cuda": (2.0, 4.0)}),
}
_METHODS = {
    "lora": ("LoRA", {"cpu": (2.0, 3.0), "cuda": (2.0, 4.0)}),
    "full": ("full", {"cpu": (1.6, 2.5)}),
}


def all_rows() -> list[Row]:
    """In the order of the table."""
    rows = []
    for method, (title, goals) in _METHODS.items():
        for source in SETS:
            rows.append(
                Row(
                    f"train-{method}-{source.name}",
                    f"{title} training, {source.title}",
                    "rate",
                    "structures/s",
                    partial(training_rate, source=source, method=method),
                    goals,
                )
            )
    for method, (title, _) in _METHODS.items():
        for source in SETS:
            rows.append(
                Row(
                    f"memory-{method}-{source.name}",
                    f"memory of a {title} training step, {source.title}",
                    "memory",
                    "MB",
                    partial(training_memory, source=source, method=method),
                    {"cpu": (0.6, 0.4), "cuda": (0.6, 0.4)},
                )
            )
    for atoms, (system, goals) in _SYSTEMS.items():
        measure = partial(md_time, system=system)
        rows.append(Row(f"md-{atoms}", f"MD step, {atoms} atoms", "time", "ms", measure, goals))
    for atoms, (system, _) in _SYSTEMS.items():
        measure = partial(call_time, system=system)
        rows.append(
            Row(f"call-{atoms}", f"energy and forces, {atoms} atoms", "time", "ms", measure)
        )
    goals = {"cpu": (1.7, 3.0)}
    title = f"evaluation of {EVALUATION_STRUCTURES:,} structures"
    rows.append(Row("evaluation", title, "time", "s", evaluation_time, goals))
    return rows
