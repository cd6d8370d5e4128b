"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.methods import sweep
from benchmarks.methods.jobs import Job
from benchmarks.methods.rows import FAMILIES, METHODS, SCRATCH
from benchmarks.methods.sets import SETS

Rows = Mapping[str, Mapping[str, Any]]


def errors_text(errors: Mapping[str, float]) -> str:
    """Energy, forces and, where there are some, stress; meV."""
    words = [f"{errors['energy_mae'] * 1e3:.2f}", f"{errors['forces_mae'] * 1e3:.0f}"]
    if "stress_mae" in errors:
        words.append(f"{errors['stress_mae'] * 1e3:.1f}")
    return " / ".join(words)


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def set_titles(sets: Sequence[str]) -> list[str]:
    return [f"{name}: E / F{' / stress' if SETS[name].stress else ''}" for name in sets]


def rate_table(sets: Sequence[str], rows: Rows) -> str:
    """Errors by family and learning rate; scores over the sets that have them all."""
    lines = []
    for family in FAMILIES:
        rates = sweep.known_rates(family, sets[:1], rows)
        groups = sweep.rate_groups(family, sets, rates)
        common = [s for s in sets if all(Job(s, family, rate).name in rows for rate in rates)]
        scores = sweep.compare(sweep.rate_groups(family, common, rates), rows)
        best = min(scores, key=scores.__getitem__) if scores else ""
        for name, jobs in groups.items():
            found = [rows.get(job.name) for job in jobs]
            cells = [errors_text(sweep.errors_of(row)) if row else "" for row in found]
            shown = f"{scores[name]:.2f}"
            lines.append([family, name, *cells, f"**{shown}**" if name == best else shown])
    return table(["method", "learning rate", *set_titles(sets), "score"], lines)


def longer_table(rows: Rows) -> str:
    """Runs with a number of epochs of their own: does the best learning rate depend on it?"""
    lines = []
    for data in SETS:
        for family in FAMILIES:
            for row in rows.values():
                rate = row["training"]["learning_rate"]
                epochs = row["training"]["num_epochs"]
                job = Job(data, family, rate, epochs=epochs)
                if rows.get(job.name) is row:
                    text = errors_text(sweep.errors_of(row))
                    lines.append([data, str(epochs), family, f"{rate:g}", text])
    return table(["set", "epochs", "method", "learning rate", "E / F (/ stress)"], lines)


def variant_table(family: str, sets: Sequence[str], rows: Rows) -> str:
    """Errors and scores of ranks, schedules and averages, at the family's learning rate."""
    rate = sweep.chosen_rate(family, sets, rows)
    names = sweep.alternatives(family)
    groups = {name: [Job(data, name, rate) for data in sets] for name in names}
    scores = sweep.compare(groups, rows)
    lines = [
        [
            name,
            *(errors_text(sweep.errors_of(rows[job.name])) for job in groups[name]),
            f"{value:.3f}",
        ]
        for name, value in scores.items()
    ]
    return table([f"at {rate:g}", *set_titles(sets), "score"], lines)


def spread_table(
    names: Sequence[str], sets: Sequence[str], seeds: int, rows: Rows, rates: Mapping[str, float]
) -> str:
    """Mean and standard deviation over seeds."""
    lines = []
    for name in names:
        cells = []
        for data in sets:
            jobs = [Job(data, name, rates[name], seed) for seed in range(1, seeds + 1)]
            found = [sweep.errors_of(rows[job.name]) for job in jobs if job.name in rows]
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
        cells = [errors_text(sweep.errors_of(row)) if row else "" for row in found]
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
        cells.append(errors_text(sweep.errors_of(found[0], "before")) if found else "")
    return ["foundation, refitted baseline", "", *cells, "0", "0", "", "", ""]


def cost_cells(name: str, cost: Rows) -> list[str]:
    """Seconds an epoch and memory beyond the imports, from runs made for this alone."""
    if name not in cost:
        return ["", ""]
    seconds = median(cost[name]["epoch_seconds"][1:])
    return [f"{seconds:.2f}", f"{cost[name]['memory_mb']:.0f}"]
