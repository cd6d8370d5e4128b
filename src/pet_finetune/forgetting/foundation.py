"""What a run starts from, as far as it is to be remembered: its energies and their baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pet_finetune.config import Options
from pet_finetune.errors import ConfigError, did_you_mean
from pet_finetune.model import Potential
from pet_finetune.training.start import Start

_FINETUNE = "architecture.training.finetune"


@dataclass(frozen=True)
class Foundation:
    """The starting model's energies, before heads go and baselines move.

    Attributes:
        species: atomic numbers it knows, without those that were added to it.
        energies: those it predicts itself.
        sources: for each trained energy that began with a head of the foundation, which one.
        baselines: of all its energies and those in ``sources``, [n_species], eV.
    """

    species: tuple[int, ...]
    energies: tuple[str, ...]
    sources: dict[str, str]
    baselines: dict[str, Tensor]

    def heads_of(self, source: str) -> list[str]:
        """The trained energies that began with the head of ``source``."""
        return [target for target, own in self.sources.items() if own == source]

    def shift(self, model: Potential, target: str) -> Tensor:
        """By how much the baseline of an energy has moved since, [n_species], eV."""
        return model.composition.get(target).cpu() - self.baselines[target]


def foundation_of(start: Start, options: Options) -> Foundation:
    """Note what has to be known later; call it before anything of the model is changed."""
    model, added = start.model, {*start.fresh, *start.inherited}
    energies = [
        name
        for name, spec in model.targets.items()
        if spec.is_energy and not spec.per_atom and spec.num_outputs == 1
    ]
    own = tuple(name for name in energies if name not in added)
    sources = {
        target: start.inherited.get(target, target)
        for target in options.target_specs()
        if target in energies and target not in start.fresh
    }
    baselines = {name: model.composition.get(name).cpu().clone() for name in energies}
    known = tuple(z for z in model.species if z not in start.new_species)
    return Foundation(known, own, sources, baselines)


@dataclass(frozen=True)
class Rehearsal:
    """Through which head what is replayed: ``target`` in the new model, ``source`` in the old."""

    target: str
    source: str


def choose_rehearsal(options: Options, foundation: Foundation) -> Rehearsal | None:
    """Decide on the head of the replayed structures; None without replay.

    Where all weights train, the foundation's head stays in the model and is rehearsed beside that
    of the user's data. The other methods have a place for the heads of trained targets only: there
    it is the one that began as the foundation's.

    Raises:
        ConfigError: the foundation has no such energy, or no head of it is left.
    """
    finetune = options.finetune
    if finetune.replay is None:
        return None
    path = f"{_FINETUNE}.replay"
    if finetune.replay.read_from is not None:
        source = _named(finetune.replay.read_from.targets, foundation, f"{path}.read_from")
    else:
        known = list(dict.fromkeys(foundation.sources.values()))
        if not known:
            raise ConfigError(
                f"{path}: no head of the new model begins as one of the foundation's, so there is "
                "none to rehearse. Name the head to begin with in finetune.inherit_heads."
            )
        source = known[0]
    if finetune.method == "full":
        return Rehearsal(source, source)
    heads = foundation.heads_of(source)
    if not heads:
        raise ConfigError(
            f"{path}: the head of '{source}' is not part of the new model: with method "
            f"{finetune.method} only heads of trained targets are, and none begins as that one. "
            "Use method full, or replay data of another target."
        )
    return Rehearsal(heads[0], source)


def compared_targets(
    options: Options, foundation: Foundation, kept: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """The energies that the forgetting report compares, and the one whose labels it reads.

    Args:
        options: of the run.
        foundation: what it starts from.
        kept: heads of the foundation that stay in the model untrained-for by the user's data.

    Returns:
        Names of the new model's energies, none if there is nothing to compare with, and the
        foundation's energy that a retention file is labelled for (empty without a file).

    Raises:
        ConfigError: a retention file whose target the foundation or the new model lacks.
    """
    data = options.finetune.retention.read_from
    targets = tuple(dict.fromkeys([*foundation.sources, *kept]))
    if data is None:
        return targets, ""
    path = f"{_FINETUNE}.retention.read_from"
    source = _named(data.targets, foundation, path)
    targets = tuple(t for t in targets if foundation.sources.get(t, t) == source)
    if not targets:
        raise ConfigError(
            f"{path}.targets: no head of the new model begins as that of '{source}', so there is "
            "nothing to compare. Give data of the energy that the heads are inherited from."
        )
    return targets, source


def _named(targets: Mapping[str, object], foundation: Foundation, path: str) -> str:
    """The one target of a data set, which must be one of the foundation's energies."""
    (source,) = targets
    if source not in foundation.energies:
        raise ConfigError(
            f"{path}.targets: the starting model has no energy '{source}'."
            f"{did_you_mean(source, foundation.energies)} It has: "
            f"{', '.join(foundation.energies) or 'none'}. The name in the file is given with `key`."
        )
    return source
