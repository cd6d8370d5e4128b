"""The optimiser and its groups of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float | None
) -> torch.optim.Optimizer:
    """AdamW; decay acts on matrices only, as biases and norms have no reason to vanish."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay or 0.0},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
