"""Force errors over the size of the force, and sorted by structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import Part
from .figures import AFTER, BEFORE, log_ticks, panel
from .record import Quantity

_STYLES = {
    "before": {"color": BEFORE, "linestyle": "--", "marker": "o", "markersize": 3},
    "after": {"color": AFTER, "marker": "o", "markersize": 3},
}


def magnitude_plot(parts: Sequence[Part], name: str) -> str:
    """Mean absolute error over the mean force of each bin."""

    def draw(axes: Any) -> None:
        for model, style in _STYLES.items():
            if all(model in part.errors for part in parts):
                values = [1000 * part.errors[model] for part in parts]
                sizes = [part.size for part in parts]
                axes.plot(sizes, values, **style)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="reference force (eV/Å)", title="force MAE (meV/Å) by size of the force")

    return panel(name, "Force error over the size of the reference force", draw)


def sorted_plot(quantity: Quantity, errors: dict[str, np.ndarray], name: str) -> str:
    """The error of each structure, from the smallest to the largest."""

    def draw(axes: Any) -> None:
        shown: list[float] = []
        for model, values in errors.items():
            ordered = quantity.factor * np.sort(values[np.isfinite(values)])
            share = 100 * (np.arange(len(ordered)) + 1) / max(1, len(ordered))
            style = {**_STYLES[model], "marker": ""}
            axes.plot(share, ordered, **style)
            shown += ordered[ordered > 0].tolist()
        if shown:
            axes.set_yscale("log")
            log_ticks(axes.yaxis, shown)
        axes.set(xlabel="structures with a smaller error (%)", xlim=(0, 101))
        axes.set_title(f"{quantity.name} MAE of each structure ({quantity.unit})")

    return panel(name, f"{quantity.name} error of each structure, sorted", draw)
