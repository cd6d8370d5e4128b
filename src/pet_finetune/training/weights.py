"""The weights over a run: parts that begin to train later, averages (EMA, SWA), the last baselines.

Gradual unfreezing lets the heads train first and deeper parts later (ULMFiT, arXiv:1801.06146).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from pet_finetune import processes
from pet_finetune.adapters.peft_files import read_adapter, write_adapter
from pet_finetune.checkpoint.archive import Checkpoint
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.config.finetune import Unfreeze
from pet_finetune.errors import TrainingError, did_you_mean
from pet_finetune.log import get_logger
from pet_finetune.model.pet import PET

from .baselines import settled_baselines
from .feature import Feature, TrainingRun
from .optimizer import depth_names, depth_of, share_of_average
from .run_files import RunFiles

_logger = get_logger(__name__)
_ALL = "all"


class Unfreezing(Feature):
    """The feature ``finetune.unfreeze``: sets in each epoch which weights train."""

    name = "unfreeze"

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Find what each stage means.

        Raises:
            TrainingError: the options name something that the network does not have.
        """
        network, num_epochs = trainer.model.network, trainer.options.epochs
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
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(not self._parts[name].isdisjoint(names))
        count = sum(p.numel() for p in self._parameters.values() if p.requires_grad)
        _logger.info(
            "unfreeze: from epoch %d on %s parameters train: %s",
            epoch + 1,
            f"{count:,}",
            ", ".join(names),
        )


def _begins(network: PET, options: Unfreeze | None) -> dict[int, tuple[str, ...]]:
    """Parts that begin to train, by epoch."""
    if options is None:
        return {}
    if options.stages is not None:
        return options.stages
    assert options.every is not None
    return {options.every * depth: (name,) for depth, name in enumerate(depth_names(network))}


def _parts(parameter: str, network: PET) -> frozenset[str]:
    """All names under which a parameter can be meant."""
    pieces = parameter.split(".")
    names = {".".join(pieces[:length]) for length in range(1, len(pieces) + 1)}
    return frozenset({_ALL, depth_names(network)[depth_of(parameter, network)], *names})


class Averaging(Feature):
    """The features ``ema`` and ``swa``: validation and the best model use averaged weights.

    With ``ema`` the average is exponential. Its decay is ``min(ema, (1 + n) / (10 + n))`` after n
    updates, so that the start of the run is forgotten soon enough for short runs too. With ``swa``
    it is the mean of the weights at all updates that count (arXiv:1803.05407). The average of a
    parameter that does not train yet is its value, to the last bit.
    """

    name = "average"

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Begin with the weights that the model has."""
        super().start(trainer, kept)
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in trainer.parameters.items()}

    @torch.no_grad()
    def after_update(self, epoch: int) -> None:
        """Take the weights into the average, where the epoch is one that counts."""
        share = share_of_average(self.trainer.options, epoch, self.updates)
        if share:
            current: list[Tensor] = list(self.trainer.parameters.values())
            torch._foreach_lerp_(list(self.average.values()), current, share)
            self.updates += 1

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The averaged weights, once there are some: the mean of no weights is none."""
        if self.trainer.options.ema is None and not self.updates:
            yield
            return
        current = {name: p.detach().clone() for name, p in self.trainer.parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainer.parameters.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """The average and the number of updates in it."""
        average = {name: value.cpu() for name, value in self.average.items()}
        return {"average": average, "updates": self.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average."""
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.updates = state["updates"]


class SettledBaselines(Feature):
    """Refits the baselines of energies to what the best model leaves over of the training labels.

    PET's energies depend a little on how a structure is rotated, by a number common to cells that
    all lie alike. It is taken out of sets of nothing but cells, which keep their orientation in use
    as molecules do not. Runs whose baselines are given or kept leave them.
    """

    name = "settled baselines"

    def complete(self, best: Checkpoint, files: RunFiles) -> Mapping[str, Any]:
        """Move the baselines of the model and its adapter, and write both."""
        trainer, model = self.trainer, best.model
        settled: dict[str, Tensor] = {}
        if not all(bool(s.pbc.any()) for s in trainer.training.sampled().structures):
            return {}
        with processes.alone():
            if processes.first():
                ridge = trainer.options.baseline.ridge
                settled = {
                    target: settled_baselines(model, trainer.training, target, ridge)
                    for target, objective in trainer.objectives.items()
                    if objective.energy
                }
        settled = processes.from_first(settled)
        if not settled:
            return {}
        for target, values in settled.items():
            moved = 1000 * float((values - model.composition.get(target).cpu()).abs().max())
            _logger.info("baselines of '%s' settled: by up to %.2f meV", target, moved)
            model.composition.set(target, values)
        self._tell(files, settled, [chemical_symbols[number] for number in model.species])
        if processes.first():
            save_checkpoint(files.best, model, provenance=best.provenance)
            if files.adapter.is_dir():
                adapter = read_adapter(files.adapter)
                targets = [
                    replace(own, composition=settled.get(own.spec.name, own.composition))
                    for own in adapter.targets
                ]
                write_adapter(replace(adapter, targets=tuple(targets)), files.adapter)
        return {}

    def _tell(self, files: RunFiles, settled: Mapping[str, Tensor], symbols: list[str]) -> None:
        """Put the baselines that the model ends with into the tables of ``run.json``."""
        tables = files.about().get("baselines", [])
        for table in (one for one in tables if one["target"] in settled):
            values = dict(zip(symbols, settled[table["target"]].tolist(), strict=True))
            table["rows"] = [[*row[:3], values.get(row[0], row[3])] for row in table["rows"]]
        files.tell({"baselines": tables})
