"""Figures that live inside the page: SVG that takes its colours from the page's light or dark.

Matplotlib draws with stand-in colours; in the text it writes they are replaced by the page's own
(CSS custom properties), so that one figure reads well on a light and on a dark ground.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

__all__ = ["AFTER", "BEFORE", "GRID", "INK", "MUTED", "WARN", "available", "log_ticks", "panel"]

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
        text = shape.sub(partial(_with_style, style=style), text)
    return text


def _with_style(match: re.Match[str], style: str) -> str:
    return f'{match[1]} style="{style}"'


def _rounded(match: re.Match[str]) -> str:
    """Hundredths of a point are finer than any screen."""
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def log_ticks(axis: Any, values: Iterable[float]) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 where it spans little.

    Args:
        axis: ``axes.xaxis`` or ``axes.yaxis``.
        values: what is drawn along it.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    positive = [value for value in values if value > 0 and math.isfinite(value)]
    decades = math.log10(max(positive) / min(positive)) if positive else 0.0
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))) if len(subs) < 9 else NullLocator())
    axis.set_minor_formatter(NullFormatter())
