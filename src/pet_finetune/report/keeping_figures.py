"""Figures of what was kept and of what is uncertain: dimer curves and coverage curves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pet_finetune.committee.calibration import Curves, draw_coverage
from pet_finetune.data.predicted import Predicted

if TYPE_CHECKING:
    from pet_finetune.forgetting.dimers import DimerRow

from .errors import residuals
from .figures import AFTER, BEFORE, GRID, INK, MUTED, WARN, log_ticks, panel
from .record import Dimers, Quantity

#: More pairs than these are left to the table in the folder; the ones that changed come first.
MOST_PAIRS = 12
_ORDER = ("lost", "gained", "kept", "absent")
_MOST_DOTS = 1500


def dimer_panels(dimers: Dimers) -> list[str]:
    """A small panel for each pair; lost walls first."""
    rows = sorted(dimers.rows, key=lambda row: _ORDER.index(row.verdict))[:MOST_PAIRS]
    return [
        panel(
            f"dimer-{index}",
            f"Energy of {row.name} over its distance: wall {row.verdict}",
            partial(_pair, dimers=dimers, row=row),
            width=2.7,
            height=2.1,
        )
        for index, row in enumerate(rows)
    ]


def _pair(axes: Any, dimers: Dimers, row: DimerRow) -> None:
    from pet_finetune.forgetting.dimers import draw_pair  # only where that room wrote curves

    draw_pair(axes, dimers.distances, row, {"before": BEFORE, "after": AFTER, "wall": GRID})
    axes.set_title(f"{row.name}: wall {row.verdict}", color=WARN if row.verdict == "lost" else INK)
    axes.set(xlabel="distance (Å)", ylabel="energy (eV)")


def coverage_panels(curves: Mapping[str, Curves]) -> list[str]:
    """A panel for each kind."""
    return [
        panel(
            f"coverage-{index}",
            f"Observed over expected coverage of the {kind} uncertainty",
            partial(draw_coverage, kind=kind, curve=curve, colours=(MUTED, BEFORE, AFTER)),
            width=3.4,
            height=3.2,
        )
        for index, (kind, curve) in enumerate(curves.items())
    ]


def spread_panel(predicted: Predicted, quantity: Quantity, factor: float) -> str | None:
    """Size of the error over the calibrated uncertainty, a dot for each structure or atom."""
    spread = predicted.models.get("after", {}).get(f"{quantity.label}~spread")
    errors = residuals(predicted, quantity, "after")
    if spread is None or errors is None:
        return None
    spread = spread.astype(np.float64)
    if quantity.kind == "energy":
        spread = spread / predicted.sizes
    rows = (len(errors), -1)
    size = np.sqrt(np.mean(errors.reshape(rows) ** 2, axis=1)) * quantity.factor
    sure = factor * np.sqrt(np.mean(spread.reshape(rows) ** 2, axis=1)) * quantity.factor
    known = np.isfinite(size) & (size > 0) & (sure > 0)
    if not known.any():
        return None
    size, sure = size[known], sure[known]
    if len(size) > _MOST_DOTS:
        chosen = np.random.default_rng(0).choice(len(size), _MOST_DOTS, replace=False)
        size, sure = size[chosen], sure[chosen]
    return panel(
        f"spread-{quantity.kind}",
        f"Error over uncertainty of the {quantity.name}",
        partial(_dots, sure=sure, size=size, quantity=quantity),
        width=3.4,
        height=3.2,
    )


def _dots(axes: Any, sure: np.ndarray, size: np.ndarray, quantity: Quantity) -> None:
    low, high = min(sure.min(), size.min()), max(sure.max(), size.max())
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8)
    axes.plot(sure, size, "o", color=AFTER, markersize=2.5, alpha=0.5, markeredgewidth=0)
    axes.set(xscale="log", yscale="log", title=f"{quantity.name} ({quantity.unit})")
    axes.set(xlabel="uncertainty", ylabel="error")
    log_ticks(axes.xaxis, sure)
    log_ticks(axes.yaxis, size)
