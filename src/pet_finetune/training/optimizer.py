"""The optimiser: what decays, what learns faster, how the rate goes over a run, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune.config.training import TrainingOptions, first_epoch
from pet_finetune.errors import TrainingError
from pet_finetune.model.pet import HEAD_GROUPS, PET

from .soap import SOAP, AdamW

#: What the parts at the two ends are called.
HEADS = "heads"
EMBEDDINGS = "embeddings"
# What belongs to one GNN layer, beside the layer itself.
_OF_LAYER = ("gnn_layers", "combination_norms", "combination_mlps")
#: Key of a group: what the learning rate of the run is multiplied with.
FACTOR = "factor"
# Muon makes all directions of a matrix equally long; with fewer there is nothing to even out.
_FEWEST = 8
_ADAMW_BETAS = (0.9, 0.999)  # torch's own
_SOAP_BETAS = (0.95, 0.95)  # what SOAP averages the gradients of matrices with


def depth_names(network: PET) -> list[str]:
    """The parts by depth: the heads, the GNN layers from the last to the first, the embeddings."""
    layers = reversed(range(len(network.gnn_layers)))
    return [HEADS, *(f"gnn_layers.{index}" for index in layers), EMBEDDINGS]


def depth_of(parameter: str, network: PET) -> int:
    """Depth of a parameter: 0 for heads and last layers, largest for the embeddings."""
    part, _, rest = parameter.partition(".")
    num_layers = len(network.gnn_layers)
    if part in HEAD_GROUPS:
        return 0
    if part == "long_range_featurizer":  # reads what the last layer says
        return 1
    if part in _OF_LAYER:
        return num_layers - int(rest.partition(".")[0])
    return num_layers + 1


class Optimizers:
    """Several optimisers, each for parameters of its own, used as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts; what is set in one is set in the part."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def kinds(self) -> list[str]:
        """The names of the optimisers."""
        return [type(part).__name__ for part in self.parts]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, and all groups as torch's own optimisers have them."""
        states = [part.state_dict() for part in self.parts]
        groups = [group for state in states for group in state["param_groups"]]
        return {"kinds": self.kinds, "parts": states, "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of as many parts."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


AnyOptimizer = torch.optim.Optimizer | Optimizers


def make_optimizer(
    network: PET,
    parameters: Mapping[str, nn.Parameter],
    options: TrainingOptions,
    learning_rate: float,
) -> AnyOptimizer:
    """AdamW; SOAP, or Muon for the weights of linear layers, with AdamW for the rest.

    SOAP takes all matrices, factors of adapters and embeddings included. Decay acts on matrices
    only, as biases and norms have no reason to vanish.

    Raises:
        TrainingError: this version of torch has no Muon.
    """
    if options.optimizer == "adamw":
        return _adamw(_groups(network, parameters, options), learning_rate)
    soap = options.optimizer == "soap"
    if soap:
        taken = {name for name, parameter in parameters.items() if parameter.dim() == 2}
    else:  # the weights of linear layers between features, which is what Muon is for
        taken = {
            f"{path}.weight"
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear) and min(module.weight.shape) >= _FEWEST
        }
    own = {n: p for n, p in parameters.items() if n in taken}
    rest = {n: p for n, p in parameters.items() if n not in taken}
    made: list[torch.optim.Optimizer] = []
    if own:
        groups = _groups(network, own, options)
        made.append(SOAP(groups, learning_rate) if soap else _muon(groups, learning_rate))
    if rest:
        betas = _SOAP_BETAS if soap else _ADAMW_BETAS
        made.append(_adamw(_groups(network, rest, options), learning_rate, betas))
    return Optimizers(made)


