"""Gradual unfreezing: the heads train first, deeper parts later (ULMFiT, arXiv:1801.06146)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pet_finetune.config import Unfreeze
from pet_finetune.errors import TrainingError, did_you_mean
from pet_finetune.log import get_logger
from pet_finetune.model.depth import depth_names, depth_of
from pet_finetune.model.pet import PET

from .feature import Feature, TrainingRun

_logger = get_logger(__name__)
_ALL = "all"


class Unfreezing(Feature):
    """The feature ``finetune.unfreeze``: says of each epoch what trains, and freezes the rest."""

    name = "unfreeze"

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Find what each stage means.

        Raises:
            TrainingError: the options name something that the network does not have.
        """
        network, num_epochs = trainer.model.network, trainer.options.num_epochs
        self._parameters = dict(trainer.parameters)
        self._now: tuple[str, ...] | None = None
        self._begins = _begins(network, trainer.options.finetune.unfreeze)
        self._parts = {name: _parts(name, network) for name in self._parameters}
        self._check(network)
        late = [name for epoch, names in self._begins.items() if epoch >= num_epochs
                for name in names]  # fmt: skip
        if late:
            _logger.warning(
                "unfreeze: %s will never train, the run has %d epochs", ", ".join(late), num_epochs
            )

    def _check(self, network: PET) -> None:
        known = {part for parts in self._parts.values() for part in parts}
        for names in self._begins.values():
            for name in names:
                if name not in known:
                    shown = [*depth_names(network), _ALL]
                    raise TrainingError(
                        f"finetune.unfreeze.stages: nothing that trains is called '{name}'."
                        f"{did_you_mean(name, shown)} Use {', '.join(shown)}, or modules of the "
                        "network."
                    )

    def before_step(self, epoch: int) -> None:
        """Let the parts of an epoch train and freeze the others."""
        if not self._begins:
            return
        names = tuple(n for start, new in self._begins.items() if start <= epoch for n in new)
        if names == self._now:
            return
        self._now = names
        count = self._freeze_all_but(names)
        _logger.info(
            "unfreeze: from epoch %d on %s parameters train: %s",
            epoch + 1,
            f"{count:,}",
            ", ".join(names),
        )

    def _freeze_all_but(self, names: Collection[str]) -> int:
        """How many parameters train now."""
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(not self._parts[name].isdisjoint(names))
        return sum(p.numel() for p in self._parameters.values() if p.requires_grad)


def _begins(network: PET, options: Unfreeze | None) -> dict[int, tuple[str, ...]]:
    """What begins to train after how many epochs."""
    if options is None:
        return {}
    if options.stages is not None:
        return options.stages
    assert options.every is not None
    return {options.every * depth: (name,) for depth, name in enumerate(depth_names(network))}


def _parts(parameter: str, network: PET) -> frozenset[str]:
    """All names under which a parameter can be meant."""
    names = {_ALL, depth_names(network)[depth_of(parameter, network)], *_prefixes(parameter)}
    return frozenset(names)


def _prefixes(parameter: str) -> Iterable[str]:
    pieces = parameter.split(".")
    return (".".join(pieces[:length]) for length in range(1, len(pieces) + 1))
