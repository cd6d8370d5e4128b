"""The optimiser: which parameters decay, and which learn faster or slower than others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pet_finetune.config import TrainingOptions
from pet_finetune.errors import TrainingError
from pet_finetune.model.depth import depth_of
from pet_finetune.model.pet import PET

#: Key of a group: what the learning rate of the run is multiplied with.
FACTOR = "factor"


def make_optimizer(
    network: PET,
    parameters: Mapping[str, nn.Parameter],
    options: TrainingOptions,
    learning_rate: float,
) -> torch.optim.Optimizer:
    """AdamW; decay acts on matrices only, as biases and norms have no reason to vanish.

    Args:
        network: the parameters are part of it.
        parameters: what trains, by path in the network.
        options: weight decay, and what the learning rate of a part depends on.
        learning_rate: the highest.
    """
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        key = (_factor(name, network, options), parameter.dim() > 1)
        members.setdefault(key, []).append(parameter)
    # Those that learn at the rate of the run come first: whoever reads that rate looks there.
    order = sorted(members, key=lambda key: (abs(key[0] - 1.0), not key[1]))
    groups = [
        {
            "params": members[factor, matrices],
            "weight_decay": (options.weight_decay or 0.0) if matrices else 0.0,
            FACTOR: factor,
        }
        for factor, matrices in order
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def _factor(parameter: str, network: PET, options: TrainingOptions) -> float:
    """What a parameter's learning rate is multiplied with.

    LoRA+ (arXiv:2402.12354; PEFT's ``create_loraplus_optimizer``) lets B learn faster than A;
    layer-wise decay (ULMFiT, arXiv:1801.06146) lets deeper parts learn more slowly.
    """
    config = options.finetune.config
    if parameter.endswith(".lora_B"):
        return config.loraplus_lr_ratio
    return float(config.layer_decay ** depth_of(parameter, network))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the run; each group has its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from a saved state, with the decays and factors that hold now.

    Raises:
        TrainingError: the parameters were grouped in another way.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in state["param_groups"]] != sizes:
        raise TrainingError(
            "The saved run groups its parameters by learning rate in another way: keep "
            "finetune.config.layer_decay and loraplus_lr_ratio when going on with --restart, or "
            "start a new run with -c."
        )
    own = [(group["weight_decay"], group[FACTOR]) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, (decay, factor) in zip(optimizer.param_groups, own, strict=True):
        group["weight_decay"], group[FACTOR] = decay, factor
