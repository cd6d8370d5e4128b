"""The factors between the network's outputs and the units of the targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pet_finetune.nn.buffers import FixedBuffers


class Scale(FixedBuffers):
    """One factor per target between the network's outputs and the target's unit.

    Beside it a target may have relative factors for each species and value, which metatrain's
    models of properties have.
    """

    def get(self, target: str) -> Tensor:
        """The factor of a target, a float64 scalar; 1 when none was set."""
        factor = self._buffers.get(f"factor_{target}")
        return torch.ones((), dtype=torch.float64) if factor is None else factor

    def set(self, target: str, factor: float | Tensor) -> None:
        """Replace the factor of a target."""
        value = torch.as_tensor(factor, dtype=torch.float64).detach().reshape(()).clone()
        self.register_buffer(f"factor_{target}", value)

    def relative(self, target: str) -> Tensor | None:
        """Factors beside that of :meth:`get`, [n_species, num_subtargets] float64, or None."""
        return self._buffers.get(f"relative_{target}")

    def set_relative(self, target: str, factors: Tensor | None) -> None:
        """Replace the relative factors of a target."""
        self._buffers.pop(f"relative_{target}", None)
        if factors is not None:
            value = factors.detach().to(torch.float64).clone()
            self.register_buffer(f"relative_{target}", value)

    def rearrange_species(self, sources: Sequence[int | None]) -> None:
        """Take relative factors over from other species, as ``Composition`` does baselines."""
        for name, values in list(self._buffers.items()):
            if name.startswith("relative_") and values is not None:
                picked = [values.mean(0) if s is None else values[s] for s in sources]
                self.register_buffer(name, torch.stack(picked))
