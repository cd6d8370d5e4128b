"""The plot of a simulation: conserved energy, temperature, and what else its log holds."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from pet_finetune.extras import plotting

__all__ = ["simulation_svg"]

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
    if "max_forces_uncertainty_eV_A" in rows:
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
    values = 1000.0 * rows["max_forces_uncertainty_eV_A"]
    axis.plot(time, values, color="tab:purple", linewidth=0.7)
    axis.set_ylim(bottom=0.0)
    axis.set_ylabel("largest force\nuncertainty (meV/Å)")
    if of["limit"] is not None:
        axis.axhline(1000.0 * of["limit"], color="0.3", linestyle="--", linewidth=0.9)
