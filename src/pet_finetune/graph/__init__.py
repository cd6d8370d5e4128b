"""Structures as tensors: batches of graphs and the neighbourhoods that the network sees.

NamedTuples of tensors and functions of them, all of which TorchScript compiles or tracing follows.
"""

from __future__ import annotations

from .batch import Batch, join_graphs, repeat_batch, rotate_graphs, rotate_rows
from .neighborhood import Layout, Neighborhood, Rectangle, keep_edges, make_layout

__all__ = [
    "Batch",
    "Layout",
    "Neighborhood",
    "Rectangle",
    "join_graphs",
    "keep_edges",
    "make_layout",
    "repeat_batch",
    "rotate_graphs",
    "rotate_rows",
]
