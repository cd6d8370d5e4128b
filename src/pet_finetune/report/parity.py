"""Parity plots: predictions over labels, the starting model beside the fine-tuned one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pet_finetune.data.predicted import Predicted

from .figures import AFTER, BEFORE, MUTED, panel
from .frame_errors import mean_known, residuals
from .run_record import Quantity, RunRecord
from .verdict import number

# More points than this are drawn as a picture of their density: a file of dots would be large,
# and where dots lie on dots nothing is seen.
_MOST_DOTS = 1500
_CELLS = 120  # of the picture, each way
# A picture cannot take the page's colours; these two read well on light and dark.
_MID_TONES = {"before": (0.50, 0.54, 0.60), "after": (0.16, 0.52, 0.80)}


@dataclass(frozen=True)
class Parity:
    """The plots of one quantity, starting model first."""

    title: str
    note: str
    plots: list[str]


def parity_plots(run: RunRecord) -> list[Parity]:
    """Plots of every quantity that there are labels and predictions for."""
    predicted = run.predicted
    if predicted is None:
        return []
    found = []
    for index, quantity in enumerate(run.quantities()):
        axes_values = _values(predicted, quantity)
        if axes_values is None:
            continue
        label, models, note = axes_values
        known = np.isfinite(label)
        # One frame for both, so that they can be compared by eye.
        low, high = _frame([label[known], *(values[known] for values in models.values())])
        plots = []
        for model, values in models.items():
            name = run.names[model == "after"]
            errors = residuals(predicted, quantity, model)
            mae = math.nan if errors is None else mean_known(np.abs(errors))
            shown = f"MAE {number(quantity.factor * mae)} {quantity.unit}"
            plots.append(
                panel(
                    f"parity-{index}-{model}",
                    f"Predicted over reference {quantity.name} of the {name} model, {shown}",
                    partial(
                        _draw,
                        model=model,
                        label=label[known],
                        values=values[known],
                        frame=(low, high),
                        unit=quantity.plain,
                        title=f"{name}: {shown}",
                    ),
                    width=3.6,
                    height=3.35,
                )
            )
        found.append(Parity(quantity.name, note, plots))
    return found


def _values(
    predicted: Predicted, quantity: Quantity
) -> tuple[np.ndarray, dict[str, np.ndarray], str] | None:
    """Labels and predictions as flat arrays, and what was taken off."""
    label = predicted.labels.get(quantity.label)
    models = {
        name: predicted.models[name][quantity.label].astype(np.float64)
        for name in ("before", "after")
        if quantity.label in predicted.models.get(name, {})
    }
    if label is None or not models:
        return None
    label, note = label.astype(np.float64), ""
    if quantity.kind == "energy":
        shift = predicted.baselines.get(quantity.target)
        if shift is None:
            shift = predicted.sizes * np.nanmean(label / predicted.sizes)
            note = "energies per atom, less their mean"
        else:
            note = "energies per atom, less the baseline of the elements"
        label = (label - shift) / predicted.sizes
        models = {name: (values - shift) / predicted.sizes for name, values in models.items()}
    if quantity.kind == "stress":
        upper = np.triu_indices(3)  # a stress is symmetric
        label = label[:, upper[0], upper[1]]
        models = {name: values[:, upper[0], upper[1]] for name, values in models.items()}
    flat = {name: values.reshape(-1) for name, values in models.items()}
    return label.reshape(-1), flat, note


def _frame(values: list[np.ndarray]) -> tuple[float, float]:
    """Limits that hold all values and a little more."""
    joined = np.concatenate(values)
    joined = joined[np.isfinite(joined)]
    low, high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 1e-3 * max(1.0, abs(low))
    return low - margin, high + margin


def _draw(
    axes: Any,
    model: str,
    label: np.ndarray,
    values: np.ndarray,
    frame: tuple[float, float],
    unit: str,
    title: str,
) -> None:
    axes.plot(frame, frame, color=MUTED, linewidth=0.8, zorder=3)
    if len(label) <= _MOST_DOTS:
        colour = {"before": BEFORE, "after": AFTER}[model]
        axes.plot(label, values, "o", color=colour, markersize=3, alpha=0.6, markeredgewidth=0)
    else:
        axes.imshow(
            _density(label, values, frame, _MID_TONES[model]),
            extent=(*frame, *frame), origin="lower", interpolation="nearest", zorder=2,
        )  # fmt: skip
    axes.set(xlim=frame, ylim=frame, aspect="equal", title=title)
    axes.set(xlabel=f"reference ({unit})", ylabel=f"predicted ({unit})")
    axes.locator_params(nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.6g}".replace("-", "−"))


def _density(
    label: np.ndarray,
    values: np.ndarray,
    frame: tuple[float, float],
    colour: tuple[float, float, float],
) -> np.ndarray:
    """How many points fall where, as opacity on a logarithmic scale, [cells, cells, 4]."""
    counts, _, _ = np.histogram2d(values, label, bins=_CELLS, range=[frame, frame])
    opacity = np.log1p(counts) / np.log1p(max(1.0, counts.max()))
    picture = np.empty((*counts.shape, 4))
    picture[..., :3] = colour
    picture[..., 3] = np.where(counts > 0, 0.25 + 0.75 * opacity, 0.0)
    return picture
