"""Profiling: stages for torch's profiler, and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

T = TypeVar("T")

_UNSEEN = nullcontext()
_MIB = 2**20
_PROCESS = Path("/proc/self")


def stage(name: str) -> AbstractContextManager[object]:
    """Context that marks the stage ``name``; stages may be nested."""
    # Unseen, a mark would take as long as a few operations.
    seen = torch._C._autograd._profiler_enabled()
    return record_function(name) if seen else _UNSEEN


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; making each one is timed as the stage ``name``."""
    iterator = iter(items)
    while True:
        with stage(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def stage_seconds(events: Iterable[FunctionEvent], device: str = "CPU") -> dict[str, float]:
    """Time of each stage, in the order in which they first began.

    Time within a stage that lies within another counts for the inner one only.

    Args:
        events: of torch's profiler.
        device: ``CUDA`` for when a GPU worked on each stage, instead of when it was asked to.
    """
    # torch marks the steps of optimisers, too, with a sign in their names.
    marks = (e for e in events if e.is_user_annotation and e.device_type.name == device)
    ranges = sorted(
        ((e.time_range.start, -e.time_range.end, e.name) for e in marks if "#" not in e.name),
    )
    seconds: dict[str, float] = {}
    around: list[tuple[str, float]] = []  # the stages that are open, and when they end
    for start, negative_end, name in ranges:
        end = -negative_end
        while around and around[-1][1] <= start:
            around.pop()
        seconds[name] = seconds.get(name, 0.0) + 1e-6 * (end - start)
        if around:
            seconds[around[-1][0]] -= 1e-6 * (end - start)
        around.append((name, end))
    return seconds


def resident_mib() -> float | None:
    """Memory that the process holds now, MiB; None where the system does not say."""
    return _from_status("VmRSS")


def peak_resident_mib() -> float | None:
    """The most that the process held, MiB: since :func:`forget_peak` on Linux, else ever."""
    peak = _from_status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / (_MIB if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Let the peaks begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        (_PROCESS / "clear_refs").write_text("5")  # see man 5 proc
    except OSError:
        return


def peak_gpu_mib(device: torch.device) -> float | None:
    """The most that tensors took on a GPU since :func:`forget_peak`, MiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / _MIB if device.type == "cuda" else None


def _from_status(field: str) -> float | None:
    """A line of /proc/self/status, which counts in kB of 1024 bytes."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None
