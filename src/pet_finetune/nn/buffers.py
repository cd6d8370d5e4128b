"""Buffers that keep their type when the model around them changes its precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module whose buffers follow the model to its device and never to another type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self