def _adamw(
    groups: list[dict[str, Any]],
    learning_rate: float,
    betas: tuple[float, float] = _ADAMW_BETAS,
) -> torch.optim.Optimizer:
    return AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def _muon(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    """With updates as long as those of AdamW (arXiv:2502.16982), whose rates then fit."""
    if not hasattr(torch.optim, "Muon"):
        raise TrainingError(
            f"architecture.training.optimizer: muon needs torch 2.9 or newer, this is "
            f"{torch.__version__}. Update torch, or use adamw."
        )
    made: torch.optim.Optimizer = torch.optim.Muon(
        groups, lr=learning_rate, adjust_lr_fn="match_rms_adamw"
    )
    return made


def _groups(
    network: PET, parameters: Mapping[str, nn.Parameter], options: TrainingOptions
) -> list[dict[str, Any]]:
    """Parameters by learning rate and decay, as torch's optimisers take them."""
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        key = (_factor(name, network, options), parameter.dim() > 1)
        members.setdefault(key, []).append(parameter)
    # Groups with the run's own rate come first, because the shown rate is read there.
    order = sorted(members, key=lambda key: (abs(key[0] - 1.0), not key[1]))
    return [
        {
            "params": members[factor, matrices],
            "weight_decay": (options.weight_decay or 0.0) if matrices else 0.0,
            FACTOR: factor,
        }
        for factor, matrices in order
    ]


def _factor(parameter: str, network: PET, options: TrainingOptions) -> float:
    """Factor on a parameter's learning rate.

    LoRA+ (arXiv:2402.12354; PEFT's ``create_loraplus_optimizer``) lets B learn faster than A;
    layer-wise decay (ULMFiT, arXiv:1801.06146) lets deeper parts learn more slowly.
    """
    config = options.finetune.config
    if parameter.endswith(".lora_B"):
        return config.loraplus_lr_ratio
    return float(config.layer_decay ** depth_of(parameter, network))


def set_learning_rate(optimizer: AnyOptimizer, rate: float) -> None:
    """Set the learning rate of the run; each group has its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR]


def load_optimizer(optimizer: AnyOptimizer, state: Mapping[str, Any]) -> None:
    """Go on from a saved state, with the decays and factors that hold now.

    Raises:
        TrainingError: the parameters were grouped in another way.
    """
    own_kinds = optimizer.kinds if isinstance(optimizer, Optimizers) else None
    # Those of the parts were not saved at first.
    saved_kinds = state.get("kinds", own_kinds) if "parts" in state else None
    if saved_kinds != own_kinds:
        then, now = (" and ".join(kinds or ["AdamW"]) for kinds in (saved_kinds, own_kinds))
        raise TrainingError(
            f"The saved run was made with another optimiser, {then}, and these options say {now}: "
            "keep architecture.training.optimizer when going on with --restart, or start a new "
            "run with -c."
        )
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in state["param_groups"]] != sizes:
        raise TrainingError(
            "The saved run groups its parameters in another way: keep "
            "architecture.training.optimizer, and layer_decay and loraplus_lr_ratio of "
            "finetune.config, when going on with --restart, or start a new run with -c."
        )
    own = [(group["weight_decay"], group[FACTOR]) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, (decay, factor) in zip(optimizer.param_groups, own, strict=True):
        group["weight_decay"], group[FACTOR] = decay, factor


def learning_rate_factor(step: float, total: int, warmup_fraction: float, scheduler: str) -> float:
    """Factor on the highest learning rate at a step: linear warm-up, then cosine or constant.

    Args:
        step: steps taken before this one, from 0; a fraction where epochs differ in length.
        total: steps in the whole run.
        warmup_fraction: part of the run that warms up.
        scheduler: ``cosine`` or ``constant``.
    """
    warmup = int(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if scheduler == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def averages_weights(options: TrainingOptions, epoch: int) -> bool:
    """Whether the weights of an epoch, from 0, go into the mean of ``swa``."""
    swa = options.swa
    return swa is not None and epoch >= first_epoch(swa.start, options.epochs)


def share_of_average(options: TrainingOptions, epoch: int, updates: int) -> float:
    """What the weights of an update make up of their average, ``ema`` or ``swa``.

    Args:
        options: say how the average is taken.
        epoch: from 0.
        updates: in the average so far.

    Returns:
        A number up to 1; 0 if the update does not count, or there is no average.
    """
    if options.ema is not None:
        return 1.0 - min(options.ema, (2 + updates) / (11 + updates))
    return 1.0 / (updates + 1) if averages_weights(options, epoch) else 0.0


def rate_at(options: TrainingOptions, highest: float, epoch: int, step: float, total: int) -> float:
    """The learning rate of a step."""
    swa = options.swa
    if swa is not None and swa.learning_rate is not None and averages_weights(options, epoch):
        return swa.learning_rate
    return highest * learning_rate_factor(step, total, options.warmup_fraction, options.scheduler)


def check_and_clip(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    losses: Tensor,
    where: Sequence[str],
    epoch: int,
    batch: int,
) -> list[float]:
    """Clip the gradient of an update, once it and the losses are known to be finite.

    Args:
        parameters: with their gradients.
        max_norm: the longest gradient; None leaves it.
        losses: [batches of the update, kinds of loss].
        where: the structures of each batch.
        epoch: from 0.
        batch: the first one, from 0.

    Returns:
        The sum of each kind of loss over the batches.

    Raises:
        TrainingError: a loss or the gradient is not a number.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    # All at once: reading a number makes the CPU wait until the GPU has done all before it.
    *values, length = torch.cat([losses.flatten(), norm.to(losses).view(1)]).tolist()
    rows = [values[i : i + losses.shape[1]] for i in range(0, len(values), losses.shape[1])]
    for index, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            place = f"batch {batch + index + 1}: {where[index]}"
            raise TrainingError(_not_finite("loss", epoch, place))
    if not math.isfinite(length):
        last = batch + len(rows)
        batches = f"batch {last}" if len(rows) == 1 else f"batches {batch + 1} to {last}"
        place = f"{batches}: {'; '.join(where)}"
        raise TrainingError(_not_finite("gradient of the loss", epoch, place))
    return [sum(column) for column in zip(*rows, strict=True)]


def _not_finite(what: str, epoch: int, place: str) -> str:
    return (
        f"The {what} is not a finite number in epoch {epoch + 1}, {place}. Look at the labels and "
        "the closest distances of these structures; if they are sound, lower learning_rate. The "
        "state of the last save is untouched."
    )
