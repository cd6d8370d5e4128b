"""Averages of the trained weights: exponential (EMA) or arithmetic (SWA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from .feature import Feature, TrainingRun
from .optimizer import averages_weights


class WeightAverage:
    """Keeps the average; lends it to the model for validation and saving.

    With a decay the average is exponential. The decay is ``min(decay, (1 + n) / (10 + n))`` after
    n updates, so that the start of the run is forgotten soon enough for short runs too. Without
    one it is the mean of the weights at all updates (SWA, arXiv:1803.05407).

    Args:
        parameters: the trained parameters by name. The average of one that does not train yet is
            its value, to the last bit.
        decay: weight of the old average in each update; None for the mean.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float | None) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @property
    def started(self) -> bool:
        """Whether there is an average: the mean of no weights is none."""
        return self._decay is not None or self.updates > 0

    def update(self) -> None:
        """Take the current weights into the average."""
        step = self._rule()
        step(list(self.average.values()), list(self._parameters.values()), self.updates)
        self.updates += 1

    def _rule(self) -> Callable[..., Any]:
        if self._decay is None:
            return get_swa_multi_avg_fn()
        decay = min(self._decay, (2 + self.updates) / (11 + self.updates))
        return get_ema_multi_avg_fn(decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights, once there are some."""
        if not self.started:
            yield
            return
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


class Averaging(Feature):
    """The features ``ema`` and ``swa``: validation and the best model use averaged weights."""

    name = "average"

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Begin with the weights that the model has."""
        self._options = trainer.options
        self.average = WeightAverage(trainer.parameters, trainer.options.ema)

    def after_update(self, epoch: int) -> None:
        """Take the weights into the average, where the epoch is one that counts."""
        if self._options.ema is not None or averages_weights(self._options, epoch):
            self.average.update()

    def weights(self) -> AbstractContextManager[object]:
        """The averaged weights, once there are some."""
        return self.average.applied()

    def state(self) -> dict[str, Any]:
        """The average and the number of updates in it."""
        average = {name: value.cpu() for name, value in self.average.average.items()}
        return {"average": average, "updates": self.average.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average."""
        self.average.load(state["average"], state["updates"])
