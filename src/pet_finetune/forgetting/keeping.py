"""Keeping what the foundation knew: what is made before the first step and used in a run."""

from __future__ import annotations

from collections.abc import Sequence

from pet_finetune.config import Options
from pet_finetune.data.loader import Loader
from pet_finetune.data.mixing import Beside, number_beside
from pet_finetune.data.species import find_species
from pet_finetune.data.structure import Structure
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.training.extra import ExtraLoss
from pet_finetune.training.labels import label_with, relabelled
from pet_finetune.training.loss import Objective

from .anchor import AnchorLoss, reference_weights
from .dimers import dimer_curves
from .fisher import fisher_information
from .kept import Kept, KeptAnchor, KeptDimers, KeptReplay, KeptRetention
from .memory import Memory
from .replay import ReplayLoss
from .retention import Retention

_logger = get_logger(__name__)


def make_kept(
    options: Options,
    memory: Memory | None,
    model: Potential,
    training: Sequence[Structure],
    fresh: Sequence[str],
    seed: int,
) -> Kept:
    """Labels, reference weights and curves of the starting model, its baselines refitted.

    Args:
        options: of the run.
        memory: what was read; None from scratch, where there is nothing to keep.
        model: about to be trained, adapters in place.
        training: the training set.
        fresh: targets whose heads are random.
        seed: of the run.
    """
    if memory is None:
        return Kept()
    return Kept(
        retention=_keep_retention(options, memory, model),
        replay=_keep_replay(options, memory, model),
        anchor=_keep_anchor(options, memory, model, fresh, seed),
        dimers=_keep_dimers(options, memory, model, training),
    )


def _keep_retention(options: Options, memory: Memory, model: Potential) -> KeptRetention | None:
    if not memory.retention:
        return None
    every = options.finetune.retention.interval(options.training.num_epochs)
    if memory.labelled_for:
        shifts = {target: memory.foundation.shift(model, target) for target in memory.compared}
        structures = relabelled(memory.retention, memory.labelled_for, shifts, model.species)
        labels = f"their labels of '{memory.labelled_for}'"
    else:
        structures = label_with(model, memory.retention, memory.compared)
        labels = "the starting model's own predictions"
    _logger.info(
        "forgetting: %s of %d structures (%s) compared with %s every %d epochs",
        " and ".join(f"'{target}'" for target in memory.compared),
        len(structures),
        structures[0].source,
        labels,
        every,
    )
    return KeptRetention(tuple(structures), memory.compared, every)


def _keep_replay(options: Options, memory: Memory, model: Potential) -> KeptReplay | None:
    replay, rehearsal = options.finetune.replay, memory.rehearsal
    if replay is None or rehearsal is None:
        return None
    target = rehearsal.target
    if replay.read_from is not None:
        shifts = {target: memory.foundation.shift(model, target)}
        structures = relabelled(memory.replayed, rehearsal.source, shifts, model.species)
    else:
        structures = label_with(model, memory.replayed, [target])
    size = options.training.batch_size
    beside = f"{number_beside(size, replay.fraction)} beside each batch of {size}"
    if options.training.max_atoms_per_batch is not None:
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
    return KeptReplay(tuple(structures), target, replay.fraction, replay.weight)


def _keep_anchor(
    options: Options, memory: Memory, model: Potential, fresh: Sequence[str], seed: int
) -> KeptAnchor | None:
    anchor = options.finetune.anchor
    if anchor is None:
        return None
    random = tuple(f"{path}." for target in fresh for path in model.network.head_modules(target))
    reference = {
        name: value
        for name, value in reference_weights(model).items()
        if not (random and name.startswith(random))
    }
    importance = None
    if anchor.type == "ewc":
        target = next(iter(memory.foundation.sources))
        objective = rehearsed_objective(options, model, target)
        importance = fisher_information(model, memory.weighed, objective, seed)
    _logger.info(
        "anchor: %s, strength %g%s",
        anchor.type,
        anchor.factor,
        f", Fisher information of {len(memory.weighed)} structures" if importance else "",
    )
    return KeptAnchor(reference, importance, anchor.factor)


def _keep_dimers(
    options: Options, memory: Memory, model: Potential, training: Sequence[Structure]
) -> KeptDimers | None:
    target = next(iter(memory.foundation.sources), None)
    if not options.final_eval or target is None:
        return None
    species = [z for z in find_species(training) if z in memory.foundation.species]
    return KeptDimers(target, dimer_curves(model, target, species))


def rehearsed_objective(options: Options, model: Potential, target: str) -> Objective:
    """What is asked of structures that the foundation knows: as of the user's own."""
    loss = options.training.loss_for(target)
    return Objective(
        target=target,
        loss=loss,
        forces=loss.forces_term().weight > 0,
        stress=loss.stress_term().weight > 0,
        scale=float(model.scale.get(target)),
        per_atom=target not in options.training.per_structure_targets,
    )


def extra_losses(
    options: Options, kept: Kept, model: Potential, training: Loader, seed: int
) -> list[ExtraLoss]:
    """The terms of replay and anchor for the trainer."""
    terms: list[ExtraLoss] = []
    if kept.replay is not None:
        objective = rehearsed_objective(options, model, kept.replay.target)
        loader = Loader(
            kept.replay.structures,
            model.cutoff,
            batch_size=1,
            augment=options.training.rotational_augmentation,
            seed=seed,
            dtype=model.dtype,
        )
        beside = Beside(loader, training, kept.replay.fraction)
        objective = _possible(objective, loader)
        terms.append(ReplayLoss(model, beside, objective, kept.replay.weight, options.training))
    if kept.anchor is not None:
        anchor = kept.anchor
        terms.append(AnchorLoss(model, anchor.reference, anchor.importance, anchor.strength))
    return terms


def _possible(objective: Objective, loader: Loader) -> Objective:
    """The objective without derivatives that no structure is labelled with."""
    labels, target = loader.label_names, objective.target
    return Objective(
        target=target,
        loss=objective.loss,
        forces=objective.forces and forces_key(target) in labels,
        stress=objective.stress and stress_key(target) in labels,
        scale=objective.scale,
        per_atom=objective.per_atom,
    )


def retention_of(kept: Kept, model: Potential) -> Retention | None:
    """The forgetting report of a run, ready to evaluate."""
    own = kept.retention
    return None if own is None else Retention(own.structures, own.targets, model, own.every)
