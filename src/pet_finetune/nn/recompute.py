"""Computing a part of the network again instead of keeping what it computed.

Training on forces differentiates twice, and what fills the memory is the graph of the first
derivative. ``torch.utils.checkpoint`` throws away what the forward pass stored, but computes it
anew, and keeps it, as soon as the first derivative is taken. Here the first derivative, too, is an
operation that keeps its inputs alone and is computed again when it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune.backends.choice import EAGER, Accelerated, Backend, using

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Surroundings:
    """State that a recomputation needs to repeat the first: random numbers and precision."""

    device: torch.device
    cpu_random: Tensor
    gpu_random: Tensor | None
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device) -> _Surroundings:
        """The current state."""
        kind = device.type
        return cls(
            device,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if kind == "cuda" else None,
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context with the stored state; random numbers outside do not change."""
        devices = [] if self.gpu_random is None else [self.device]
        kind, dtype = self.device.type, self.autocast_dtype
        # The cache of autocast forgets gradients where a weight is first cast without them.
        cast = torch.autocast(kind, dtype, enabled=self.autocast, cache_enabled=False)
        with torch.random.fork_rng(devices=devices), cast, torch.enable_grad():
            torch.set_rng_state(self.cpu_random)
            if self.gpu_random is not None:
                torch.cuda.set_rng_state(self.gpu_random, self.device)
            yield


@dataclass(frozen=True)
class _Part:
    """A part of the network.

    Attributes:
        run: its inputs to its outputs; parameters it takes from where they are.
        surroundings: of the first computation.
        inputs: how many inputs there are; its parameters come after them.
        differentiable: of inputs and parameters, which have a gradient.
    """

    run: Function
    surroundings: _Surroundings
    inputs: int
    differentiable: tuple[bool, ...]

    def again(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Fresh leaves for the inputs, with the parameters after them; and the outputs."""
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(tensors[: self.inputs], self.differentiable, strict=False)
        ]
        return [*leaves, *tensors[self.inputs :]], self.run(*leaves)


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """The product of the gradients with the derivatives; None where it is zero or not wanted."""
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True)
             if g is not None and o.requires_grad]  # fmt: skip
    chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    if not pairs or not chosen:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            chosen,
            [gradient for _, gradient in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if want else None for want in wanted]


class _Recomputed(torch.autograd.Function):
    """The part itself. Its tensors: inputs, then parameters."""

    @staticmethod
    def forward(ctx: Any, run: Function, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        needed = tuple(tensor.requires_grad for tensor in tensors)
        surroundings = _Surroundings.of(tensors[0].device)
        ctx.part = _Part(run, surroundings, inputs, needed)
        return run(*tensors[:inputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        part, tensors = ctx.part, ctx.saved_tensors
        if torch.is_grad_enabled():
            # A derivative that will be differentiated: that of the energy, by the inputs alone.
            found = _Derivative.apply(part, len(gradients), *gradients, *tensors)
            return (None, None, *found, *[None] * (len(tensors) - part.inputs))
        with part.surroundings.restored():
            leaves, outputs = part.again(tensors)
        return (None, None, *_gradients(outputs, leaves, part.differentiable, gradients))


class _Derivative(torch.autograd.Function):
    """The gradients of the inputs of a part. Its tensors: those of the outputs, and the part's."""

    @staticmethod
    def forward(ctx: Any, part: _Part, outputs: int, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.part, ctx.outputs = part, outputs
        ctx.save_for_backward(*tensors)
        gradients, own = tensors[:outputs], tensors[outputs:]
        wanted = part.differentiable[: part.inputs]
        with part.surroundings.restored():
            leaves, made = part.again([t for t in own if t is not None])
            return tuple(_gradients(made, leaves[: part.inputs], wanted, gradients))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        part = ctx.part
        incoming = ctx.saved_tensors[: ctx.outputs]
        with part.surroundings.restored():
            leaves, made = part.again(ctx.saved_tensors[ctx.outputs :])
            pulled = [None if g is None else g.detach().requires_grad_() for g in incoming]
            wanted = part.differentiable[: part.inputs]
            first = _gradients(made, leaves[: part.inputs], wanted, pulled, create_graph=True)
        pairs = [(f, g) for f, g in zip(first, gradients, strict=True) if f is not None]
        both = [*[g for g in pulled if g is not None], *leaves]
        found = _gradients(
            [f for f, _ in pairs],
            both,
            [tensor.requires_grad for tensor in both],
            [g for _, g in pairs],
        )
        back = iter(found)
        return (None, None, *[None if g is None else next(back) for g in pulled], *back)


def _backend_of(modules: Sequence[nn.Module]) -> Backend:
    parts = (part for module in modules for part in module.modules())
    return next((part.backend for part in parts if isinstance(part, Accelerated)), EAGER)


def recomputed(
    run: Function, inputs: Sequence[Tensor], modules: Iterable[nn.Module | None]
) -> tuple[Tensor, ...]:
    """``run(*inputs)``, which is computed again wherever something of it is needed later.

    The derivative that is taken with ``create_graph`` is that by the inputs: parameters have a
    gradient in a backward pass without it, such as that of a loss that contains forces.

    Args:
        run: gives a tuple of different tensors, and depends on nothing else that has a gradient
            than the inputs and the parameters of the modules.
        inputs: tensors.
        modules: those that ``run`` uses.
    """
    used = [module for module in modules if module is not None]
    backend = _backend_of(used)

    def steadily(*given: Tensor) -> tuple[Tensor, ...]:
        with using(backend, *used):  # later, too, the one of now
            return run(*given)

    parameters = [p for module in used for p in module.parameters() if p.requires_grad]
    out: tuple[Tensor, ...] = _Recomputed.apply(steadily, len(inputs), *inputs, *parameters)
    return out
