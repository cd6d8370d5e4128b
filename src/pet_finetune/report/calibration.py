"""The calibration plot of a committee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        panel.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for name, observed, area in (
            ("spread", curve.before, curve.area_before),
            (f"times {curve.factor:.2f}", curve.after, curve.area_after),
        ):
            panel.plot(curve.expected, observed, label=f"{name}: area {area:.3f}")
        panel.set(title=kind, xlabel="expected coverage", ylabel="observed coverage")
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        panel.legend(loc="upper left", fontsize="small", frameon=False)
    figure.savefig(path)
    return True
