"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.methods.jobs import Job
from benchmarks.methods.rows import METHODS, SCRATCH
from benchmarks.methods.sets import SETS

Rows = Mapping[str, Mapping[str, Any]]


def errors_of(row: Mapping[str, Any], when: str = "after") -> Mapping[str, float]:
    """Errors of a run on the test set; eV/atom, eV/A, eV/A^3."""
    errors: dict[str, Mapping[str, float]] = row[when]["test"]
    return next(iter(errors.values()))


def errors_text(errors: Mapping[str, float]) -> str:
    """Energy, forces and, where there are some, stress; meV."""
    words = [f"{errors['energy_mae'] * 1e3:.2f}", f"{errors['forces_mae'] * 1e3:.1f}"]
    if "stress_mae" in errors:
        words.append(f"{errors['stress_mae'] * 1e3:.1f}")
    return " / ".join(words)


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def set_titles(sets: Sequence[str]) -> list[str]:
    return [f"{name}: E / F{' / stress' if SETS[name].stress else ''}" for name in sets]


def spread_table(
    names: Sequence[str], sets: Sequence[str], seeds: int, rows: Rows, rates: Mapping[str, float]
) -> str:
    """Mean and standard deviation over seeds."""
    lines = []
    for name in names:
        cells = []
        for data in sets:
            jobs = [Job(data, name, rates[name], seed) for seed in range(1, seeds + 1)]
            found = [errors_of(rows[job.name]) for job in jobs if job.name in rows]
            cells.append(spread_text(found))
        lines.append([name, *cells])
    return table(["method", *set_titles(sets)], lines)


def forgotten(rows: Sequence[Mapping[str, Any] | None]) -> str:
    """By set: mean absolute error of forces on the structures of the forgetting report, meV/A."""
    words = []
    for row in rows:
        kept = (row or {}).get("after", {}).get("retention", {})
        errors = kept.get("energy", next(iter(kept.values()), None))  # the foundation's own head
        words.append(f"{errors['forces_mae'] * 1e3:.0f}" if errors else "")
    return " / ".join(word or "-" for word in words) if any(words) else ""


def spread_text(found: Sequence[Mapping[str, float]]) -> str:
    if len(found) < 2:
        return ""
    kinds = [k for k in ("energy_mae", "forces_mae", "stress_mae") if k in found[0]]
    words = []
    for kind, digits in zip(kinds, (2, 1, 1), strict=False):
        values = [errors[kind] * 1e3 for errors in found]
        words.append(f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}")
    return f"{' / '.join(words)} ({len(found)})"


def method_table(sets: Sequence[str], rows: Rows, rates: Mapping[str, float], cost: Rows) -> str:
    """One line a method."""
    lines = [_foundation_line(sets, rows)]
    for name, method in METHODS.items():
        jobs = [Job(data, name, rates[name]) for data in sets]
        found = [rows.get(job.name) for job in jobs]
        if not any(found):
            continue
        one = next(row for row in found if row)
        sent = f"{one['bytes'] / 1e3:.0f}" + ("" if one["is_adapter"] else " *")
        count = one.get("trainable", one.get("parameters", 0))
        title = "from scratch" if method.name == SCRATCH else name
        cells = [errors_text(errors_of(row)) if row else "" for row in found]
        lines.append(
            [
                title,
                f"{rates[name]:.2g}",
                *cells,
                forgotten(found),
                f"{count:,}" if count else "all",
                sent,
                *cost_cells(name, cost),
            ]
        )
    sizes = ["trained", "kB", "s/epoch", "MB"]
    heading = ["method", "rate", *set_titles(sets), "forgotten", *sizes]
    return table(heading, lines)


def _foundation_line(sets: Sequence[str], rows: Rows) -> list[str]:
    """The model that every run starts from."""
    cells = []
    for data in sets:
        found = [
            row for name, row in rows.items() if name.startswith((f"{data}_full", f"{data}_lora"))
        ]
        cells.append(errors_text(errors_of(found[0], "before")) if found else "")
    return ["foundation, refitted baseline", "", *cells, "0", "0", "", "", ""]


def cost_cells(name: str, cost: Rows) -> list[str]:
    """Seconds an epoch and memory beyond the imports, from runs made for this alone."""
    if name not in cost:
        return ["", ""]
    seconds = median(cost[name]["epoch_seconds"][1:])
    return [f"{seconds:.2f}", f"{cost[name]['memory_mb']:.0f}"]
