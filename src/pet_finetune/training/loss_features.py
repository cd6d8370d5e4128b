"""Features that change the loss: noise and offsets of labels, agreement of rotated structures.

PET learns from rotated structures that energies do not change and forces rotate along (Pozdnyakov
and Ceriotti, arXiv:2305.19302). What is left of the difference between orientations is noise in MD
(Langer, Pozdnyakov and Ceriotti, arXiv:2406.17747), and can be asked for directly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pet_finetune.config.training import LabelNoise
from pet_finetune.data.epochs import random_rotations, rotate_batch
from pet_finetune.data.labelled_batch import LabelledBatch, on_device
from pet_finetune.graph import Batch, rotate_graphs
from pet_finetune.keys import forces_key, label_kind
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, evaluating
from pet_finetune.rng import Stream, torch_generator

from .feature import Feature, Step, TrainingRun
from .metrics import labelled_values
from .objectives import batch_loss, derivatives, objectives_at
from .optimizer import share_of_average
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
    learns the differences; the rest of the offset is trained as before. The model that is validated
    and saved has the offset in its baselines: of averaged weights the average of their offsets.
    """

    name = "energy offset"
    sums: Tensor

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Begin without an offset."""
        super().start(trainer, kept)
        self._targets = [name for name, own in trainer.objectives.items() if own.energy]
        self._offsets = torch.zeros(
            len(self._targets), dtype=torch.float64, device=trainer.model.device
        )
        self._averaged, self._updates = self._offsets.clone(), 0
        self.sums = torch.zeros_like(self._offsets).repeat(2, 1)

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
            self.sums[0, index] += errors.nansum()
            self.sums[1, index] += (~errors.isnan()).sum()
        return {}

    @torch.no_grad()
    def after_update(self, epoch: int) -> None:
        """Move the running mean towards that of the step, which is that of all processes."""
        sums, counts = total(self.sums)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), self._offsets)
        self._offsets.lerp_(means, _NEW)
        self.sums.zero_()
        share = share_of_average(self.trainer.options, epoch, self._updates)
        self._averaged.lerp_(means, share)
        self._updates += share > 0

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Baselines without the offset, unless the options fix them."""
        if not self.trainer.options.baselines_follow:
            yield
            return
        offsets = self._averaged if self._updates else self._offsets
        own = [self.trainer.model.composition.get(name) for name in self._targets]
        before = [baselines.clone() for baselines in own]
        for baselines, offset in zip(own, offsets, strict=True):
            baselines -= offset
        try:
            yield
        finally:
            for baselines, values in zip(own, before, strict=True):
                baselines.copy_(values)

    def state(self) -> dict[str, Any]:
        """The offsets, their average and the number of updates in it."""
        offsets, averaged = self._offsets.cpu(), self._averaged.cpu()
        return {"offsets": offsets, "averaged": averaged, "updates": self._updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from saved offsets; earlier runs had no average of them."""
        self._offsets.copy_(state["offsets"])
        self._averaged.copy_(state.get("averaged", self._offsets))
        self._updates = state.get("updates", 0)


class RotationalAgreement(Feature):
    """The feature ``rotational_consistency``: rotated structures in addition to each batch.

    Their labels are what was just said of them. A rotated structure counts ``weight`` times as much
    as a labelled one: the loss is a mean over the rotated ones times their share of the batch.
    Without the share, a few structures with a large weight have most of the gradient, and its noise
    spoils the training. Types and weights, and ``loss_schedule``, are those of the run.

    The gradient goes through the second orientation alone. Over many steps each of the two has
    that place as often, so it points where the gradient through both would, at half the length
    and little more than half the price.
    """

    name = "rotations"
    shared = True

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The weighted loss of the rotated structures."""
        trainer = self.trainer
        consistency = trainer.options.rotational_consistency
        assert consistency is not None, "the run does not ask for it"
        count = math.ceil(consistency.fraction * step.batch.size)
        own = {
            key: values.detach()
            for target, prediction in step.predictions.items()
            for key, _, values, _ in labelled_values(target, prediction)
        }
        said = _labelled(step.batch, own).first(count)
        rotations = self._rotations(step, count)
        if said.whole is not None:
            rotations = rotations[said.whole.rows(per_atom=False)]
        rotated = rotate_batch(said, rotations.to(said.graph.cells.device))
        wanted = derivatives(trainer.objectives)
        predictions = trainer.model.predict_targets(rotated.graph, wanted, create_graph=True)
        objectives = objectives_at(trainer.objectives, trainer.options, step.epoch)
        weight = consistency.weight * count / step.batch.size
        return {self.name: weight * batch_loss(rotated, predictions, objectives)}

    def _rotations(self, step: Step, count: int) -> Tensor:
        """Random rotations, equal on all processes and devices."""
        place = self.trainer.training.seed, step.epoch, step.index
        return random_rotations(count, torch_generator(*place, Stream.CONSISTENCY))


def _labelled(batch: LabelledBatch, labels: dict[str, Tensor]) -> LabelledBatch:
    """A batch with other labels, all of whose numbers are known."""
    whole = batch.whole
    if whole is not None:
        known = {}
        for name, label in labels.items():
            rows = whole.atoms if label_kind(name, batch.kinds).per_atom else 1
            known[name] = np.full(len(whole.atoms), math.prod(label.shape[1:])) * rows
        whole = replace(whole, known=known)
    return replace(batch, labels=labels, whole=whole)


@dataclass(frozen=True)
class Spread:
    """Mean absolute deviation from the mean over the orientations.

    Attributes:
        energy: eV/atom.
        forces: of components in the structure's own frame, eV/Angstrom.
    """

    energy: float
    forces: float


def rotational_spread(
    model: Potential, batches: Iterable[LabelledBatch], target: str, count: int, seed: int = 0
) -> Spread:
    """Turn (and maybe mirror) each structure at random, and compare what is predicted.

    Args:
        model: is put into evaluation mode, and back.
        batches: any device and dtype; moved to the model's.
        target: which energy.
        count: orientations of each structure, at least two.
        seed: of the orientations.
    """
    generator = torch.Generator().manual_seed(seed)
    sums, structures, components = [0.0, 0.0], 0, 0
    with evaluating(model):
        for batch in on_device(batches, model.device, model.dtype):
            energies, forces = _in_orientations(model, batch.graph, target, count, generator)
            sums[0] += _deviation(energies / batch.graph.atoms_per_structure)
            sums[1] += _deviation(forces)
            structures += batch.graph.num_structures
            components += forces[0].numel()
    return Spread(sums[0] / structures, sums[1] / components)


def _in_orientations(
    model: Potential, batch: Batch, target: str, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Energies [count, structures] and forces rotated back [count, atoms, 3]."""
    energies, forces = [], []
    for _ in range(count):
        rotations = random_rotations(batch.num_structures, generator).to(batch.cells)
        said = model.predict(rotate_graphs(batch, rotations), target)
        assert said.forces is not None
        energies.append(said.energy)
        back = rotations.transpose(1, 2)[batch.structure_index]
        forces.append((back @ said.forces.unsqueeze(-1)).squeeze(-1))
    return torch.stack(energies), torch.stack(forces)


def _deviation(values: Tensor) -> float:
    """Sum over all but the first axis of the mean absolute deviation along the first."""
    return float((values - values.mean(0)).abs().mean(0).sum())
