"""Baselines and scales before a run starts: what counting atoms explains is taken out first."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from pet_finetune.config.run_options import Options
from pet_finetune.config.training import BaselineOptions
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import Structure
from pet_finetune.errors import TrainingError
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec, forces_key
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import evaluating
from pet_finetune.model.terms import fit_composition
from pet_finetune.terminal import Watch

from .metrics import counted

_logger = get_logger(__name__)
#: Atoms that are predicted at once, or a training batch if that has more: below, most of the time
#: goes into calling operators.
_MANY_ATOMS = 512
#: Structures that are predicted for the baselines: the mean of what the model leaves over is known
#: to some hundredths of its spread by then.
_ENOUGH = 2000

# Angstrom. Of 0.013, 0.04, 0.13 and 1 tried, 0.04 learned fastest: after 15 epochs from scratch
# on the shipped data the training forces were off by 561, 470, 541 and 595 meV/Angstrom.
_AMPLITUDE = 0.05


@dataclass(frozen=True)
class BaselineTable:
    """Baselines of one target before and after the fit.

    Attributes:
        target: its name.
        mode: how they were found.
        rows: symbol, atoms in the training set, baseline before (NaN if new) and after.
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


def _given(options: Options, target: str, model: Potential, fitted: Tensor) -> Tensor:
    """Fitted baselines with those overridden that the options fix."""
    given = options.training.stated_baselines.get(target)
    if given is None:
        return fitted
    if not isinstance(given, Mapping):
        return torch.full_like(fitted, float(given))
    values = fitted.clone()
    for number, energy in given.items():
        if number in model.species:
            values[model.species.index(number)] = energy
    return values


def _free(options: Options, model: Potential, target: str, mode: str, unknown: Tensor) -> Tensor:
    """Which species' baselines are fitted, [n_species] bool."""
    free = unknown.clone() if mode in ("keep", "values") else torch.ones_like(unknown)
    fixed = options.training.stated_baselines.get(target)
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
    """Energy scale of a new network, eV for an output of 1.

    Forces say it best where there are any: their spread times the amplitude of a bond's
    vibration is what an atom's energy varies by, however alike the structures of the set are.
    Without forces it is the spread of the energies less the baselines.
    """
    given = options.training.stated_scales.get(target)
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
        options: say how (``baseline``, ``atomic_baseline``, ``scale_targets``...), in numbers
            (:func:`~.starting_model.with_stated_numbers`).
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
        spec, given = model.target(target), target in options.training.stated_baselines
        if mode == "values" and not given and spec.rank == 0:
            raise TrainingError(
                f"architecture.training.baseline.mode is 'values', but atomic_baseline names "
                f"none for '{target}'."
            )
        old = model.composition.get(target).cpu().clone()
        free = _free(options, model, target, mode, unknown)
        ridge = _ridge(options.training.baseline.ridge, unknown & (mode != "fit"))
        fix = partial(_given, options, target, model)
        new, left = _fit(model, spec, loader, mode != "fit", free, ridge, fix)
        if spec.rank == 0:
            model.composition.set(target, new)
        if target in fresh:
            model.scale.set(target, _scale(options, loader, target, left))
        elif target in options.training.stated_scales:
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


def settled_rows(tables: Sequence[Mapping[str, Any]], model: Potential) -> list[dict[str, Any]]:
    """The tables of ``run.json`` with the baselines that a model has at the end of the run."""
    settled = []
    for table in tables:
        rows = table["rows"]
        if rows:  # in the order of the species; a target of several values has one for each
            symbols = {row[0].split()[0] for row in rows}
            known = [k for k, z in enumerate(model.species) if chemical_symbols[z] in symbols]
            values = model.composition.get(table["target"])[known].flatten().tolist()
            rows = [[*row[:3], value] for row, value in zip(rows, values, strict=True)]
        settled.append({**table, "rows": rows})
    return settled


def settled_baselines(model: Potential, loader: Loader, target: str, ridge: float) -> Tensor:
    """Baselines of an energy refitted to the model's residuals, [n_species] eV.

    Args:
        model: is asked in evaluation mode.
        loader: of the training set.
        target: the energy.
        ridge: keeps the baselines where the set does not tell elements apart.
    """
    free = torch.ones(len(model.species), dtype=torch.bool)
    ridges = _ridge(ridge, ~free)
    return _fit(model, model.target(target), loader, True, free, ridges, lambda fitted: fitted)[0]


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


