"""Back ends: who computes the operators of a network. Chosen once for a model, and kept with it.

A model that is built where the compiled operators are loaded uses them; :func:`use_backend` chooses
another one, and :func:`choose_backend` says which is best on a device. Its modules hold the choice,
so it goes where they go: into copies, under adapters, to other devices (where what cannot compute
there gives way to plain torch). TorchScript, and with it every exported model, reads the plain form
of each module whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import library

__all__ = [
    "EAGER",
    "FUSED",
    "FUSED_BFLOAT16",
    "Accelerated",
    "Backend",
    "choose_backend",
    "default_backend",
    "use_backend",
    "using",
]

_FLOATS = (torch.float32, torch.float64)


class Backend:
    """Who computes. There are as many as constants in this module, told apart by identity.

    Args:
        name: unique.
        fused: whether the operators are the compiled ones, see :mod:`.fused`.
        rounds: whether these round the factors of float32 products to bfloat16.
    """

    def __init__(self, name: str, *, fused: bool = False, rounds: bool = False) -> None:
        self.name, self.fused, self.rounds = name, fused, rounds

    def computes_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it can compute with numbers of a type on a device."""
        return not self.fused or (device.type == "cpu" and dtype in _FLOATS)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model keep the one object, or take what there is instead."""
        return _by_name, (self.name,)

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"


#: Plain torch: the reference, on every device and in every precision.
EAGER = Backend("eager")
#: The compiled operators, for CPUs.
FUSED = Backend("fused", fused=True)
#: The same with products rounded to bfloat16, for processors that have instructions for them.
FUSED_BFLOAT16 = Backend("fused-bfloat16", fused=True, rounds=True)

_ALL = {backend.name: backend for backend in (EAGER, FUSED, FUSED_BFLOAT16)}


def _by_name(name: str) -> Backend:
    backend = _ALL[name]
    return EAGER if backend.fused and not library.loaded() else backend


def default_backend() -> Backend:
    """What a model uses that nobody chose a back end for."""
    return FUSED if library.loaded() else EAGER


def choose_backend(device: torch.device | str = "cpu") -> Backend:
    """The best there is for a device; compiles the operators where that was not done yet.

    Raises:
        ConfigError: ``PET_FINETUNE_KERNELS`` is not one of its values, or requires what cannot be
            had.
    """
    return FUSED if library.prepare(device) else EAGER


class Accelerated:
    """What a module is that a back end may compute; plain torch until it is told of one."""

    # Not annotated: TorchScript would try to compile the type.
    #: Who computes.
    backend = EAGER
    #: Who was asked to; another one where that cannot compute on the model's device.
    chosen = EAGER


def use_backend(model: nn.Module, backend: Backend) -> None:
    """Have all of a model computed by a back end; by plain torch while it cannot compute there.

    Args:
        model: or a part of one.
        backend: who is asked to.
    """
    weight = next(model.parameters(), None)
    fits = weight is None or backend.computes_on(weight.device, weight.dtype)
    for module in model.modules():
        if isinstance(module, Accelerated):
            module.chosen, module.backend = backend, backend if fits else EAGER


@contextmanager
def using(backend: Backend, *models: nn.Module) -> Iterator[None]:
    """Have models computed by another back end meanwhile."""
    parts = [part for model in models for part in model.modules() if isinstance(part, Accelerated)]
    before = [(part.chosen, part.backend) for part in parts]
    for model in models:
        use_backend(model, backend)
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.chosen, part.backend = own
