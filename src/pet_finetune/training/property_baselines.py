"""Baselines of targets that are no energies, fitted as metatrain does.

A scalar of structures is a sum over species, found by least squares; a scalar of atoms has the
mean of each species. Vectors and tensors have none: one would not turn with the structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pet_finetune.data.loader import Loader
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec
from pet_finetune.model import Potential, fit_composition

from .measure import counted


def fit_property(
    model: Potential,
    spec: TargetSpec,
    loader: Loader,
    shift: bool,
    free: Tensor,
    ridge: Tensor,
    fix: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """New baselines, and the labels less their share as the loss counts errors.

    Args:
        model: about to be trained.
        spec: a target that is no energy.
        loader: of the training set.
        shift: whether the baselines move by what the model's own predictions leave over, rather
            than start from nothing.
        free: [n_species], which of them are fitted.
        ridge: [n_species], see :func:`~pet_finetune.model.fit_composition`.
        fix: puts the baselines in that the options give.

    Returns:
        [n_species] or [n_species, num_subtargets]; [n_known] labels less the baseline.
    """
    species = model.composition.species_index.cpu()
    numbers = torch.cat([s.numbers for s in loader.structures])
    atoms = torch.tensor([s.num_atoms for s in loader.structures])
    volumes = torch.tensor([s.volume for s in loader.structures], dtype=torch.float64)
    labels = _labels(spec, loader)
    new = torch.zeros(0)
    left = labels
    if spec.rank == 0:
        owners = torch.arange(len(atoms)).repeat_interleave(atoms)
        rows = torch.arange(len(numbers)) if spec.per_atom else owners
        labels = labels.reshape(len(labels), -1)
        old = model.composition.get(spec.name).cpu().reshape(len(model.species), -1)
        start = old.expand(-1, spec.num_subtargets).clone() if shift else None
        if start is None:
            start = torch.zeros(len(model.species), spec.num_subtargets, dtype=torch.float64)

        def share(baselines: Tensor) -> Tensor:
            """Their part in each label, [n_labels, num_subtargets]."""
            return torch.zeros_like(labels).index_add(0, rows, baselines[species[numbers]])

        explained = share(fix(start) - start)
        if shift:
            values = predicted(
                model, loader, lambda batch: model.predict_property(batch, spec.name)
            )
            explained = explained + values.to(torch.float64).reshape(labels.shape)
        step = _step(spec, labels - explained, species[numbers], rows, free, ridge)
        new = fix(start + torch.where(free.unsqueeze(1), step, 0.0))
        left = labels - share(new)
        if spec.num_subtargets == 1:
            new = new.squeeze(1)
    left = counted(spec, left, atoms, volumes)
    return new, left[~left.isnan()]


def _labels(spec: TargetSpec, loader: Loader) -> Tensor:
    """All labels, [n_structures, ...] or [n_atoms, ...] float64, NaN where unknown."""
    parts = []
    for structure in loader.structures:
        rows = structure.num_atoms if spec.per_atom else 1
        unknown = torch.full((rows, *spec.shape), math.nan, dtype=torch.float64)
        parts.append(structure.labels.get(spec.name, unknown).reshape(unknown.shape))
    return torch.cat(parts)


def predicted(model: Potential, loader: Loader, ask: Callable[[Batch], Tensor]) -> Tensor:
    """What a model answers for a whole set, on the CPU, in the order of the loader.

    Args:
        model: in evaluation mode while it is asked.
        loader: of the set.
        ask: gives the answer for one batch, whose rows are joined.
    """
    parts = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in loader.view():
            parts.append(ask(batch.graph.to(model.device, model.dtype)).cpu())
    model.train(training)
    return torch.cat(parts)


def _step(
    spec: TargetSpec, left: Tensor, species: Tensor, rows: Tensor, free: Tensor, ridge: Tensor
) -> Tensor:
    """What the baselines gain, [n_species, num_subtargets], zero where nothing is known."""
    step = torch.zeros(len(free), spec.num_subtargets, dtype=torch.float64)
    for index, values in enumerate(left.unbind(1)):
        known = ~values.isnan()
        if spec.per_atom:
            count = torch.zeros(len(free), dtype=torch.float64)
            count = count.index_add(0, species, known.to(torch.float64))
            total = torch.zeros_like(count).index_add(0, species, values.nan_to_num(nan=0.0))
            step[:, index] = total / count.clamp_min(1.0)
        elif bool(known.any()) and bool(free.any()):
            one_hot = torch.nn.functional.one_hot(species, len(free))
            counts = torch.zeros(len(left), len(free), dtype=torch.int64)
            counts = counts.index_add(0, rows, one_hot)[known]
            step[free, index] = fit_composition(
                counts[:, free], values[known], ridge[free], counts.sum(1)
            )
    return step
