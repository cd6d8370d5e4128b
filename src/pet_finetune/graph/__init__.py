"""Structures as tensors: batches of graphs and the neighbourhoods that the network sees.

NamedTuples of tensors and functions of them, all of which TorchScript compiles or tracing follows.
"""

from __future__ import annotations

from .batch import (
    Batch,
    Edges,
    Layout,
    Neighborhood,
    Rectangles,
    join_graphs,
    make_layout,
    renumbered,
    repeat_batch,
    rotate_graphs,
    rotate_rows,
)

__all__ = [
    "Batch",
    "Edges",
    "Layout",
    "Neighborhood",
    "Rectangles",
    "join_graphs",
    "make_layout",
    "renumbered",
    "repeat_batch",
    "rotate_graphs",
    "rotate_rows",
]
