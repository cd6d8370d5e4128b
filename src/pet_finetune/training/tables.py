"""The tables of a run: baselines before it, errors before and after at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from pet_finetune.committee.calibration import Curves, Deviations, miscalibration_area
from pet_finetune.terminal import table_text

from .baselines import BaselineTable
from .consistency import Spread
from .metrics import Metrics


def baseline_text(table: BaselineTable) -> str:
    """Baselines per species, before and after."""
    out = Table(title=f"baseline of '{table.target}' ({table.mode})", title_justify="left")
    unit = f" ({table.unit})" if table.unit else ""
    for name in ("element", "atoms", f"before{unit}", f"after{unit}", f"change{unit}"):
        out.add_column(name, justify="right")
    for symbol, atoms, before, after in table.rows:
        cells = ("new", "") if math.isnan(before) else (f"{before:.4f}", f"{after - before:+.4f}")
        out.add_row(symbol, f"{atoms}", cells[0], f"{after:.4f}", cells[1])
    return table_text(out)


def error_table(
    groups: Mapping[str, Mapping[str, Mapping[str, Metrics]]],
    notes: Sequence[str] = (),
    title: str = "",
) -> Table:
    """Errors of several models (columns) by target and quantity (rows).

    Args:
        groups: what stands before the names of the rows, and for each model its errors by target.
            All groups are of the same models.
        notes: lines below the table.
        title: line above it.
    """
    table = Table(title=title, title_justify="left", caption="\n".join(notes) or None)
    table.add_column("error")
    table.add_column("unit")
    for name in next(iter(groups.values())):
        table.add_column(name, justify="right")
    for heading, columns in groups.items():
        _add_errors(table, heading, list(columns.values()))
    return table


def _add_errors(table: Table, heading: str, columns: Sequence[Mapping[str, Metrics]]) -> None:
    """Rows for each target and quantity; a model that was not evaluated has dashes."""
    last = columns[-1]
    for target in last:
        for kind in last[target].kinds:
            name, factor, unit = last[target].shown(kind)
            named = len(last) > 1 and kind != "value"
            prefix = f"{heading}{target} " if named else heading
            # Energies are in meV; a property may have any size.
            digits = "4g" if kind == "value" else "2f"
            for statistic in ("MAE", "RMSE"):
                cells = [
                    f"{getattr(metrics[target], statistic.lower())(kind) * factor:.{digits}}"
                    if target in metrics and kind in metrics[target].kinds
                    else "-"
                    for metrics in columns
                ]
                table.add_row(f"{prefix}{name} {statistic}", unit, *cells)


def committee_table(members: Sequence[Metrics], committee: Metrics, title: str = "") -> Table:
    """Errors (columns) of each member, of a member on average, and of the committee's mean."""
    columns = [(kind, name) for kind in committee.kinds for name in ("mae", "rmse")]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for kind, name in columns:
        table.add_column(f"{kind} {name.upper()}\n{committee.shown(kind)[2]}", justify="right")

    def errors(metrics: Metrics) -> list[float]:
        return [getattr(metrics, name)(kind) * metrics.shown(kind)[1] for kind, name in columns]

    each = [errors(metrics) for metrics in members]
    rows = {f"member {number}": values for number, values in enumerate(each)}
    rows["a member on average"] = [sum(values) / len(each) for values in zip(*each, strict=True)]
    rows["committee"] = errors(committee)
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def calibration_table(curves: Mapping[str, Curves]) -> Table:
    """Factor and miscalibration areas of each kind."""
    table = Table(title="calibration of the spread", title_justify="left")
    for name in ("", "factor", "miscalibration area before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for kind, found in curves.items():
        areas = f"{found.area_before:.3f}", f"{found.area_after:.3f}"
        table.add_row(kind, f"{found.factor:.3f}", *areas)
    return table


def uncertainty_text(target: str, found: Deviations) -> str:
    """How well an uncertainty fits the errors, in a line."""
    sure, wrong = (1000.0 * float(np.sqrt(np.mean(v**2))) for v in (found.spreads, found.errors))
    inside = [100.0 * found.within(widths) for widths in (1.0, 2.0)]
    return (
        f"uncertainty of '{target}': {sure:.2f} meV/atom beside errors of {wrong:.2f} (root mean "
        f"squares); {inside[0]:.0f} and {inside[1]:.0f} % of the errors lie within one and two of "
        "it (68 and 95 % would where they are normal); miscalibration area "
        f"{miscalibration_area(found.coverage()):.3f}"
    )


def spread_text(rotations: int, target: str, spread: Spread, errors: Metrics) -> str:
    """What rotations change of the predictions of a target, in a line."""
    error = errors.mae("forces")
    share = f" ({100 * spread.forces / error:.0f} % of their MAE)" if error > 0 else ""
    return (
        f"{rotations} random orientations: {target} {1000 * spread.energy:.2f} meV/atom, forces "
        f"{1000 * spread.forces:.2f} meV/A{share} from the mean over them"
    )
