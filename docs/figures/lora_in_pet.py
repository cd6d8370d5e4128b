"""Draws docs/figures/lora_in_pet.svg: where the low-rank adapters sit in PET.

Run it from anywhere after a change: ``python docs/figures/lora_in_pet.py``. The SVG is committed,
so building the documentation does not need matplotlib.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

FROZEN, ADAPTED, TRAINED, TOKEN = "#e9edf2", "#fde3c8", "#cfe8d5", "#ffffff"
LINE, INK, LORA_INK = "#5b6773", "#1f2933", "#b3560b"


def box(
    ax: Axes, x: float, y: float, text: str, face: str, *, w: float = 2.5, h: float = 0.62
) -> None:
    """A rounded box centred at ``(x, y)``; adapted layers get a small "+ BA" tab."""
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=face,
            edgecolor=LORA_INK if face == ADAPTED else LINE,
            linewidth=1.4 if face == ADAPTED else 1.0,
            zorder=2,
        )
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, zorder=3)
    if face == ADAPTED:
        ax.text(
            x + w / 2 + 0.1, y, "+ BA", ha="left", va="center", fontsize=9, color=LORA_INK, zorder=3
        )


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    """An arrow from ``start`` to ``end``; ``bend`` curves it (residual connections)."""
    ax.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": LINE,
            "linewidth": 1.1,
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
        },
        zorder=1,
    )


def frame(ax: Axes, left: float, bottom: float, w: float, h: float, title: str) -> None:
    """A dashed frame with a title above it."""
    ax.add_patch(
        FancyBboxPatch(
            (left, bottom),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.2",
            facecolor="none",
            edgecolor=LINE,
            linewidth=1.0,
            linestyle=(0, (5, 4)),
            zorder=0,
        )
    )
    ax.text(left + w / 2, bottom + h + 0.16, title, ha="center", fontsize=10, color=INK)


def column(
    ax: Axes, x: float, top: float, items: list[tuple[str, str]], step: float = 0.98
) -> list[float]:
    """Boxes one below the other with arrows between them; returns their heights."""
    heights = [top - step * i for i in range(len(items))]
    for (text, face), y in zip(items, heights, strict=True):
        box(ax, x, y, text, face)
    for upper, lower in pairwise(heights):
        arrow(ax, (x, upper - 0.31), (x, lower + 0.31))
    return heights


def whole_network(ax: Axes) -> None:
    """Left: the network from tokens to the energy, layer by layer."""
    heights = column(
        ax,
        1.9,
        8.2,
        [
            ("atoms and neighbours", TOKEN),
            ("embeddings", FROZEN),
            ("compress", ADAPTED),
            ("transformer blocks", ADAPTED),
            ("message passing", FROZEN),
            ("heads and last layers", TRAINED),
            ("energy of each atom", TOKEN),
        ],
        step=1.1,
    )
    for top, bottom in ((heights[4], heights[2]),):
        ax.plot([0.65, 0.28, 0.28], [top, top, bottom], color=LINE, linewidth=1.1, zorder=1)
        arrow(ax, (0.28, bottom), (0.65, bottom))
    ax.text(
        0.08, (heights[4] + heights[2]) / 2, "each GNN layer", rotation=90, va="center",
        ha="center", fontsize=8.5, color=INK,
    )  # fmt: skip


def block(ax: Axes) -> None:
    """Middle: one PreLN transformer block and its four adapted layers."""
    frame(ax, 4.75, 0.45, 4.75, 8.15, "one transformer block (PreLN), path of the edge tokens")
    heights = column(
        ax,
        7.0,
        8.1,
        [
            ("norm_attention", FROZEN),
            ("attention.input_linear", ADAPTED),
            ("softmax(QKᵀ + log f) V", TOKEN),
            ("attention.output_linear", ADAPTED),
            ("norm_mlp", FROZEN),
            ("mlp.w_in", ADAPTED),
            ("value × sigmoid(gate)", TOKEN),
            ("mlp.w_out", ADAPTED),
        ],
    )
    for first, last in ((0, 3), (4, 7)):
        top, bottom = heights[first] + 0.42, heights[last] - 0.44
        ax.plot([7.0, 5.15, 5.15], [top, top, bottom], color=LINE, linewidth=1.1, zorder=1)
        arrow(ax, (5.15, bottom), (7.0, bottom))
    ax.text(
        4.98, sum(heights[:4]) / 4, "residual", rotation=90, va="center", ha="center",
        fontsize=8.5, color=INK,
    )  # fmt: skip
    ax.text(
        4.98, sum(heights[4:]) / 4, "residual", rotation=90, va="center", ha="center",
        fontsize=8.5, color=INK,
    )  # fmt: skip
    arrow(ax, (7.0, heights[-1] - 0.31), (7.0, heights[-1] - 0.66))


def zoom(ax: Axes) -> None:
    """Right: what an adapted linear layer computes."""
    frame(ax, 10.15, 3.0, 4.6, 5.6, "an adapted linear layer")
    box(ax, 12.45, 8.1, "x", TOKEN, w=0.9)
    box(ax, 11.25, 6.1, "W, b\nfrozen", FROZEN, w=1.5, h=2.3)
    box(ax, 13.55, 6.85, "A   (r × in)\nrandom", TRAINED, w=1.75, h=0.8)
    box(ax, 13.55, 5.45, "B   (out × r)\nzero", TRAINED, w=1.75, h=0.8)
    arrow(ax, (12.25, 7.79), (11.25, 7.25))
    arrow(ax, (12.65, 7.79), (13.55, 7.25))
    arrow(ax, (13.55, 6.45), (13.55, 5.85))
    ax.text(13.68, 4.66, "× alpha / r", fontsize=9, color=LORA_INK, va="center")
    ax.text(12.45, 3.98, "+", ha="center", va="center", fontsize=14, color=INK, zorder=3)
    arrow(ax, (11.25, 4.95), (12.27, 4.1))
    arrow(ax, (13.55, 5.05), (12.63, 4.1))
    arrow(ax, (12.45, 3.83), (12.45, 3.5))
    ax.text(12.45, 3.22, "W x + b + (alpha / r) B A x", ha="center", fontsize=9.5, color=INK)


def legend(ax: Axes) -> None:
    """Bottom right: what the colours mean."""
    rows = [
        (FROZEN, "frozen"),
        (ADAPTED, "frozen, with a trained adapter"),
        (TRAINED, "trained, and stored in the adapter"),
        (TOKEN, "no parameters"),
    ]
    for i, (face, text) in enumerate(rows):
        y = 2.3 - 0.55 * i
        ax.add_patch(
            FancyBboxPatch(
                (10.3, y - 0.16), 0.5, 0.32, boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=face, edgecolor=LORA_INK if face == ADAPTED else LINE, linewidth=1.0,
            )
        )  # fmt: skip
        ax.text(11.0, y, text, va="center", fontsize=9, color=INK)


def draw() -> plt.Figure:
    """The whole figure."""
    figure, ax = plt.subplots(figsize=(11.0, 6.6))
    ax.set_xlim(-0.15, 14.9)
    ax.set_ylim(0.2, 9.1)
    ax.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01)
    whole_network(ax)
    block(ax)
    zoom(ax)
    legend(ax)
    ax.plot([3.15 + 0.62, 4.75], [4.9, 8.6], color=LORA_INK, linewidth=0.8, linestyle=":")
    ax.plot([3.15 + 0.62, 4.75], [4.9, 0.45], color=LORA_INK, linewidth=0.8, linestyle=":")
    return figure


if __name__ == "__main__":
    # Fixed salt and no date: the same drawing gives the same file.
    plt.rcParams["svg.hashsalt"] = "pet-finetune"
    draw().savefig(Path(__file__).with_suffix(".svg"), facecolor="white", metadata={"Date": None})
