"""Curves of the page: learning, forgetting, and simulations."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from pet_finetune.extras import plotting

from . import figures
from .figures import AFTER, BEFORE, MUTED, WARN, log_ticks, panel
from .run_record import Epochs, Quantity, RunRecord, best_row

_MOST_POINTS = 2000
_AVERAGED = 50  # points in a running mean, where there are enough


def simulation_svg(
    rows: Mapping[str, np.ndarray], atoms: int, target: float, limit: float | None = None
) -> str:
    """A panel each for energy, temperature and, where the log has them, volume and uncertainty.

    Args:
        rows: the log, arrays by column.
        atoms: how many there are.
        target: temperature that was asked for, K.
        limit: uncertainty at which the run was to stop, eV/A.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    rc_context, Figure = plotting()
    step = max(1, len(rows["step"]) // _MOST_POINTS)
    thin = {name: values[::step] for name, values in rows.items()}
    panels = [_draw_energy, _draw_temperature]
    if "volume_A3" in rows and np.ptp(rows["volume_A3"]) > 0:
        panels.append(_draw_volume)
    if "max_forces_uncertainty_eV_A" in rows or "energy_uncertainty_eV" in rows:
        panels.append(_draw_uncertainty)
    # Letters as letters and names by a fixed rule: the same log gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "simulation", "font.size": 9}):
        height = 1.9 * len(panels) + 0.5
        figure = Figure(figsize=(7.0, height))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
        figure.subplots_adjust(
            left=0.13, right=0.97, bottom=0.5 / height, top=1 - 0.3 / height, hspace=0.22
        )
        unit, factor = ("ps", 1e-3) if rows["time_fs"][-1] >= 1000 else ("fs", 1.0)
        time = thin["time_fs"] * factor
        for axis, draw in zip(axes, panels, strict=True):
            draw(axis, time, thin, {"atoms": atoms, "target": target, "limit": limit})
            axis.grid(color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
        axes[-1].set_xlabel(f"time ({unit})")
        axes[-1].set_xlim(time[0], time[-1] if len(time) > 1 else time[0] + 1)
        figure.align_ylabels(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _draw_energy(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    """The conserved quantity; potential and total energy where there is none (Langevin)."""
    per_atom = 1000.0 / of["atoms"]
    if "conserved_eV" in rows:
        shown = {"conserved energy": rows["conserved_eV"]}
    else:
        shown = {"total energy": rows["total_eV"], "potential energy": rows["potential_eV"]}
    for (name, values), color in zip(shown.items(), ("tab:blue", "0.6"), strict=False):
        axis.plot(time, (values - values[0]) * per_atom, label=name, color=color, linewidth=0.9)
    axis.set_ylabel("energy − start\n(meV/atom)")
    _legend(axis)


def _legend(axis: Any) -> None:
    """Above the panel, where it hides nothing."""
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0}
    axis.legend(frameon=False, fontsize=8, ncols=2, **place)


def _draw_temperature(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    values = rows["temperature_K"]
    axis.plot(time, values, color="tab:red", alpha=0.45, linewidth=0.7)
    if len(values) > 2 * _AVERAGED:
        mean = np.convolve(values, np.ones(_AVERAGED) / _AVERAGED, mode="valid")
        axis.plot(time[_AVERAGED // 2 :][: len(mean)], mean, color="tab:red", label="running mean")
    axis.axhline(of["target"], color="0.3", linestyle="--", linewidth=0.9, label="asked for")
    axis.set_ylabel("temperature\n(K)")
    _legend(axis)


def _draw_volume(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    axis.plot(time, rows["volume_A3"] / of["atoms"], color="tab:green", linewidth=0.9)
    axis.set_ylabel("volume\n(Å³/atom)")


def _draw_uncertainty(axis: Any, time: np.ndarray, rows: Mapping[str, np.ndarray], of: Any) -> None:
    """Of the forces, where it is known; else of the energy."""
    if "max_forces_uncertainty_eV_A" in rows:
        values, limit = rows["max_forces_uncertainty_eV_A"], of["limit"]
        axis.set_ylabel("largest force\nuncertainty (meV/Å)")
        if limit is not None:
            axis.axhline(1000.0 * limit, color="0.3", linestyle="--", linewidth=0.9)
    else:
        values = rows["energy_uncertainty_eV"] / of["atoms"]
        axis.set_ylabel("uncertainty of\nthe energy (meV/atom)")
    axis.plot(time, 1000.0 * values, color="tab:purple", linewidth=0.7)
    axis.set_ylim(bottom=0.0)


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
    for number, (_, _, draw) in enumerate(curves, 1):
        draw(figure.add_subplot(1, len(curves), number))
    return figure


def _curves(run: RunRecord) -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    """Name, description and drawing of each panel; none without epochs."""
    many = [rows for rows in run.epochs if rows]
    if not many:
        return
    yield "curve-loss", "Training loss over epochs", partial(_loss, many=many)
    for number, quantity in enumerate(run.quantities()):
        title = f"{quantity.name} MAE ({quantity.unit})"
        draw = partial(_errors, run=run, quantity=quantity, many=many, title=title)
        yield f"curve-error-{number}", f"{title} over epochs", draw
    yield "curve-rate", "Learning rate over epochs", partial(_rate, many=many)


def forgetting_curves(run: RunRecord) -> list[str]:
    """Errors on the retention set over the epochs, a panel for each energy's forces."""
    panels = []
    many = [rows for rows in run.epochs if rows]
    names = dict.fromkeys(
        name for rows in many for row in rows for name in row if name.startswith("retention/")
    )
    for number, name in enumerate(name for name in names if name.endswith("_mae")):
        target, _, error = name.removeprefix("retention/").rpartition("/")
        kind = error.removesuffix("_mae")
        unit = {"energy": "meV/atom", "forces": "meV/Å"}.get(kind, "")
        several = "" if len(run.after.get("retention", {})) < 2 else f"{target}: "
        title = f"{several}{kind} off by ({unit})"
        panels.append(
            panel(
                f"forget-{number}",
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
    """What all panels share: title, the best epoch, the name of the axis."""
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
