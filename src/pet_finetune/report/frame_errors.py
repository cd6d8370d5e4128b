"""Errors by structure, element and size of the force; the worst structures."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from ase.utils import rotate

from pet_finetune.data.predicted import Predicted

from .run_record import Quantity

_DRAWS = 1000
_BINS = 8
_FEWEST_IN_A_BIN = 5


def residuals(predicted: Predicted, quantity: Quantity, model: str) -> np.ndarray | None:
    """Prediction less label, [n_structures or n_atoms, ...]; energies per atom; NaN if unknown."""
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
    count = len(predicted.sizes)
    index = np.arange(count) if len(errors) == count else predicted.structure_index
    rows = np.abs(errors).reshape(len(errors), -1)
    known = np.isfinite(rows)
    sums = np.bincount(index, np.where(known, rows, 0.0).sum(1), count)
    counts = np.bincount(index, known.sum(1), count)
    means: np.ndarray = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return means


def ratio_interval(predicted: Predicted, quantity: Quantity) -> tuple[float, float] | None:
    """95 % interval of the error after over the error before, from resampled structures.

    Structures are drawn with replacement, the same for both models (a paired percentile
    bootstrap, Efron and Tibshirani 1993), so it says how far the ratio depends on which
    structures happen to be in the set.

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
    rng, count = np.random.default_rng(0), int(known.sum())
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


#: Structures in the view, and the atoms of the largest that is worth its place in the file.
MOST_FRAMES = 8
MOST_ATOMS = 1500
# Of the sum of the covalent radii: two atoms closer than that are drawn with a bond, also where
# it is stretched as in hot MD.
_BOND = 1.25
# The longest arrow of a view: at least so many Å, and this part of what is seen.
_LONGEST, _LONGEST_PART = 2.2, 0.15
#: From a structure's axes to those of the still picture; the last one points at the reader.
_VIEW = rotate("20x,-30y")


def frames_of(
    predicted: Predicted, worst: list[int], forces: Quantity | None, captions: list[str]
) -> list[dict[str, Any]]:
    """Structures as plain values with short names, to keep the file small.

    Args:
        predicted: all structures.
        worst: which to show.
        forces: whose errors are drawn as arrows; None for no arrows.
        captions: a line for each.

    Returns:
        For each structure the name, the caption, atomic numbers ``z``, positions ``x`` (Å, from the
        centre), cell vectors ``cell`` from the corner ``o``, bonds ``b``, of each model the force
        errors ``e`` (eV/Å), and how many Å are drawn for an eV/Å, ``scale``.
    """
    errors = {}
    for model in ("before", "after") if forces is not None else ():
        found = residuals(predicted, forces, model)  # type: ignore[arg-type]
        if found is not None:
            errors[model] = np.nan_to_num(found)
    frames = []
    starts = predicted.starts
    for index, caption in zip(worst, captions, strict=True):
        atoms = slice(int(starts[index]), int(starts[index + 1]))
        positions = predicted.positions[atoms].astype(np.float64)
        cell = predicted.cells[index].astype(np.float64)
        periodic = bool(predicted.pbc[index].all())
        bonds = _bonds(predicted.numbers[atoms], positions)
        if periodic:
            positions = _gathered(positions, cell, bonds)
        corner = np.zeros(3)
        centre = cell.sum(0) / 2 if periodic else (positions.min(0) + positions.max(0)) / 2
        of_frame = {model: values[atoms] for model, values in errors.items()}
        largest = max((float(np.abs(v).max()) for v in of_frame.values()), default=0.0)
        longest = max(_LONGEST, _LONGEST_PART * float(np.ptp(positions, axis=0).max()))
        frames.append(
            {
                "name": predicted.where(index),
                "caption": caption,
                "z": predicted.numbers[atoms].tolist(),
                "x": _flat(positions - centre),
                "b": bonds.reshape(-1).tolist(),
                "cell": _flat(cell) if periodic else None,
                "o": _flat(corner - centre),
                "e": {model: _flat(values) for model, values in of_frame.items()},
                "scale": round(longest / largest, 4) if largest > 0 else 0.0,
            }
        )
    return frames


def elements_of(frames: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """Symbol, colour (Jmol's, from ASE) and drawn radius (Å) of each element in the frames."""
    elements = {}
    for z in sorted({z for frame in frames for z in frame["z"]}):
        red, green, blue = (round(255 * float(part)) for part in jmol_colors[z])
        radius = round(0.25 + 0.35 * float(covalent_radii[z]), 3)
        elements[z] = [chemical_symbols[z], f"#{red:02x}{green:02x}{blue:02x}", radius]
    return elements


def _flat(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values.reshape(-1)]


def _gathered(positions: np.ndarray, cell: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """Positions with whole molecules moved into the cell, as far as MD may have carried them."""
    first, second = bonds.T
    member, before = np.arange(len(positions)), np.array([])
    while not np.array_equal(member, before):  # the smallest number spreads over a molecule
        before = member.copy()
        np.minimum.at(member, first, member[second])
        np.minimum.at(member, second, member[first])
    sizes = np.maximum(np.bincount(member, minlength=len(positions)), 1)
    centres = np.stack([np.bincount(member, x, len(sizes)) / sizes for x in positions.T], axis=1)
    # A little below zero is rounding, not another cell.
    shifts = np.floor(centres @ np.linalg.inv(cell) + 1e-6)
    gathered: np.ndarray = positions - (shifts @ cell)[member]
    return gathered


def _bonds(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Pairs of atoms closer than a bond, [n_bonds, 2]; images do not count."""
    radii = covalent_radii[numbers]
    lengths = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    first, second = np.nonzero(np.triu(lengths < _BOND * (radii[:, None] + radii[None]), 1))
    pairs: np.ndarray = np.stack([first, second], axis=1)
    return pairs


def still(frame: dict[str, Any], elements: dict[int, list[Any]]) -> str:
    """A frame as SVG, as it is seen before anyone turns it."""
    points = np.array(frame["x"]).reshape(-1, 3) @ _VIEW.T
    errors = frame["e"].get("after") or frame["e"].get("before")
    tips = points
    if errors:
        tips = points + frame["scale"] * np.array(errors).reshape(-1, 3) @ _VIEW.T
    shown = np.concatenate([points, tips])[:, :2]
    low, high = shown.min(0) - 1.0, shown.max(0) + 1.0
    parts = []
    pairs = np.array(frame["b"], dtype=int).reshape(-1, 2)
    for a, b in pairs:
        (x1, y1, _), (x2, y2, _) = points[a], points[b]
        parts.append(f'<path class="bond" d="M{x1:.2f} {-y1:.2f}L{x2:.2f} {-y2:.2f}"/>')
    for atom in np.argsort(points[:, 2]):
        _, colour, radius = elements[frame["z"][atom]]
        x, y, _ = points[atom]
        parts.append(f'<circle cx="{x:.2f}" cy="{-y:.2f}" r="{radius}" fill="{colour}"/>')
    if errors:
        for (x1, y1, _), (x2, y2, _) in zip(points, tips, strict=True):
            parts.append(f'<path class="arrow" d="M{x1:.2f} {-y1:.2f}L{x2:.2f} {-y2:.2f}"/>')
    width, height = high - low
    view = f"{low[0]:.2f} {-high[1]:.2f} {width:.2f} {height:.2f}"
    name = html.escape(frame["name"])
    return (
        f'<svg class="still" viewBox="{view}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )
