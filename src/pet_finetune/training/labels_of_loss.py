"""Labels as the loss sees them: with noise, and without most of the offset that energies share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pet_finetune.config.training import LabelNoise
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.keys import forces_key
from pet_finetune.model.prediction import Prediction
from pet_finetune.rng import Stream, torch_generator

from .feature import Feature, Step, TrainingRun
from .step import total

#: What an update adds to the running mean: five of them make it anew, while the offset drifts for
#: hundreds.
_NEW = 0.2


class NoisyLabels(Feature):
    """The feature ``label_noise``: new noise on the labels in each epoch."""

    name = "label noise"

    def labels(self, batch: LabelledBatch, epoch: int, index: int) -> LabelledBatch:
        """The batch with noise, which depends on the seed and the place in the run alone."""
        energies = [name for name, own in self.trainer.objectives.items() if own.energy]
        seed = (self.trainer.training.seed, epoch, index)
        return add_label_noise(batch, energies, self.trainer.options.label_noise, seed)


def add_label_noise(
    batch: LabelledBatch, targets: Collection[str], noise: LabelNoise, seed: tuple[int, int, int]
) -> LabelledBatch:
    """The batch with noise on its energies and forces; stresses stay.

    Args:
        batch: with labels, NaN where a structure lacks one.
        targets: energies whose labels get noise.
        noise: standard deviations, eV/atom and eV/Angstrom.
        seed: of the run, the epoch and the batch; the noise depends on nothing else.
    """
    generator = torch_generator(*seed, Stream.NOISE)  # float64 whatever the labels are
    labels = dict(batch.labels)
    for target in sorted(targets):
        for name, width in ((target, noise.energy), (forces_key(target), noise.forces)):
            label, whole = labels.get(name), batch.whole
            known = label is not None if whole is None else name in whole.known
            if not known or not width:
                continue
            drawn = _normal(batch, name != target, generator)
            if label is not None:
                atoms = batch.graph.atoms_per_structure if name == target else 1.0
                labels[name] = label + width * atoms * drawn.to(label)
    return replace(batch, labels=labels)


def _normal(batch: LabelledBatch, of_forces: bool, generator: torch.Generator) -> Tensor:
    """Normal numbers for energies, [b], or forces, [n, 3]: for a part those of its whole."""
    whole, graph = batch.whole, batch.graph
    if whole is None:
        count = graph.num_atoms if of_forces else graph.num_structures
    else:
        count = int(whole.atoms.sum()) if of_forces else batch.size
    shape = (count, 3) if of_forces else (count,)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn if whole is None else drawn[whole.rows(of_forces)]


class TrackedOffset(Feature):
    """The feature ``track_energy_offset``: labels of energies follow the offset of the predictions.

    Any change of the weights moves all energies of a set together, much further than it changes
    their differences, so the gradient of the energies' loss is mostly that of their offset. The
    loss gets labels that are moved by a share of the running mean of the errors per atom, and
    learns the differences; the rest of the offset is trained as before.
    """

    name = "energy offset"

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Begin without an offset."""
        super().start(trainer, kept)
        self._targets = [name for name, own in trainer.objectives.items() if own.energy]
        self._offsets = torch.zeros(
            len(self._targets), dtype=torch.float64, device=trainer.model.device
        )
        self._sums = torch.zeros_like(self._offsets).repeat(2, 1)

    def labels(self, batch: LabelledBatch, epoch: int, index: int) -> LabelledBatch:
        """The batch with labels of energies moved by their share of the offset."""
        moved = dict(batch.labels)
        share = self.trainer.options.track_energy_offset
        for name, offset in zip(self._targets, self._offsets, strict=True):
            if name in moved:
                atoms = batch.graph.atoms_per_structure
                moved[name] = moved[name] + (share * offset * atoms).to(moved[name])
        return replace(batch, labels=moved)

    @torch.no_grad()
    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Nothing; the errors of the step are added up."""
        for index, name in enumerate(self._targets):
            label, prediction = step.batch.labels.get(name), step.predictions[name]
            if label is None or not isinstance(prediction, Prediction):
                continue
            errors = (prediction.energy - label) / step.batch.graph.atoms_per_structure
            self._sums[0, index] += errors.nansum()
            self._sums[1, index] += (~errors.isnan()).sum()
        return {}

    @torch.no_grad()
    def after_update(self, epoch: int) -> None:
        """Move the running mean towards that of the step, which is that of all processes."""
        sums, counts = total(self._sums)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), self._offsets)
        self._offsets.lerp_(means, _NEW)
        self._sums.zero_()

    def state(self) -> dict[str, Any]:
        """The offsets."""
        return {"offsets": self._offsets.cpu()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from saved offsets."""
        self._offsets.copy_(state["offsets"])
