"""Baselines and scales before a run starts: what counting atoms explains is taken out first."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from ase.data import chemical_symbols
from torch import Tensor

from pet_finetune.config import Options
from pet_finetune.config.training import BaselineOptions
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import Structure
from pet_finetune.errors import TrainingError
from pet_finetune.keys import forces_key
from pet_finetune.log import get_logger
from pet_finetune.model import Potential, fit_composition

from .property_baselines import fit_property, predicted

_logger = get_logger(__name__)

# Angstrom. Of 0.013, 0.04, 0.13 and 1 tried, 0.04 learned fastest: after 15 epochs from scratch
# on the shipped data the training forces were off by 561, 470, 541 and 595 meV/Angstrom.
_AMPLITUDE = 0.05


@dataclass(frozen=True)
class BaselineTable:
    """Baselines of one target before and after the fit.

    Attributes:
        target: its name.
        mode: how they were found.
        rows: symbol, atoms in the training set, baseline before (NaN for a new element), baseline
            after, in the unit.
        scale: what an output of 1 of the network stands for, in the unit.
        unit: of the target.
    """

    target: str
    mode: str
    rows: list[tuple[str, int, float, float]]
    scale: float
    unit: str = "eV"


def _counts(structures: Sequence[Structure], species: Sequence[int]) -> Tensor:
    """Atoms of each species in each structure, [n_structures, n_species]."""
    wanted = torch.tensor(species)
    return torch.stack([(s.numbers.unsqueeze(1) == wanted).sum(0) for s in structures])


def _predicted_energies(model: Potential, loader: Loader, target: str) -> Tensor:
    """Energies that the model predicts, baseline included, [n_structures] float64."""
    return predicted(model, loader, lambda batch: model.predict(batch, target, forces=False).energy)


def _given(options: Options, target: str, model: Potential, fitted: Tensor) -> Tensor:
    """Fitted baselines with those overridden that the options fix."""
    given = options.training.atomic_baseline.get(target)
    if given is None:
        return fitted
    if not isinstance(given, Mapping):
        return torch.full_like(fitted, float(given))
    values = fitted.clone()
    for number, energy in given.items():
        if number in model.species:
            values[model.species.index(number)] = energy
    return values


def _fit(
    options: Options,
    model: Potential,
    target: str,
    loader: Loader,
    mode: str,
    unknown: Tensor,
) -> tuple[Tensor, Tensor]:
    """New baselines, and the labels' energies less the baselines' share, eV a structure.

    ``unknown``, [n_species], marks elements that are new to the model: fitted in every mode.
    """
    structures = loader.structures
    labels = torch.stack(
        [s.labels.get(target, torch.tensor(math.nan, dtype=torch.float64)) for s in structures]
    ).reshape(-1)
    known = ~labels.isnan()
    counts = _counts(structures, model.species)
    old = model.composition.get(target).cpu()
    free = _free(options, model, target, mode, unknown)
    start = torch.zeros_like(old) if mode == "fit" else old
    if bool(known.any()) and bool(free.any()):
        # Fixed species leave the fit: their share goes to the other side.
        explained = counts.to(torch.float64) @ (_given(options, target, model, start) - start)
        if mode != "fit":
            explained = explained + _predicted_energies(model, loader, target)
        step = torch.zeros_like(old)
        ridge = _ridge(options.training.baseline.ridge, unknown & (mode != "fit"))
        step[free] = fit_composition(
            counts[known][:, free],
            (labels - explained)[known],
            ridge[free],
            counts[known].sum(1),
        )
        new = start + step
    else:
        new = old
    new = _given(options, target, model, new)
    return new, (labels - counts.to(torch.float64) @ new)[known]


def _free(options: Options, model: Potential, target: str, mode: str, unknown: Tensor) -> Tensor:
    """Which species' baselines are fitted, [n_species] bool."""
    free = unknown.clone() if mode in ("keep", "values") else torch.ones_like(unknown)
    fixed = options.training.atomic_baseline.get(target)
    for number in fixed if isinstance(fixed, Mapping) else ():
        if number in model.species:
            free[model.species.index(number)] = False
    return free


