"""Replay: a loss on structures that the foundation knows, added to each batch.

Replayed data against forgetting: A. Robins, Connection Science 7, 123 (1995), where the network
labels what it replays ("pseudorehearsal"). The structures that all features of this room look at
are read, checked and kept in a file here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.config.run_options import Options
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.epochs import distorted
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.data.loader import Loader
from pet_finetune.data.readers import PROBE, probe_structures, read_structures
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.data.structure_sets import sampled
from pet_finetune.errors import ConfigError, DataError
from pet_finetune.inspection.near_frames import most_different
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.rng import Stream
from pet_finetune.terminal import Watch
from pet_finetune.training.extend import check_known
from pet_finetune.training.feature import Feature, Plan, Step, TrainingRun
from pet_finetune.training.objectives import Objective, batch_loss, loss_stage
from pet_finetune.training.sets import label_with, objective_of, relabelled
from pet_finetune.training.starting_model import FoundationEnergies, named_energy

_logger = get_logger(__name__)
#: The name that stands for the run's own training set.
TRAINING = "training"


def known_foundation(plan: Plan) -> FoundationEnergies:
    """The foundation of a run that has one."""
    assert plan.foundation is not None, "a run from scratch has no foundation to keep"
    return plan.foundation


def read_labelled(data: DatasetOptions, model: Potential) -> list[Structure]:
    """Labelled structures of a file, all of which the model can compute.

    Raises:
        DataError: the file is missing or lacks labels.
        SpeciesError: elements that the model does not know.
    """
    structures = list(sampled(read_structures(data), data.systems.read_from))
    check_known(structures, model)
    return structures


def read_unlabelled(names: Sequence[str], plan: Plan, section: str) -> list[Structure]:
    """Structures from all places named; labels that files have are left behind.

    Args:
        names: files, ``training`` for the training set, or ``probe`` for the set that ships.
        plan: of the run.
        section: of ``architecture.training.finetune`` that names them, for messages.

    Raises:
        DataError: a file is missing, or there is no structure in the end.
        SpeciesError: elements that the model does not know.
    """
    structures: list[Structure] = []
    for name in names:
        if name == TRAINING:
            structures += sampled(plan.training, section)
        elif name == PROBE:
            structures += probe_structures(known_foundation(plan).species)
        else:
            found = [
                atoms_to_structure(atoms, i, source=name)
                for i, atoms in enumerate(read_frames(name))
            ]
            check_known(found, plan.start.model)
            structures += found
    if not structures:
        raise DataError(
            f"architecture.training.finetune.{section}.structures: no structure of the probe set "
            "has none but the model's elements. Name `training` or a file instead."
        )
    return structures


def chosen(structures: list[Structure], most: int | None, section: str) -> list[Structure]:
    """At most so many of the structures, the most different ones; None for all."""
    if most is None or len(structures) <= most:
        return structures
    with Watch(f"{section}: choosing {most} of {len(structures)} structures"):
        kept = most_different(structures, most)
    _logger.info(
        "%s: %d of %d structures, the most different ones", section, len(kept), len(structures)
    )
    return kept


def sample(structures: list[Structure], most: int, seed: int) -> list[Structure]:
    """At most so many of the structures, drawn by a seed, in their order."""
    if len(structures) <= most:
        return structures
    chosen = np.random.default_rng([seed, Stream.SAMPLE]).permutation(len(structures))[:most]
    return [structures[index] for index in sorted(chosen.tolist())]


def as_plain(structures: Iterable[Structure]) -> list[dict[str, Any]]:
    """Structures as tensors and plain values, for a file."""
    names = [field.name for field in fields(Structure)]
    return [
        {**{name: getattr(s, name) for name in names}, "labels": dict(s.labels)} for s in structures
    ]


def from_plain(values: Iterable[Mapping[str, Any]]) -> tuple[Structure, ...]:
    """The opposite of :func:`as_plain`."""
    return tuple(Structure(**one) for one in values)


class Keeping(Feature):
    """A feature that keeps, to the end of a run, what it made of the foundation at its start.

    It does nothing where :meth:`_made` gives nothing.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._kept: dict[str, Any] | None = None

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Make what is kept, or take it as it was kept."""
        super().start(trainer, kept)
        self._kept = dict(kept) if kept else self._made(trainer.model)

    def _made(self, model: Potential) -> dict[str, Any] | None:
        raise NotImplementedError

    def kept(self) -> dict[str, Any] | None:
        """Data made at the start."""
        return self._kept


@dataclass(frozen=True)
class ReplayHead:
    """Through which head what is replayed: ``target`` in the new model, ``source`` in the old."""

    target: str
    source: str


def choose_head(options: Options, foundation: FoundationEnergies) -> ReplayHead | None:
    """Decide on the head of the replayed structures; None without replay.

    Where all weights train, the foundation's head stays in the model and is replayed beside that
    of the user's data. The other methods have a place for the heads of trained targets only: there
    it is the one that began as the foundation's.

    Raises:
        ConfigError: the foundation has no such energy, or no head of it is left.
    """
    finetune = options.finetune
    if finetune.replay is None:
        return None
    path = "architecture.training.finetune.replay"
    if finetune.replay.read_from is not None:
        source = named_energy(finetune.replay.read_from.targets, foundation, f"{path}.read_from")
    else:
        known = list(dict.fromkeys(foundation.sources.values()))
        if not known:
            raise ConfigError(
                f"{path}: no head of the new model begins as one of the foundation's, so there is "
                "none to replay. Name the head to begin with in finetune.inherit_heads."
            )
        source = known[0]
    if finetune.method == "full":
        return ReplayHead(source, source)
    heads = foundation.heads_of(source)
    if not heads:
        raise ConfigError(
            f"{path}: the head of '{source}' is not part of the new model: with method "
            f"{finetune.method} only heads of trained targets are, and none begins as that one. "
            "Use method full, or replay data of another target."
        )
    return ReplayHead(heads[0], source)


class ReplayLoss:
    """The loss of replayed structures, weighted.

    Args:
        model: is trained.
        beside: draws the structures that go with a batch.
        objective: what is asked of them.
        weight: factor of their loss.
        options: ``architecture.training``, whose ``loss_schedule`` holds for them too.
    """

    def __init__(
        self,
        model: Potential,
        beside: Beside,
        objective: Objective,
        weight: float,
        options: TrainingOptions,
    ) -> None:
        self.model, self.beside, self.weight = model, beside, weight
        self.objective, self._options = objective, options
        self._wanted = {objective.target: (objective.forces, objective.stress)}

    def __call__(self, step: Step) -> Tensor:
        """The weighted loss of the replayed structures, a scalar."""
        replayed = self.beside.batch(step.epoch, step.index).to(self.model.device, self.model.dtype)
        predictions = self.model.predict_many(replayed.graph, self._wanted, create_graph=True)
        objective = self.objective.at(loss_stage(self._options, step.epoch))
        return self.weight * batch_loss(replayed, predictions, {objective.target: objective})


class ReplayFeature(Keeping):
    """The feature ``finetune.replay``.

    It is :class:`ReplayLoss` of a file, or of structures that the starting model labels itself.
    """

    name = "replay"
    shared = True

    def __init__(self) -> None:
        super().__init__()
        self._structures: list[Structure] = []
        self._head: ReplayHead | None = None
        self._loss: ReplayLoss | None = None

    def check(self, plan: Plan) -> None:
        """Read the structures and choose their head."""
        replay = plan.options.finetune.replay
        if plan.foundation is None or replay is None:
            return
        self._plan = plan
        self._head = choose_head(plan.options, plan.foundation)
        if replay.read_from is not None:
            structures = read_labelled(replay.read_from, plan.start.model)
        else:
            structures = read_unlabelled(replay.structures, plan, "replay")
            if TRAINING in replay.structures:
                structures += distorted(
                    sampled(plan.training, "replay"),
                    replay.copies,
                    replay.rattle,
                    replay.strain,
                    plan.seed,
                )
        self._structures = chosen(structures, replay.max_structures, "replay")

    @property
    def heads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The head that is replayed, which has to stay in the model."""
        return () if self._head is None else (self._head.target,)

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Label the structures, or take them as they were kept."""
        super().start(trainer, kept)
        model, options = trainer.model, trainer.options
        if self._kept is None:
            return
        structures = from_plain(self._kept["structures"])
        loader = Loader(
            structures,
            model.cutoff,
            batch_size=1,
            augment=options.rotational_augmentation,
            seed=trainer.training.seed,
            dtype=model.dtype,
        )
        beside = Beside(loader, trainer.training, self._kept["fraction"])
        objective = objective_of(options, model, self._kept["target"], loader.label_names)
        self._loss = ReplayLoss(model, beside, objective, self._kept["weight"], options)

    def _made(self, model: Potential) -> dict[str, Any] | None:
        """The labelled structures, their target, fraction and weight."""
        if self._plan is None or self._head is None:
            return None
        replay, target = self._plan.options.finetune.replay, self._head.target
        assert replay is not None, "a run without finetune.replay replays nothing"
        structures: Sequence[Structure]
        if replay.read_from is not None:
            shifts = {target: known_foundation(self._plan).shift(model, target)}
            structures = relabelled(self._structures, self._head.source, shifts, model.species)
        else:
            structures = label_with(model, self._structures, [target])
        size = self._plan.options.training.batch
        beside = f"{number_beside(size, replay.fraction)} beside each batch of {size}"
        if self._plan.options.training.max_atoms_per_batch is not None:
            beside = f"{replay.fraction:g} of the structures of each step"
        _logger.info(
            "replay: %d structures %s for '%s'; %s, weight %g",
            len(structures),
            f"of {replay.read_from.systems.read_from}"
            if replay.read_from is not None
            else f"({', '.join(replay.structures)}) labelled by the starting model",
            target,
            beside,
            replay.weight,
        )
        return {
            "structures": as_plain(structures),
            "target": target,
            "fraction": replay.fraction,
            "weight": replay.weight,
        }

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The loss of the replayed structures."""
        return {} if self._loss is None else {self.name: self._loss(step)}


