"""Which learning rate, rank, schedule and average suit a method: the sweep and its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.methods.jobs import Job
from benchmarks.methods.rows import METHODS, VARIANTS

#: Between two learning rates of the grid.
FACTOR = 3.0
#: How often the grid may grow beyond its edge.
EXTENSIONS = 2

Rows = Mapping[str, Mapping[str, Any]]


def rounded(rate: float) -> float:
    """Two digits, so that a rate reached from either side is the same number."""
    return float(f"{rate:.1e}")


def grid(family: str) -> list[float]:
    """The coarse grid around the default."""
    default = METHODS[family].learning_rate
    return [rounded(default / FACTOR), default, rounded(default * FACTOR)]


def errors_of(row: Mapping[str, Any], when: str = "after") -> Mapping[str, float]:
    """Errors of a run on the test set; eV/atom, eV/A, eV/A^3."""
    errors: dict[str, Mapping[str, float]] = row[when]["test"]
    return next(iter(errors.values()))


def score(errors: Sequence[Mapping[str, float]], best: Sequence[Mapping[str, float]]) -> float:
    """Geometric mean over the sets of the energies' and forces' errors relative to the best's."""
    logs = [
        math.log(own[kind] / least[kind])
        for own, least in zip(errors, best, strict=True)
        for kind in ("energy_mae", "forces_mae")
    ]
    return math.exp(sum(logs) / len(logs))


def compare(groups: Mapping[str, Sequence[Job]], rows: Rows) -> dict[str, float]:
    """Scores of alternatives that were run on the same sets; those not run are left out.

    Args:
        groups: the runs of each alternative, one a set, in the same order.
        rows: results by the name of the run.
    """
    done = {
        name: [errors_of(rows[job.name]) for job in jobs]
        for name, jobs in groups.items()
        if all(job.name in rows for job in jobs)
    }
    if not done:
        return {}
    best = [
        {kind: min(e[i][kind] for e in done.values()) for kind in ("energy_mae", "forces_mae")}
        for i in range(len(next(iter(done.values()))))
    ]
    return {name: score(errors, best) for name, errors in done.items()}


def rate_groups(family: str, sets: Iterable[str], rates: Iterable[float]) -> dict[str, list[Job]]:
    """The runs of each learning rate."""
    sets = list(sets)
    return {f"{rate:g}": [Job(data, family, rate) for data in sets] for rate in sorted(rates)}


def known_rates(family: str, sets: Sequence[str], rows: Rows) -> list[float]:
    """The learning rates that this family has been run with on all the sets."""
    rates = {row["training"]["learning_rate"] for row in rows.values()}
    return sorted(r for r in rates if all(Job(data, family, r).name in rows for data in sets))


def chosen_rate(family: str, sets: Sequence[str], rows: Rows) -> float:
    """The best learning rate so far, or the default where nothing has been run."""
    scores = compare(rate_groups(family, sets, known_rates(family, sets, rows)), rows)
    if not scores:
        return METHODS[family].learning_rate
    return float(min(scores, key=scores.__getitem__))


def next_rates(family: str, sets: Sequence[str], rows: Rows) -> list[float]:
    """Learning rates still to be run: the grid's, then beyond the edge if the best lies there."""
    known = known_rates(family, sets, rows)
    missing = [rate for rate in grid(family) if rate not in known]
    if missing or len(known) >= len(grid(family)) + EXTENSIONS:
        return missing
    best = chosen_rate(family, sets, rows)
    if best == max(known):
        return [rounded(best * FACTOR)]
    if best == min(known):
        return [rounded(best / FACTOR)]
    return []


def alternatives(family: str) -> list[str]:
    """The variants of a family, itself first."""
    stem = family.split()[0]
    ranks = [name for name in METHODS if stem == "lora" and name.startswith("lora r")]
    found = [name for name in [*ranks, *VARIANTS] if name.split()[0].rstrip(",") == stem]
    return [family, *(name for name in found if name != family)]
