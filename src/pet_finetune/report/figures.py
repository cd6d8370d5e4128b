"""Figures that live inside the page: SVG that takes its colours from the page's light or dark.

Matplotlib draws with stand-in colours; in the text it writes they are replaced by the page's own
(CSS custom properties), so that one figure reads well on a light and on a dark ground.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pet_finetune.committee.calibration import Curves, draw_coverage
from pet_finetune.data.predicted import Predicted

from .frame_errors import AtomGroup, residuals
from .run_record import Dimers, Quantity

if TYPE_CHECKING:
    from pet_finetune.forgetting.dimers import DimerRow

# Stand-ins, which no drawing would use by itself, and what the page calls them.
INK, MUTED, GRID, BEFORE, AFTER, WARN = (f"#fe01{number:02x}" for number in range(6))
_NAMES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BEFORE: "before",
    AFTER: "after",
    WARN: "warn",
}

_SETTINGS: Any = {
    "svg.fonttype": "none",  # letters stay letters: they can be searched and take the page's font
    "svg.hashsalt": "report",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
}
# Lines of a minus sign and of what surrounds the axes, in inches.
_MARGINS = {"left": 0.62, "right": 0.12, "bottom": 0.48, "top": 0.32}


def available() -> bool:
    """Whether figures can be drawn here: matplotlib is in the extra ``plots``."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:  # noqa: BLE001 - an installation that is broken draws as little as none
        return False
    return True


def panel(
    name: str, alt: str, draw: Callable[[Any], None], *, width: float = 4.2, height: float = 2.7
) -> str:
    """One pair of axes as SVG for the page.

    Args:
        name: unique on the page; goes before the ids within.
        alt: what is to be seen, for those who cannot.
        draw: is given matplotlib's axes.
        width: inches; on the page the figure is as wide as its place.
        height: inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height))
        left, bottom = _MARGINS["left"] / width, _MARGINS["bottom"] / height
        right, top = _MARGINS["right"] / width, _MARGINS["top"] / height
        axes = figure.add_axes((left, bottom, 1 - left - right, 1 - bottom - top))
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return _for_page(stream.getvalue(), name, alt)


_ATTRIBUTE = re.compile(r'\b(d|x|y|points|transform|width|height)="([^"]*)"')
_DIGITS = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font-family: [^;\"]*;?\s*|font: ([\d.]+px) [^;\"]*")


def _for_page(text: str, name: str, alt: str) -> str:
    """A whole SVG file as an element of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Its rules would hold for the whole page.
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = _ATTRIBUTE.sub(lambda m: f'{m[1]}="{_DIGITS.sub(_rounded, m[2])}"', text)
    text = _FONT.sub(lambda m: f"font-size: {m[1]}" if m[1] else "", text)
    text = _styled_once(text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    for colour, own in _NAMES.items():
        text = text.replace(colour, f"var(--{own})")
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None, "matplotlib's SVG has a viewBox"
    head = (
        f'<svg class="plot" {view[0]} role="img" aria-label="{html.escape(alt)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    body = re.sub(r"\s*\n\s*", "\n", text[text.index(">") + 1 :])
    return head + body.strip()


_USE = re.compile(r'(<use xlink:href="#([^"]+)"[^>]*?) style="([^"]*)"')


def _styled_once(text: str) -> str:
    """Give the style of marks to the shape they repeat, instead of to each of thousands."""
    styles: dict[str, str] = {}
    for match in _USE.finditer(text):
        styles.setdefault(match[2], match[3])
    text = _USE.sub(lambda m: m[1] if styles[m[2]] == m[3] else m[0], text)
    for name, style in styles.items():
        shape = re.compile(rf'(<path id="{name}" d="[^"]*")(?: style="[^"]*")?')
        text = shape.sub(rf'\g<1> style="{style}"', text)
    return text


def _rounded(match: re.Match[str]) -> str:
    """Hundredths of a point are finer than any screen."""
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def log_ticks(axis: Any, values: Iterable[float]) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 where it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    positive = [value for value in values if value > 0 and math.isfinite(value)]
    decades = math.log10(max(positive) / min(positive)) if positive else 0.0
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))) if len(subs) < 9 else NullLocator())
    axis.set_minor_formatter(NullFormatter())


_STYLES = {
    "before": {"color": BEFORE, "linestyle": "--", "marker": "o", "markersize": 3},
    "after": {"color": AFTER, "marker": "o", "markersize": 3},
}


def magnitude_plot(parts: Sequence[AtomGroup], name: str) -> str:
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
