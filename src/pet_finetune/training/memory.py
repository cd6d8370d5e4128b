"""How much memory a piece of work takes: of the process, and of the GPU if there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_MIB = 2**20
_PROCESS = Path("/proc/self")


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
