"""Fused operations for the CPU, with plain torch as their reference and their stand-in.

Each function here computes what its one-line torch counterpart in :mod:`pet_finetune.nn` computes,
in float32 or float64, and can be differentiated twice; those of :mod:`.compact` once.
:func:`usable` says whether a tensor can go through them; the callers fall back to torch operations
where it cannot.
"""

from .blocks import Blocks
from .compact import PackedLayer, compact, compacts
from .compiled import active, disabled, prepare, ready
from .halves import halves, in_bfloat16, multiplies_halves
from .operators import (
    attention,
    grouped_projection,
    lanes,
    layer_norm,
    pack,
    projection,
    rms_norm,
    silu,
    swiglu,
    usable,
    weigh_edges,
)

__all__ = [
    "Blocks",
    "PackedLayer",
    "active",
    "attention",
    "compact",
    "compacts",
    "disabled",
    "grouped_projection",
    "halves",
    "in_bfloat16",
    "lanes",
    "layer_norm",
    "multiplies_halves",
    "pack",
    "prepare",
    "projection",
    "ready",
    "rms_norm",
    "silu",
    "swiglu",
    "usable",
    "weigh_edges",
]