def _fit(
    model: Potential,
    spec: TargetSpec,
    loader: Loader,
    shift: bool,
    free: Tensor,
    ridge: Tensor,
    fix: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """New baselines, and the labels less their share as the loss counts errors; energies whole.

    Args:
        model: about to be trained.
        spec: the target.
        loader: of the training set.
        shift: whether the baselines move by what predictions leave over, or start from nothing.
        free: [n_species], which of them are fitted.
        ridge: [n_species], see :func:`~pet_finetune.model.terms.fit_composition`.
        fix: puts the baselines in that the options give.

    Returns:
        [n_species] or [n_species, num_subtargets]; [n_known] labels less the baseline.
    """
    if shift:
        loader = loader.sampled(most=_ENOUGH, label=spec.name)
    structures = list(loader.structures)
    labels = _labels(spec, structures)
    new, left = torch.zeros(0), labels
    if spec.rank == 0:
        labels = labels.reshape(len(labels), -1)
        counts = _counts(structures, model.species)
        index = model.composition.species_index.cpu()[torch.cat([s.numbers for s in structures])]

        def share(baselines: Tensor) -> Tensor:
            """Their part in each label, [n_labels, num_subtargets]."""
            return baselines[index] if spec.per_atom else counts.to(torch.float64) @ baselines

        fits = bool((~labels.isnan()).any()) and bool(free.any())
        old = model.composition.get(spec.name).cpu().reshape(len(model.species), -1)
        start = old.expand(-1, spec.num_subtargets).clone()
        if fits and not shift:
            start = torch.zeros_like(start)
        # Fixed species leave the fit: their share goes to the other side.
        explained = share(fix(start) - start)
        if fits and shift:
            values = predicted(model, loader, partial(_answer, model, spec))
            explained = explained + values.to(torch.float64).reshape(labels.shape)
        step = torch.zeros_like(start)
        if fits:
            step = _step(spec, labels - explained, index, counts, free, ridge)
        new = fix(start + torch.where(free.unsqueeze(1), step, 0.0))
        left = labels - share(new)
        if spec.num_subtargets == 1:
            new = new.squeeze(1)
    if not spec.is_energy:
        atoms = torch.tensor([s.num_atoms for s in structures])
        volumes = torch.tensor([s.volume for s in structures], dtype=torch.float64)
        left = counted(spec, left, atoms, volumes)
    return new, left[~left.isnan()]


def _answer(model: Potential, spec: TargetSpec, batch: Batch) -> Tensor:
    """Prediction of a target, with its baseline."""
    if spec.is_energy:
        return model.predict(batch, spec.name, forces=False).energy
    return model.predict_property(batch, spec.name)


def _labels(spec: TargetSpec, structures: Sequence[Structure]) -> Tensor:
    """All labels, [n_structures, ...] or [n_atoms, ...] float64, NaN where unknown."""
    parts = []
    for structure in structures:
        rows = structure.num_atoms if spec.per_atom else 1
        unknown = torch.full((rows, *spec.shape), math.nan, dtype=torch.float64)
        parts.append(structure.labels.get(spec.name, unknown).reshape(unknown.shape))
    return torch.cat(parts)


def predicted(model: Potential, loader: Loader, ask: Callable[[Batch], Tensor]) -> Tensor:
    """Predictions for a whole set, on the CPU, in the order of the loader.

    Args:
        model: in evaluation mode while it is asked.
        loader: of the set.
        ask: gives the answer for one batch, whose rows are joined.
    """
    parts = []
    watch = Watch("predictions for the baselines", "structures", len(loader.structures))
    with evaluating(model), torch.no_grad(), watch:
        for batch in loader.view(max_atoms_per_batch=max(_MANY_ATOMS, loader.atoms_per_batch)):
            parts.append(ask(batch.graph.to(model.device, model.dtype)).cpu())
            watch.step(batch.graph.num_structures)
    return torch.cat(parts)


def _step(
    spec: TargetSpec, left: Tensor, index: Tensor, counts: Tensor, free: Tensor, ridge: Tensor
) -> Tensor:
    """Change of the baselines, [n_species, num_subtargets], zero where nothing is known."""
    step = torch.zeros(len(free), spec.num_subtargets, dtype=torch.float64)
    for column, values in enumerate(left.unbind(1)):
        known = ~values.isnan()
        if spec.per_atom:
            count = torch.zeros(len(free), dtype=torch.float64)
            count = count.index_add(0, index, known.to(torch.float64))
            total = torch.zeros_like(count).index_add(0, index, values.nan_to_num(nan=0.0))
            step[:, column] = total / count.clamp_min(1.0)
        elif bool(known.any()):
            some = counts[known]
            step[free, column] = fit_composition(
                some[:, free], values[known], ridge[free], some.sum(1)
            )
    return step
