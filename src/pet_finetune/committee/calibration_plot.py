"""The calibration plot of a committee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Curves:
    """Coverage of one kind of number, as parts of 1.

    Attributes:
        expected: [n_levels].
        before, after: [n_levels], observed without and with the factor.
        area_before, area_after: miscalibration areas.
        factor: of the calibration.
    """

    expected: np.ndarray
    before: np.ndarray
    after: np.ndarray
    area_before: float
    area_after: float
    factor: float


def plot_calibration(path: str | Path, curves: Mapping[str, Curves]) -> bool:
    """Observed over expected coverage, one panel a kind; whether matplotlib was there to draw it.

    Args:
        path: an image file, by its ending.
        curves: by kind.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(3.2 * len(curves), 3.3), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (kind, curve) in zip(panels, curves.items(), strict=True):
        draw_coverage(panel, kind, curve, ("0.6", "tab:blue", "tab:orange"))
    figure.savefig(path)
    return True


def draw_coverage(axes: Any, kind: str, curve: Curves, colours: tuple[str, str, str]) -> None:
    """Observed over expected coverage of one kind.

    Args:
        axes: matplotlib's.
        kind: energy, forces or stress.
        curve: to draw.
        colours: of the diagonal, the bare spread and the calibrated one.
    """
    axes.plot([0, 1], [0, 1], color=colours[0], linewidth=1)
    for name, observed, area, colour in (
        ("spread", curve.before, curve.area_before, colours[1]),
        (f"times {curve.factor:.2f}", curve.after, curve.area_after, colours[2]),
    ):
        axes.plot(curve.expected, observed, label=f"{name}: area {area:.3f}", color=colour)
    axes.set(title=kind, xlabel="expected coverage", ylabel="observed coverage")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left", fontsize="small", frameon=False)
