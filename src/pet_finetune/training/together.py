"""What the processes that train one model add up: gradients, losses, errors.

Each process takes the gradient of its part of a batch, whose loss is divided by the number of
labels of the whole batch. The sum over the processes is then the gradient of the whole batch,
whatever the parts are. It is taken once an update, in one call, after all backward passes.

torch's ``DistributedDataParallel`` is not used. It sends gradients while a backward pass runs, and
asks for exactly one such pass, through the wrapped ``forward``, with the same parameters each time.
Here a step has several: forces are derivatives within the forward pass, each feature goes backward
by itself, some parameters get no gradient in some batches, and a process may have no structure.
What is lost is the overlap of sending and computing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from pet_finetune import processes

__all__ = ["add_gradients", "add_part", "same_tensors", "total"]


def total(values: Tensor) -> Tensor:
    """The sum of what all processes have; the tensor itself where there is one process."""
    if processes.size() > 1:
        from torch import distributed

        values = values.clone()
        distributed.all_reduce(values)
    return values


@torch.no_grad()
def add_gradients(parameters: Sequence[Parameter], flag: bool) -> bool:
    """Give all processes the sum of their gradients.

    A parameter that no process has a gradient for has none afterwards: the optimiser leaves it
    alone, as with one process.

    Args:
        parameters: in the same order everywhere.
        flag: of this process.

    Returns:
        Whether any process has set its flag.
    """
    if processes.size() == 1:
        return flag
    # On the CPU, where these are known: reading them from a GPU would make the CPU wait.
    told = total(torch.tensor([flag, *(p.grad is not None for p in parameters)], dtype=torch.int32))
    any_flag, *present = told.tolist()
    trained = [p for p, count in zip(parameters, present, strict=True) if count]
    for some in _by_dtype(trained):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in some])
        summed = total(flat).split([parameter.numel() for parameter in some])
        for parameter, gradient in zip(some, summed, strict=True):
            parameter.grad = gradient.view_as(parameter)
    return bool(any_flag)


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _by_dtype(parameters: Iterable[Parameter]) -> Iterable[list[Parameter]]:
    groups: dict[torch.dtype, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.dtype, []).append(parameter)
    return groups.values()


@torch.no_grad()
def same_tensors(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that the first one has."""
    if processes.size() == 1:
        return
    from torch import distributed

    for tensor in tensors:
        contiguous = tensor.detach().contiguous()
        distributed.broadcast(contiguous, src=0)
        tensor.copy_(contiguous)


def add_part(
    parameters: Sequence[Parameter], gradients: Sequence[Tensor | None], size: int
) -> None:
    """Add the gradients of one of so many batches to those of the parameters."""
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            part = gradient if size == 1 else gradient / size
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
