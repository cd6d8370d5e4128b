"""Curves of the page (learning, forgetting) and parity plots: predictions over labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from pet_finetune.data.predicted import Predicted
from pet_finetune.installation import plotting
from pet_finetune.training.run_files import Epochs

from . import figures
from .figures import AFTER, BEFORE, MUTED, WARN, log_ticks, panel
from .frame_errors import mean_known, residuals
from .run_record import Quantity, RunRecord, best_row
from .verdict import number


def learning_curves(run: RunRecord) -> list[str]:
    """A panel for the loss, for each error, and for the learning rate."""
    return [panel(name, alt, draw) for name, alt, draw in _curves(run)]


def plot_curves(run: RunRecord) -> Any:
    """The learning curves as one matplotlib ``Figure``.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    _, figure_of = plotting()
    curves = list(_curves(run))
    figure = figure_of(figsize=(4.2 * max(1, len(curves)), 3.2), layout="constrained")
    for place, (_, _, draw) in enumerate(curves, 1):
        draw(figure.add_subplot(1, len(curves), place))
    return figure


def _curves(run: RunRecord) -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    """Name, description and drawing of each panel; none without epochs."""
    many = [rows for rows in run.epochs if rows]
    if not many:
        return
    yield "curve-loss", "Training loss over epochs", partial(_loss, many=many)
    for index, quantity in enumerate(run.quantities()):
        title = f"{quantity.name} MAE ({quantity.unit})"
        draw = partial(_errors, run=run, quantity=quantity, many=many, title=title)
        yield f"curve-error-{index}", f"{title} over epochs", draw
    yield "curve-rate", "Learning rate over epochs", partial(_rate, many=many)


def forgetting_curves(run: RunRecord) -> list[str]:
    """Errors on the retention set over the epochs, a panel for each energy's forces."""
    panels = []
    many = [rows for rows in run.epochs if rows]
    names = dict.fromkeys(
        name for rows in many for row in rows for name in row if name.startswith("retention/")
    )
    for index, name in enumerate(name for name in names if name.endswith("_mae")):
        target, _, error = name.removeprefix("retention/").rpartition("/")
        kind = error.removesuffix("_mae")
        unit = {"energy": "meV/atom", "forces": "meV/Å"}.get(kind, "")
        several = "" if len(run.after.get("retention", {})) < 2 else f"{target}: "
        title = f"{several}{kind} off by ({unit})"
        panels.append(
            panel(
                f"forget-{index}",
                f"{title} over epochs",
                partial(_forgetting, many=many, name=name, title=title),
            )
        )
    return panels


def curves_html(run: RunRecord) -> str:
    """The learning curves of a run by themselves, for a notebook; empty without matplotlib."""
    if not figures.available():
        return ""
    css = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    colours = css[css.index("{") + 1 : css.index("}")].strip()  # those of a light ground
    style = f"{colours} background: var(--ground); font-family: sans-serif; max-width: 900px;"
    panels = "".join(
        f'<div style="flex: 1 1 280px">{one}</div>'
        for one in [*learning_curves(run), *forgetting_curves(run)]
    )
    return f'<div style="{style} display: flex; flex-wrap: wrap">{panels}</div>'


def _series(rows: Epochs, name: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """Epochs and values where there are any."""
    points = [(row["epoch"], factor * row[name]) for row in rows if name in row]
    return [x for x, _ in points], [y for _, y in points]


def _finish(axes: Any, title: str, many: Sequence[Epochs]) -> None:
    """Shared parts of all panels: title, best epoch, axis label."""
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(0, max(rows[-1]["epoch"] for rows in many) + 0.5)
    if len(many) == 1:
        best = best_row(many[0])
        if best:
            axes.axvline(best["epoch"], color=MUTED, linewidth=0.8, linestyle=":")


def _log(axes: Any, values: Sequence[float]) -> None:
    if values and all(value > 0 for value in values):
        axes.set_yscale("log")
        log_ticks(axes.yaxis, values)


def _loss(axes: Any, many: Sequence[Epochs]) -> None:
    shown: list[float] = []
    for rows in many:
        epochs, losses = _series(rows, "loss")
        _line(axes, epochs, losses, many, color=AFTER)
        shown += losses
    _log(axes, shown)
    _finish(axes, "training loss", many)


def _rate(axes: Any, many: Sequence[Epochs]) -> None:
    epochs, rates = _series(many[0], "learning_rate")
    _line(axes, epochs, rates, many[:1], color=AFTER)
    axes.ticklabel_format(axis="y", style="plain")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
    axes.set_ylim(bottom=0)
    _finish(axes, "learning rate", many)


def _line(
    axes: Any, epochs: list[float], values: list[float], many: Sequence[Epochs], **style: Any
) -> None:
    """A line through the epochs, or a dot where there is only one."""
    marker = "o" if len(epochs) == 1 else ""
    alpha = 1.0 if len(many) == 1 else 0.6
    axes.plot(epochs, values, marker=marker, markersize=3, alpha=alpha, **style)


def _errors(
    axes: Any, run: RunRecord, quantity: Quantity, many: Sequence[Epochs], title: str
) -> None:
    """Training and validation error; the starting model's as a level."""
    shown: list[float] = []
    for rows in many:
        for group, style in (
            ("train", {"color": MUTED, "linewidth": 1.0}),
            ("validation", {"color": AFTER}),
        ):
            if group == "train" and len(many) > 1:
                continue
            name = f"{group}/{quantity.target}/{quantity.mae}"
            epochs, values = _series(rows, name, quantity.factor)
            _line(axes, epochs, values, many, **style)
            shown += values
    level = quantity.error_in(run.before, "validation" if "validation" in run.before else "train")
    if run.is_finetuning and math.isfinite(level) and level > 0:
        axes.axhline(level, color=BEFORE, linestyle="--", linewidth=1.2)
        shown.append(level)
    _log(axes, shown)
    _finish(axes, title, many)


def _forgetting(axes: Any, many: Sequence[Epochs], name: str, title: str) -> None:
    for rows in many:
        epochs, values = _series(rows, name, 1000.0)
        _line(axes, epochs, values, many, color=WARN)
    axes.set_ylim(bottom=0)
    _finish(axes, title, many)


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
    """Density of points as opacity on a logarithmic scale, [cells, cells, 4]."""
    counts, _, _ = np.histogram2d(values, label, bins=_CELLS, range=[frame, frame])
    opacity = np.log1p(counts) / np.log1p(max(1.0, counts.max()))
    picture = np.empty((*counts.shape, 4))
    picture[..., :3] = colour
    picture[..., 3] = np.where(counts > 0, 0.25 + 0.75 * opacity, 0.0)
    return picture
