"""Where a model errs: by structure, by element, by the size of the force."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from ase.data import chemical_symbols

from pet_finetune.data.predicted import Predicted

from .record import Quantity

_DRAWS = 1000
_BINS = 8
_FEWEST_IN_A_BIN = 5


def residuals(predicted: Predicted, quantity: Quantity, model: str) -> np.ndarray | None:
    """Prediction less label, [n_structures or n_atoms, ...]; energies per atom; NaN if unknown.

    Args:
        predicted: labels and predictions.
        quantity: what is compared.
        model: ``before`` or ``after``.
    """
    found, label = predicted.models.get(model, {}), predicted.labels.get(quantity.label)
    if label is None or quantity.label not in found:
        return None
    errors: np.ndarray = found[quantity.label].astype(np.float64) - label
    return errors / predicted.sizes if quantity.kind == "energy" else errors


def mean_known(values: np.ndarray) -> float:
    """Mean of the numbers that are known; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def by_structure(predicted: Predicted, quantity: Quantity, model: str) -> np.ndarray | None:
    """Mean absolute error within each structure, [n_structures], in eV and Å; NaN if unknown."""
    errors = residuals(predicted, quantity, model)
    if errors is None:
        return None
    index, count = predicted.structure_index, len(predicted.sizes)
    if len(errors) == count:
        rows = np.abs(errors).reshape(count, -1)
        known = np.isfinite(rows)
        return _ratio(np.where(known, rows, 0.0).sum(1), known.sum(1))
    rows = np.abs(errors).reshape(len(errors), -1)
    known = np.isfinite(rows)
    sums = np.bincount(index, np.where(known, rows, 0.0).sum(1), count)
    return _ratio(sums, np.bincount(index, known.sum(1), count))


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over counts; NaN where there is nothing to count."""
    means: np.ndarray = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return means


def ratio_interval(
    predicted: Predicted, quantity: Quantity, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the error after over the error before, from resampled structures.

    Structures are drawn with replacement, the same for both models (a paired percentile
    bootstrap, Efron and Tibshirani 1993), so it says how far the ratio depends on which
    structures happen to be in the set.

    Args:
        predicted: labels and predictions of both models.
        quantity: what is compared.
        seed: of the draws.

    Returns:
        None where a model's predictions are not there, or for fewer than 5 structures.
    """
    old = by_structure(predicted, quantity, "before")
    new = by_structure(predicted, quantity, "after")
    if old is None or new is None:
        return None
    known = np.isfinite(old) & np.isfinite(new)
    # A structure counts by its numbers, as in the errors of the whole set.
    weights = predicted.sizes[known] if quantity.kind == "forces" else np.ones(known.sum())
    if known.sum() < 5 or not np.any(old[known] > 0):
        return None
    rng, count = np.random.default_rng(seed), int(known.sum())
    both = weights * np.stack([old[known], new[known]])
    # One draw after the other: all at once would be gigabytes for a large set.
    sums = [both[:, rng.integers(count, size=count)].sum(1) for _ in range(_DRAWS)]
    before, after = np.array(sums).T
    low, high = np.percentile(after / np.maximum(before, 1e-300), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class AtomGroup:
    """Errors of a part of all atoms.

    Attributes:
        name: of the part.
        count: atoms.
        size: mean length of the reference forces, eV/Å.
        errors: mean absolute error by model, eV/Å.
    """

    name: str
    count: int
    size: float
    errors: dict[str, float]


def by_element(predicted: Predicted, quantity: Quantity) -> list[AtomGroup]:
    """Force errors of each element, by atomic number."""
    numbers = np.unique(predicted.numbers)
    masks = {chemical_symbols[number]: predicted.numbers == number for number in numbers}
    return _parts(predicted, quantity, masks)


def by_magnitude(predicted: Predicted, quantity: Quantity) -> list[AtomGroup]:
    """Force errors in bins of the length of the reference force, each with as many atoms."""
    sizes = np.linalg.norm(predicted.labels[quantity.label], axis=1)
    known = sizes[np.isfinite(sizes)]
    bins = min(_BINS, len(known) // _FEWEST_IN_A_BIN)
    if bins < 2:
        return []
    edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)))
    masks = {}
    for number, (low, high) in enumerate(pairwise(edges.tolist()), 1):
        last = number == len(edges) - 1
        inside = (sizes >= low) & ((sizes <= high) if last else (sizes < high))
        masks[f"{low:.2f} to {high:.2f}"] = inside
    return _parts(predicted, quantity, masks)


def _parts(
    predicted: Predicted, quantity: Quantity, masks: dict[str, np.ndarray]
) -> list[AtomGroup]:
    """Errors of the atoms that each mask chooses."""
    sizes = np.linalg.norm(predicted.labels[quantity.label], axis=1)
    errors = {
        model: np.abs(found)
        for model in predicted.models
        if (found := residuals(predicted, quantity, model)) is not None
    }
    return [
        AtomGroup(
            name,
            int(mask.sum()),
            mean_known(sizes[mask]),
            {model: mean_known(values[mask]) for model, values in errors.items()},
        )
        for name, mask in masks.items()
        if np.isfinite(sizes[mask]).any()
    ]