def number_beside(own: int, fraction: float) -> int:
    """Number of structures that are ``fraction`` of all with ``own`` others; at least one."""
    return max(1, round(own * fraction / (1.0 - fraction)))


class Beside:
    """Draws replayed structures for each batch of another loader.

    The second set is gone through in a new random order again and again, so that its structures
    occur equally often. What is drawn is a function of the seed, the epoch and the batch.
    """

    def __init__(self, loader: Loader, main: Loader, fraction: float) -> None:
        """Prepare to draw.

        Args:
            loader: of the second set; its batch size and order do not count.
            main: the loader whose batches are accompanied.
            fraction: part of a step's structures that come from the second set, above 0, below 1.
        """
        self.loader, self.main, self.fraction = loader, main, fraction
        self._epoch = -1
        self._plan: list[np.ndarray] = []

    def batch(self, epoch: int, batch: int) -> LabelledBatch:
        """Replayed structures for one batch of the main loader; both count from 0."""
        if epoch != self._epoch:
            sizes = [number_beside(own, self.fraction) for own in self.main.batch_sizes(epoch)]
            order = self._order(epoch, sum(sizes))
            self._epoch, self._plan = epoch, np.split(order, np.cumsum(sizes)[:-1])
        return self.loader.collate(self._plan[batch], epoch, self.main.shares)

    def _order(self, epoch: int, count: int) -> np.ndarray:
        """Members of the second set, one permutation after the other, ``[count]``."""
        rng = np.random.default_rng([self.loader.seed, epoch, Stream.REPLAY])
        size = len(self.loader.structures)
        rounds: Sequence[np.ndarray] = [rng.permutation(size) for _ in range(-(-count // size))]
        return np.concatenate(rounds)[:count]
