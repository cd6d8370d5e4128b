"""An inspection as rich tables, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .energies import Facts, Range, SetFacts
from .estimate import Load, duration
from .finding import SEVERITIES, Finding
from .inspection import Inspection

__all__ = ["as_dict", "render"]

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def as_dict(inspection: Inspection) -> dict[str, Any]:
    """Plain values of everything."""
    suggestion = inspection.suggestion
    return {
        "facts": inspection.facts.as_dict(),
        "findings": [finding.as_dict() for finding in inspection.findings],
        "compared": inspection.compared,
        "errors_before": inspection.errors_before,
        "load": None if inspection.cost is None else asdict(inspection.cost),
        "estimates": [asdict(one) for one in inspection.estimates],
        "measured": inspection.measured,
        "suggestion": None if suggestion is None else asdict(suggestion),
    }


def render(inspection: Inspection) -> Group:
    """What the command prints."""
    parts: list[RenderableType] = [_facts_table(inspection.facts)]
    if inspection.facts.skipped:
        parts.append(
            Text(f"{inspection.facts.skipped} frames were left out, evenly: there are so many.")
        )
    if inspection.compared:
        parts.append(Text(_compared(inspection)))
    parts += [Text(), *_findings(inspection)]
    if inspection.cost is not None:
        parts += [Text(), _cost(inspection, inspection.cost)]
    if inspection.suggestion is not None:
        parts += [Text(), Text("suggestion", style="italic")]
        parts += [Text(f"  {reason}") for reason in inspection.suggestion.reasons]
    return Group(*parts)


def _compared(inspection: Inspection) -> str:
    """How the foundation compares with the labels before any training."""
    errors = inspection.errors_before
    whole = sum(own.structures for own in inspection.facts.sets.values())
    of = f" of {whole:,}" if inspection.compared < whole else ""
    text = f"compared with the foundation: {inspection.compared:,}{of} structures"
    if "forces_mae" in errors:
        text += f", forces off by {errors['forces_mae'] * 1e3:.0f} meV/A (mean absolute error)"
    if "energy_shift" in errors:
        text += f", energies {errors['energy_shift']:+.4g} eV an atom away (baselines are refitted)"
    return text


def _facts_table(facts: Facts) -> Table:
    names = ", ".join(f"{file} ({count})" for file, count in facts.files.items())
    table = Table(title=names, title_justify="left")
    table.add_column("")
    for name in facts.sets:
        table.add_column(name, overflow="fold")
    columns = [dict(_facts_rows(own)) for own in facts.sets.values()]
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "-") for column in columns))
    return table


def _facts_rows(own: SetFacts) -> Iterator[tuple[str, str]]:
    yield "structures, atoms", f"{own.structures}, {own.atoms}"
    yield "atoms in a structure", _range(own.sizes, "g")
    yield "periodicity", ", ".join(f"{kind} ({n})" for kind, n in own.periodicity.items())
    yield "elements (structures)", _elements(own)
    yield "compositions", str(own.compositions)
    if own.nearest is not None:
        yield "nearest distance, A", _range(own.nearest, ".2f")
    if own.energy is not None:
        yield "energy, eV/atom", _range(own.energy, ".4g")
        yield "energies are", own.references
    if own.spread is not None:
        yield "energy less elements, meV/atom", f"{own.spread * 1e3:.3g} (standard deviation)"
    if own.force is not None and own.force_rms is not None:
        yield "frames with forces", f"{own.forces}"
        yield "forces, eV/A", f"{own.force_rms:.3g} (rms); longest {_range(own.force, '.3g')}"
    if own.stress_rms is not None:
        yield "frames with stress", f"{own.stress}"
        yield "stress, eV/A^3", f"{own.stress_rms:.3g} (rms)"
    else:
        yield "stress", "none"


def _elements(own: SetFacts) -> str:
    """Symbols, with numbers of structures where these are few."""
    if len(own.elements) > 12:
        return f"{len(own.elements)}: {' '.join(own.elements)}"
    return ", ".join(f"{symbol} ({count})" for symbol, (count, _) in own.elements.items())


def _range(values: Range, form: str) -> str:
    if values.low == values.high:
        return f"{values.low:{form}}"
    return f"{values.low:{form}} to {values.high:{form}}, median {values.median:{form}}"


def _findings(inspection: Inspection) -> Iterator[RenderableType]:
    counts = [
        f"{n} {severity}{'s' if n != 1 else ''}"
        for severity in SEVERITIES
        if (n := sum(f.severity == severity for f in inspection.findings))
    ]
    yield Text(f"findings: {', '.join(counts) or 'none'}", style="italic")
    for finding in inspection.findings:
        yield _finding(finding)


def _finding(finding: Finding) -> RenderableType:
    text = Text()
    text.append(finding.severity, style=_STYLES[finding.severity])
    text.append(f" {finding.code}: ", style="bold")
    text.append(finding.what)
    for label, value in (
        ("where", finding.place),
        ("why", finding.why),
        ("do", finding.advice),
    ):
        if value:
            text.append(f"\n{label}: ", style="dim")
            text.append(value)
    return Padding(text, (0, 0, 0, 2))


def _cost(inspection: Inspection, load: Load) -> RenderableType:
    """Neighbours, and what each method takes where a step was measured."""
    neighbours = f"{load.neighbours:.3g} neighbours an atom, at most {load.most_neighbours}"
    if not inspection.estimates:
        return Text(f"{neighbours}; no estimate of time and memory ({inspection.measured})")
    table = Table(
        title="what a run takes",
        title_justify="left",
        caption=f"{neighbours}\n{inspection.measured}",
        caption_justify="left",
    )
    for name in ("method", "trained parameters", "an epoch", "memory, MiB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for one in inspection.estimates:
        seconds = f"{one.seconds:.2g} s" if one.seconds < 10 else duration(one.seconds)
        table.add_row(one.method, f"{one.trainable:,}", seconds, f"{one.memory:.0f}")
    return table
