"""The energies of the model that a run starts from, and their baselines before they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pet_finetune.config import Options
from pet_finetune.errors import ConfigError, did_you_mean
from pet_finetune.model import Potential

from .start import Start


@dataclass(frozen=True)
class FoundationEnergies:
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


def foundation_of(start: Start, options: Options) -> FoundationEnergies:
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
    return FoundationEnergies(known, own, sources, baselines)


def named_energy(targets: Mapping[str, object], foundation: FoundationEnergies, path: str) -> str:
    """The one target of a data set, which must be one of the foundation's energies.

    Raises:
        ConfigError: it is not; ``path`` is the option that names the data set.
    """
    (source,) = targets
    if source not in foundation.energies:
        raise ConfigError(
            f"{path}.targets: the starting model has no energy '{source}'."
            f"{did_you_mean(source, foundation.energies)} It has: "
            f"{', '.join(foundation.energies) or 'none'}. The name in the file is given with `key`."
        )
    return source
