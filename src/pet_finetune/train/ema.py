"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Keeps the average; lends it to the model for validation and saving.

    The decay is ``min(decay, (1 + n) / (10 + n))`` after n updates, so that the start of the run
    is forgotten soon enough for short runs too.

    Args:
        parameters: the trained parameters by name.
        decay: weight of the old average in each update.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    def update(self) -> None:
        """Take the current weights into the average."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        step = get_ema_multi_avg_fn(decay)
        step(list(self.average.values()), list(self._parameters.values()), self.updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights."""
        current = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def load(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a saved average."""
        for name, value in self.average.items():
            value.copy_(average[name])
        self.updates = updates
