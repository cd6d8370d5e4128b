"""How much memory this process has needed since a given moment."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def _status(name: str) -> float:
    """A line of the process's status, such as ``VmRSS``, in MB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{_STATUS} has no {name}: the peak of memory is measured on Linux only.")


def peak_memory(device: str) -> float:
    """The most memory the process ever had, in MB: resident, or allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return _status("VmHWM")


class MemoryMeter:
    """The peak from now on; free memory that the allocator still holds is given back first.

    On a CPU it is the growth of resident memory, without what the process newly maps of library
    files (the code of operations that run for the first time). On a GPU it is the peak of what
    torch has allocated, weights included.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _RESET.write_text("5")  # VmHWM := VmRSS
        self._resident, self._files = _status("VmRSS"), _status("RssFile")

    def peak(self) -> float:
        """In MB."""
        if self._device == "cuda":
            return peak_memory(self._device)
        newly_mapped = _status("RssFile") - self._files
        return _status("VmHWM") - self._resident - newly_mapped
