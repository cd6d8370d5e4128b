"""Device and precision of computations, and the versions of the libraries."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from pet_finetune import processes
from pet_finetune.errors import ConfigError
from pet_finetune.installation import __version__

#: Packages whose versions determine the numbers.
PACKAGES = ("torch", "ase", "numpy", "vesin")


@contextmanager
def torchscript() -> Iterator[None]:
    """Torch without warnings of TorchScript, which metatomic's files are of; also a decorator.

    Importing metatensor causes them too: ``python -W error`` ended there.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch without inference mode, autocast or default device of the caller; also a decorator."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device that a name means.

    Of several processes that work together each has a GPU of its own: the one with the number of
    the process on its host, or the only one that it sees.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``...; ``gpu`` is the first GPU, and ``auto`` too where
            there is one, else the CPU. A number, of processes, is ``auto``.
        local_rank: the number of this process on its host; without it that of :mod:`.processes`,
            None for one that works by itself.

    Raises:
        ConfigError: the device is not there, lacks the 64-bit numbers that total energies need, or
            is a GPU that was in use before this process was forked.
    """
    _one_thread_in_forked_children()
    if name != "cpu":
        check_forked(name)
    local_rank = processes.local_rank() if local_rank is None else local_rank
    name = "auto" if name.isdigit() else name
    if local_rank is not None and name != "cpu":
        return _device_of_process(name, local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = "cuda" if name == "gpu" else name
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise ConfigError(
            f"device: '{name}' cannot be used. Use 'auto', 'cpu', 'cuda' or 'cuda:0' (other "
            "devices lack the 64-bit numbers that total energies need)."
        )
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: '{name}' is not there: torch finds {torch.cuda.device_count()} CUDA GPUs. "
            "Use 'cpu' or 'auto'."
        )
    return device


def _device_of_process(name: str, local_rank: int) -> torch.device:
    """The GPU of one of several processes, or the CPU for ``auto`` where there is no GPU."""
    if name not in ("auto", "gpu", "cuda"):
        raise ConfigError(
            f"device: '{name}' is one device for all processes. Use 'auto' or 'cuda', and each has "
            "one of its own; CUDA_VISIBLE_DEVICES chooses among them."
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and name == "auto":
        return torch.device("cpu")
    if not count or (count > 1 and local_rank >= count):
        raise ConfigError(
            f"device: '{name}': there is no GPU for process {local_rank} of this host, torch finds "
            f"{count}. Start at most as many processes as there are GPUs, or use 'cpu'."
        )
    return torch.device("cuda", local_rank if count > 1 else 0)


def check_forked(device: torch.device | str) -> None:
    """Refuse a GPU in a process that was forked from one that used it, which CUDA cannot do."""
    if str(device) != "cpu" and torch.cuda._is_in_bad_fork():
        raise ConfigError(
            f"device: '{device}' cannot be used here: this process was forked from one that had "
            "used the GPU, and CUDA does not survive that. Start processes with "
            "multiprocessing.get_context('spawn') (for concurrent.futures: "
            "ProcessPoolExecutor(mp_context=...)), or compute with device 'cpu'."
        )


@functools.cache
def _one_thread_in_forked_children() -> None:
    """Let processes that are forked from this one compute, each with one thread.

    A fork copies what OpenMP knows of its threads, and not the threads: the first operation that
    is shared among several would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_compute_with_one_thread)


def _compute_with_one_thread() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating type that is meant; None, for a model's own, stays None."""
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in _DTYPES.values():
        raise ConfigError(f"dtype: '{dtype}' is not one of {', '.join(_DTYPES)}.")
    return chosen


def dtype_of_bits(bits: int) -> torch.dtype:
    """The floating type of ``base_precision``, 32 or 64."""
    return {32: torch.float32, 64: torch.float64}[bits]


def versions() -> dict[str, str]:
    """Versions of the packages that determine the numbers, by name."""
    found = {"pet-finetune": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
