"""What energy and forces cost as the system grows."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from benchmarks.speed.inputs import water_box, write_structure
from benchmarks.speed.protocol import Worker
from benchmarks.speed.rows import WARM_UP
from benchmarks.speed.settings import OURS, THEIRS
from benchmarks.speed.tools import Tools

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAME = "sizes"
#: Deviation of the time per atom from its mean that still counts as linear.
GOAL = 0.1

#: Molecules of water along the edges of the box: 96 to 20,400 atoms.
_BOXES = (
    (4, 4, 2), (4, 4, 4), (5, 5, 5), (6, 6, 6), (8, 8, 8), (10, 10, 10), (13, 13, 13),
    (16, 16, 16), (20, 20, 17),
)  # fmt: skip
_QUICK_BOXES = _BOXES[:2]
_PAIRS = 3
_LARGE = 1000  # atoms: a call takes so long that one is warm-up enough
_ATOMS_IN_A_BLOCK = 4000  # small systems are evaluated more than once


def measure(tools: Tools) -> dict[str, Any]:
    """Seconds of a call by number of atoms, for each tool as far as its memory allows.

    All sizes take their turn in each round, so that a slow quarter of an hour of the machine is
    spread over them and not taken for a size that costs more.
    """
    settings = tools.settings
    sizes: list[dict[str, Any]] = []
    paths: list[Path] = []
    workers = {tool: tools.fresh(tool) for tool in (OURS, THEIRS)}
    try:
        empty = {tool: _peak_gb(tools, workers[tool]) for tool in workers}
        for cells in _QUICK_BOXES if settings.quick else _BOXES:
            atoms = water_box(cells)
            size = _size(len(atoms), sizes, empty, settings.max_memory)
            if not size["seconds"]:
                break
            sizes.append(size)
            paths.append(write_structure(settings.work, f"water-{len(atoms)}", atoms))
            _pair(tools, workers, size, paths[-1], ours_first=True)
        for number in range(1, min(_PAIRS, settings.pairs)):
            for size, path in zip(sizes, paths, strict=True):
                _pair(tools, workers, size, path, ours_first=number % 2 == 0)
    finally:
        for worker in workers.values():
            worker.close()
    return {"sizes": sizes, "deviation": {tool: deviation(sizes, tool) for tool in workers}}


def _size(
    atoms: int, before: list[dict[str, Any]], empty: dict[str, float], max_memory: float
) -> dict[str, Any]:
    """Room for the measurements of one size, for those tools that it should fit."""
    fitting = [t for t in empty if _expected_gb(before, t, atoms, empty[t]) <= max_memory]
    return {"atoms": atoms, "seconds": {tool: [] for tool in fitting}, "peak_gb": {}}


def _pair(
    tools: Tools, workers: dict[str, Worker], size: dict[str, Any], path: Path, *, ours_first: bool
) -> None:
    """One block of each tool, added to ``size``; the peak only when it grew to this size."""
    count = max(1, _ATOMS_IN_A_BLOCK // size["atoms"])
    fitting = list(size["seconds"])
    for tool in fitting if ours_first else reversed(fitting):
        tools.open(workers[tool], tool, path)
        workers[tool].ask("evaluations", count=WARM_UP if size["atoms"] < _LARGE else 1)
        seconds = workers[tool].ask("evaluations", count=count) / count
        size["seconds"][tool].append(seconds)
        size["peak_gb"].setdefault(tool, _peak_gb(tools, workers[tool]))


def _peak_gb(tools: Tools, worker: Worker) -> float:
    return float(worker.ask("peak", device=tools.settings.device)) / 1e3


def _expected_gb(sizes: list[dict[str, Any]], tool: str, atoms: int, empty: float) -> float:
    """The peak of a size to come, if what came on top of ``empty`` grows in proportion."""
    if not sizes:
        return 0.0
    last = sizes[-1]
    if tool not in last["peak_gb"]:
        return math.inf  # did not fit the last size
    return empty + (float(last["peak_gb"][tool]) - empty) * atoms / int(last["atoms"])


def _per_atom(sizes: list[dict[str, Any]], tool: str) -> dict[int, float]:
    """Milliseconds per atom by number of atoms."""
    return {
        size["atoms"]: median(size["seconds"][tool]) / size["atoms"] * 1e3
        for size in sizes
        if tool in size["seconds"]
    }


def deviation(sizes: list[dict[str, Any]], tool: str) -> float:
    """The largest deviation of the time per atom from its mean over the sizes, relative."""
    values = list(_per_atom(sizes, tool).values())
    mean = fmean(values)
    return max(abs(value / mean - 1.0) for value in values)


def table(row: dict[str, Any]) -> str:
    """Markdown: time by size, and how linear it is."""
    lines = [
        "| atoms | metatrain, s | pet-finetune, s | ratio | pet-finetune, ms/atom | "
        "memory of the process, GB: metatrain, pet-finetune |",
        "|---|---|---|---|---|---|",
    ]
    for size in row["sizes"]:
        seconds = {tool: median(values) for tool, values in size["seconds"].items()}
        ratio = f"{seconds[THEIRS] / seconds[OURS]:.2f}" if len(seconds) == 2 else ""
        cells = [
            f"{size['atoms']:,}",
            *(f"{seconds[t]:.3g}" if t in seconds else "" for t in (THEIRS, OURS)),
            ratio,
            f"{seconds[OURS] / size['atoms'] * 1e3:.3f}" if OURS in seconds else "",
            ", ".join(f"{size['peak_gb'][t]:.2f}" for t in (THEIRS, OURS) if t in seconds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    apart = ", ".join(f"{tool} {row['deviation'][tool]:.1%}" for tool in (OURS, THEIRS))
    first, last = row["sizes"][0]["atoms"], row["sizes"][-1]["atoms"]
    lines += [
        "",
        f"Largest deviation of the time per atom from its mean, {first:,} to {last:,} atoms or as "
        f"far as the tool went: {apart} (wanted of pet-finetune: at most {GOAL:.0%}).",
    ]
    return "\n".join(lines)


def plot(row: dict[str, Any], path: Path, title: str) -> None:
    """Time, and time per atom, against the number of atoms."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for tool, marker in ((THEIRS, "s"), (OURS, "o")):
        per_atom = _per_atom(row["sizes"], tool)
        atoms = list(per_atom)
        seconds = [n * value / 1e3 for n, value in per_atom.items()]
        left.loglog(atoms, seconds, marker=marker, label=tool)
        right.loglog(atoms, list(per_atom.values()), marker=marker, label=tool)
    left.set(xlabel="atoms", ylabel="energy and forces, s")
    right.set(xlabel="atoms", ylabel="energy and forces, ms per atom")
    for axes in (left, right):
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
