"""The data in numbers, and an inspection as rich tables and as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pet_finetune.log import html_of
from pet_finetune.units import duration

from .inspected import SEVERITIES, Finding, InspectedDataset, InspectedFrame, element_fit, rms
from .suggestion import Estimate, Load, Suggestion

#: eV an atom, below which energies of bonds stay.
_COHESIVE = 15.0


def references_of(frames: Sequence[InspectedFrame]) -> str:
    """Text on whether the energies contain those of free atoms; empty without energies."""
    energies = [abs(e.energy) / e.size for e in frames if e.energy is not None and e.size > 1]
    if not energies:
        return ""
    if float(np.median(energies)) < _COHESIVE:
        return "relative to some reference of the atoms (of the size of binding energies)"
    return "total energies (those of the atoms are in them)"


_KINDS = {0: "molecules", 1: "periodic in 1 direction", 2: "slabs", 3: "bulk"}


@dataclass(frozen=True)
class Range:
    """A distribution: its ends, its middle, and how far it spreads."""

    low: float
    median: float
    high: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Range | None:
        """Range of the values; None without values."""
        array = np.asarray(values, dtype=float)
        if not array.size:
            return None
        low, median, high = np.quantile(array, [0.0, 0.5, 1.0])
        return cls(float(low), float(median), float(high), float(array.std()))


@dataclass(frozen=True)
class SetFacts:
    """Facts about one set.

    Attributes:
        structures, atoms: numbers of them.
        elements: symbol: structures that hold it, atoms of it.
        compositions: how many different ones.
        sizes: atoms in a structure.
        periodicity: kind: structures.
        nearest: shortest distance in each structure, Å.
        energy: eV an atom, as labelled.
        spread: standard deviation of the energy left over by a sum over elements, eV an atom.
        references: what the energies are relative to, in words.
        forces: frames that have them; components, eV/Å.
        force: longest force of each frame, eV/Å.
        force_rms: of all components, eV/Å.
        stress: frames that have one.
        stress_rms: of all components, eV/Å³.
    """

    structures: int
    atoms: int
    elements: dict[str, tuple[int, int]]
    compositions: int
    sizes: Range
    periodicity: dict[str, int]
    nearest: Range | None
    energies: int
    energy: Range | None
    spread: float | None
    references: str
    forces: int
    force: Range | None
    force_rms: float | None
    stress: int
    stress_rms: float | None


@dataclass(frozen=True)
class Facts:
    """All sets by name, and the files they come from with their numbers of structures."""

    sets: dict[str, SetFacts]
    files: dict[str, int]
    skipped: int


def facts_of(dataset: InspectedDataset) -> Facts:
    """Count and measure."""
    files = {file: len(frames) for file, frames in dataset.files.items()}
    sets = {name: _set_facts(frames) for name, frames in dataset.sets.items()}
    return Facts(sets, files, dataset.skipped)


def _set_facts(frames: Sequence[InspectedFrame]) -> SetFacts:
    structures: Counter[int] = Counter()
    atoms: Counter[int] = Counter()
    for frame in frames:
        numbers, counts = frame.elements
        structures.update(numbers.tolist())
        atoms.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    sizes = Range.of([e.size for e in frames])
    assert sizes is not None
    labelled = [e for e in frames if e.energy is not None]
    forced = [e.forces for e in frames if e.forces is not None]
    stressed = [e.stress for e in frames if e.stress is not None]
    nearest = np.array([e.nearest.min() for e in frames])
    return SetFacts(
        structures=len(frames),
        atoms=int(sum(e.size for e in frames)),
        elements={chemical_symbols[z]: (structures[z], atoms[z]) for z in sorted(atoms)},
        compositions=len({e.formula for e in frames}),
        sizes=sizes,
        periodicity=dict(Counter(_KINDS[int(e.pbc.sum())] for e in frames)),
        nearest=Range.of(nearest[np.isfinite(nearest)]),
        energies=len(labelled),
        energy=Range.of([(e.energy or 0.0) / e.size for e in labelled]),
        spread=float(element_fit(labelled)[2].std()) if len(labelled) > 1 else None,
        references=references_of(labelled),
        forces=len(forced),
        force=Range.of([np.linalg.norm(f, axis=1).max() for f in forced]),
        force_rms=rms(*forced) if forced else None,
        stress=len(stressed),
        stress_rms=rms(*stressed) if stressed else None,
    )


_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


@dataclass(frozen=True)
class Inspection:
    """Result of an inspection.

    Attributes:
        facts: numbers.
        findings: the worst first.
        compared: structures that the foundation was asked about; 0 without one.
        cost: what a run has to compute; None where it is not known.
        estimates: of the methods.
        measured: how the estimates were made.
        suggestion: options for this data.
        errors_before: of the foundation: ``forces_mae``, eV/Å, and ``energy_shift``, by how much
            the labels lie above its energies, eV an atom.
    """

    facts: Facts
    findings: tuple[Finding, ...]
    compared: int = 0
    cost: Load | None = None
    estimates: tuple[Estimate, ...] = ()
    measured: str = ""
    suggestion: Suggestion | None = None
    errors_before: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> list[Finding]:
        """Findings that would break a run."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def _repr_html_(self) -> str:
        """For notebooks, what the command prints."""
        return html_of(render(self))


def as_dict(inspection: Inspection) -> dict[str, Any]:
    """Plain values of everything."""
    suggestion = inspection.suggestion
    return {
        "facts": asdict(inspection.facts),
        "findings": [finding.as_dict() for finding in inspection.findings],
        "compared": inspection.compared,
        "errors_before": inspection.errors_before,
        "load": None if inspection.cost is None else asdict(inspection.cost),
        "estimates": [asdict(one) for one in inspection.estimates],
        "measured": inspection.measured,
        "suggestion": None if suggestion is None else asdict(suggestion),
    }


def render(inspection: Inspection) -> Group:
    """Text that the command prints."""
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
    """Comparison of the foundation with the labels before training."""
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
    table = Table("", title=names, title_justify="left")
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
        cells = one.method, f"{one.trainable:,}", duration(one.seconds), f"{one.memory:.0f}"
        table.add_row(*cells)
    return table