def _ridge(given: float, unknown: Tensor) -> Tensor:
    """The ridge of each species, [n_species].

    It holds known elements near the starting model's baselines. A new element has none worth
    holding on to, so a stronger ridge than the default does not count for it.
    """
    default = BaselineOptions().ridge
    ridge = torch.full(unknown.shape, given, dtype=torch.float64)
    return torch.where(unknown, ridge.clamp_max(default), ridge)


def _scale(options: Options, loader: Loader, target: str, left: Tensor) -> float:
    """The energy that an output of 1 of a new network stands for, eV.

    Forces say it best where there are any: their spread times the amplitude of a bond's
    vibration is what an atom's energy varies by, however alike the structures of the set are.
    Without forces it is the spread of the energies less the baselines.
    """
    given = options.training.fixed_scaling_weights.get(target)
    if given is not None:
        return float(given)
    if not options.training.scale_targets:
        return 1.0
    forces = [
        s.labels[forces_key(target)] for s in loader.structures if forces_key(target) in s.labels
    ]
    values = torch.cat(forces).flatten() * _AMPLITUDE if forces else left
    values = values[~values.isnan()]
    spread = float((values.to(torch.float64) ** 2).mean().sqrt()) if len(values) else 1.0
    return spread if spread > 1e-8 else 1.0


def prepare_baselines(
    options: Options,
    model: Potential,
    loader: Loader,
    targets: Sequence[str],
    fresh: Sequence[str],
    new_species: Collection[int] = (),
) -> list[BaselineTable]:
    """Set baselines and scales of a model for the training set, in place.

    Args:
        options: say how (``baseline``, ``atomic_baseline``, ``scale_targets``...).
        model: about to be trained.
        loader: of the training set.
        targets: those to train.
        fresh: those whose heads are new, and whose scale is therefore free to choose.
        new_species: elements new to the model, whose baselines are fitted in every mode.

    Returns:
        A table for each target, for the log.

    Raises:
        TrainingError: ``values`` was asked for and none are given.
    """
    tables = []
    unknown = torch.tensor([number in new_species for number in model.species])
    for target in targets:
        mode = options.baseline_mode()
        if mode == "refit" and target in fresh:
            mode = "fit"
        spec, given = model.target(target), target in options.training.atomic_baseline
        if mode == "values" and not given and spec.rank == 0:
            raise TrainingError(
                f"architecture.training.baseline.mode is 'values', but atomic_baseline names "
                f"none for '{target}'."
            )
        old = model.composition.get(target).cpu().clone()
        if spec.is_energy:
            new, left = _fit(options, model, target, loader, mode, unknown)
        else:
            free = _free(options, model, target, mode, unknown)
            ridge = _ridge(options.training.baseline.ridge, unknown & (mode != "fit"))
            fix = partial(_given, options, target, model)
            new, left = fit_property(model, spec, loader, mode != "fit", free, ridge, fix)
        if spec.rank == 0:
            model.composition.set(target, new)
        if target in fresh:
            model.scale.set(target, _scale(options, loader, target, left))
        elif target in options.training.fixed_scaling_weights:
            _logger.warning(
                "fixed_scaling_weights has no effect on '%s': its heads were trained with the "
                "scale of the starting model",
                target,
            )
        rows = [] if spec.rank else _rows(model, loader, old, new, new_species)
        scale = float(model.scale.get(target))
        # A stress is a virial, in eV, over a volume.
        unit = "eV" if spec.per_volume else spec.unit
        tables.append(BaselineTable(target, mode, rows, scale, unit))
    return tables


def _rows(
    model: Potential, loader: Loader, old: Tensor, new: Tensor, new_species: Collection[int]
) -> list[tuple[str, int, float, float]]:
    """The rows of a table; where a target has several values, one for each and each element."""
    atoms = _counts(loader.structures, model.species).sum(0).tolist()
    many = new.dim() > 1
    old = old.reshape(len(old), -1).expand(len(new), new.shape[1] if many else 1)
    return [
        (
            f"{chemical_symbols[z]} [{index}]" if many else chemical_symbols[z],
            int(count),
            math.nan if z in new_species else float(old[row, index]),
            float(after),
        )
        for row, (z, count) in enumerate(zip(model.species, atoms, strict=True))
        if count
        for index, after in enumerate(new[row].reshape(-1))
    ]
