"""Dimer curves as a table and as a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pet_finetune.plotting import plotting

_COLUMNS = 4
# eV: what lies outside is cut off, or the wells would not be seen beside the walls.
_LOWEST, _HIGHEST = -12.0, 12.0
_COLOURS = {"before": "0.55", "after": "tab:blue", "wall": "0.93"}


@dataclass(frozen=True)
class DimerRow:
    """The curves of one pair.

    Attributes:
        name: such as ``C-O``.
        curves: energies by name of the model, eV, one for each distance.
        wall: distance below which there should be a wall, Angstrom.
        verdict: what became of it.
    """

    name: str
    curves: Mapping[str, Sequence[float]]
    wall: float
    verdict: str


def dimers_csv(distances: Sequence[float], rows: Sequence[DimerRow]) -> str:
    """One line for each pair and distance: pair, distance (Angstrom), energies (eV)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(rows[0].curves)
    writer.writerow(["pair", "distance", *names])
    for row in rows:
        for index, distance in enumerate(distances):
            energies = (f"{row.curves[name][index]:.6g}" for name in names)
            writer.writerow([row.name, f"{distance:g}", *energies])
    return text.getvalue()


def dimers_svg(distances: Sequence[float], rows: Sequence[DimerRow]) -> str:
    """A small plot for each pair, as SVG.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    rc_context, Figure = plotting()
    columns = min(_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    # Letters as letters and names by a fixed rule: the same curves give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dimers", "font.size": 8}):
        width, height = 2.4 * columns, 1.9 * lines + 0.4
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
        # Inches for the labels; matplotlib's own layout takes longer than all the rest.
        figure.subplots_adjust(
            left=0.7 / width,
            right=1 - 0.1 / width,
            bottom=0.5 / height,
            top=1 - 0.3 / height,
            wspace=0.25,
            hspace=0.25,
        )
        for axis, row in zip(axes, rows, strict=False):
            draw_pair(axis, distances, row, _COLOURS)
            axis.set_title(f"{row.name}: {row.verdict}", fontsize=8)
        for axis in axes[len(rows) :]:
            axis.set_visible(False)
        axes[0].legend(frameon=False)
        figure.supxlabel("distance (Å)", y=0.08 / height)
        figure.supylabel("energy (eV)", x=0.08 / width)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_pair(
    axes: Any, distances: Sequence[float], row: DimerRow, colours: Mapping[str, str]
) -> None:
    """The curves of one pair, and where the wall should be.

    Args:
        axes: matplotlib's.
        distances: Angstrom.
        row: the curves.
        colours: of the curves by name, and of the wall.
    """
    for name, energies in row.curves.items():
        axes.plot(
            distances, energies, label=name, linewidth=1.2, color=colours.get(name),
            linestyle="--" if name == "before" else "-",
        )  # fmt: skip
    shown = [e for energies in row.curves.values() for e in energies]
    low, high = max(min(shown), _LOWEST), min(max(shown), _HIGHEST)
    margin = 0.05 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
    axes.axvspan(distances[0], row.wall, color=colours["wall"], linewidth=0)
