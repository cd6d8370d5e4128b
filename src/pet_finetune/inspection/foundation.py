"""Comparison of the labels with a foundation: units and outliers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pet_finetune.data.loader import Loader
from pet_finetune.data.neighbors import expected_neighbors
from pet_finetune.data.structure_sets import of_species
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import evaluating

from .evidence import Evidence
from .inspected import (
    Finding,
    InspectedDataset,
    InspectedFrame,
    element_fit,
    frames_of,
    rms,
    robust_spread,
)

#: Atoms asked for at once: less than a batch of any training, whose memory is thus enough.
_BATCH_ATOMS = 64
_SAME_PLACE = 1e-3
#: Pearson correlations above which a slope says something, and from which on it says it well.
_CORRELATED, _WELL = 0.7, 0.9
_FEWEST = 5
#: Edges times the width of the network, above which a structure takes more than about a GB.
_MOST_NUMBERS = 20_000_000
#: A residual must be so many robust standard deviations from the median, and so large.
_ROBUST, _ENERGY, _FORCE = 12.0, 0.03, 4.0
#: eV an atom, beyond which two sets of references differ.
_REFERENCES = 0.5


@dataclass(frozen=True, eq=False)
class FoundationPrediction:
    """Prediction of a foundation for a structure: eV, eV/Å, eV/Å³."""

    frame: InspectedFrame
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


def ask(
    model: Potential, target: str, dataset: InspectedDataset, seconds: float, species: Sequence[int]
) -> list[FoundationPrediction]:
    """Predict as many structures as there is time for, evenly spread over all of them.

    Args:
        model: it is not changed.
        target: the energy that is asked for.
        dataset: what is inspected.
        seconds: after which no further batch is begun.
        species: elements that the model was trained on; structures with others are left out, and
            those that are so large that they would take all memory.
    """
    # Atoms at one place have no direction between them, and no forces that are numbers.
    sound = [e for e in dataset.frames if float(e.nearest.min()) > _SAME_PLACE]
    by_structure = {id(e.structure): e for e in sound}
    sound = [e for e in sound if not _is_too_large(e, model)]
    structures = of_species([e.structure for e in sound], species)
    # Every prefix of this order is spread over the whole set.
    order = np.argsort((np.arange(len(structures)) * 0.6180339887498949) % 1.0, kind="stable")
    started = time.perf_counter()
    predictions: list[FoundationPrediction] = []
    chunk: list[int] = []
    with evaluating(model):
        for place, position in enumerate(order.tolist()):
            chunk.append(position)
            full = sum(structures[k].num_atoms for k in chunk) >= _BATCH_ATOMS
            if not full and place + 1 < len(order):
                continue
            frames = [by_structure[id(structures[k])] for k in chunk]
            predictions += _predict(model, target, frames)
            chunk = []
            if time.perf_counter() - started > seconds:
                break
    return predictions


def _is_too_large(frame: InspectedFrame, model: Potential) -> bool:
    """Whether predicting it would take more than about a GB."""
    near = expected_neighbors(frame.positions, frame.cell, frame.pbc, model.cutoff)
    near = near if frame.pbc.any() else min(frame.size - 1.0, near)
    return frame.size * near * model.hypers.d_pet >= _MOST_NUMBERS


def check_compared(model: Potential, dataset: InspectedDataset) -> Iterator[Finding]:
    """Frames that are too large to be compared with a foundation."""
    large = [e for e in dataset.frames if _is_too_large(e, model)]
    if large:
        yield Finding(
            "note",
            "not-compared",
            f"{len(large)} of {len(dataset.frames)} frames are not compared with the foundation: "
            f"they are too large for a look ({max(e.size for e in large):,} atoms)",
            frames_of(e.structure for e in large),
            "Their labels are checked without the foundation.",
            "Compare them with `pet-finetune eval`, on a machine with enough memory.",
            {"count": len(large)},
        )


def _predict(
    model: Potential, target: str, frames: Sequence[InspectedFrame]
) -> Iterator[FoundationPrediction]:
    structures = [e.structure for e in frames]
    loader = Loader(structures, model.cutoff, batch_size=len(structures), dtype=model.dtype)
    batch = next(iter(loader)).graph.to(device=model.device)
    stress = any(e.stress is not None for e in frames)
    prediction = model.predict(batch, target, forces=True, stress=stress)
    assert prediction.forces is not None
    energies = prediction.energy.detach().cpu().to(torch.float64).tolist()
    forces = prediction.forces.detach().cpu().to(torch.float64).numpy()
    stresses = None if prediction.stress is None else prediction.stress.detach().cpu().numpy()
    start = 0
    for place, frame in enumerate(frames):
        own = None if stresses is None or frame.stress is None else stresses[place]
        yield FoundationPrediction(frame, energies[place], forces[start : start + frame.size], own)
        start += frame.size


def units_of(predictions: Sequence[FoundationPrediction]) -> dict[str, list[Evidence]]:
    """Evidence of units from slopes of labels against predictions, by file."""
    files: dict[str, list[FoundationPrediction]] = {}
    for prediction in predictions:
        files.setdefault(prediction.frame.file, []).append(prediction)
    found = {}
    for file, own in files.items():
        pieces = (
            _slope_of([(a.frame.forces, a.forces) for a in own], "force", "forces"),
            _energy_slope(own),
            _slope_of([(a.frame.stress, a.stress) for a in own], "stress", "stresses"),
        )
        found[file] = [piece for piece in pieces if piece is not None]
    return found


def _slope(labels: np.ndarray, said: np.ndarray, quantity: str, name: str) -> Evidence | None:
    if not labels.any() or not said.any():
        return None
    correlation = float((labels * said).sum() / np.sqrt((labels**2).sum() * (said**2).sum()))
    if abs(correlation) < _CORRELATED:
        return None
    slope = float((labels * said).sum() / (said**2).sum())
    text = (
        f"the {name} are {slope:.3g} times those of the foundation (1 expected; correlation "
        f"{correlation:.2f})"
    )
    sigma = 0.25 if abs(correlation) > _WELL else 0.4
    log, sign = float(np.log(abs(slope))), int(np.sign(slope))
    return Evidence({quantity: -1.0}, log, sigma, text, sign, absolute=True)


def _slope_of(
    pairs: Sequence[tuple[np.ndarray | None, np.ndarray | None]], quantity: str, name: str
) -> Evidence | None:
    """Slope of labels against predictions, if both exist."""
    known = [(label, said) for label, said in pairs if label is not None and said is not None]
    if len(known) < _FEWEST:
        return None
    labels, said = (np.concatenate([p[k].ravel() for p in known]) for k in (0, 1))
    return _slope(labels, said, quantity, name)


def _energy_slope(predictions: Sequence[FoundationPrediction]) -> Evidence | None:
    """Slope of the energies after subtraction of a sum over elements."""
    labelled = [a for a in predictions if a.frame.energy is not None and a.frame.size > 1]
    elements = {int(z) for a in labelled for z in a.frame.elements[0]}
    if len(labelled) < _FEWEST + 3 * len(elements):
        return None
    *_, labels = element_fit([a.frame for a in labelled])
    said = _left(labelled, [a.energy for a in labelled])
    return _slope(labels, said, "energy", "differences of energies")


def _left(predictions: Sequence[FoundationPrediction], energies: Sequence[float]) -> np.ndarray:
    """Given energies less a sum over elements that is fitted to them, eV an atom."""
    values = [e / a.frame.size for e, a in zip(energies, predictions, strict=True)]
    return element_fit([a.frame for a in predictions], values)[2]


def baseline_shift(predictions: Sequence[FoundationPrediction]) -> float | None:
    """Median of labels less predictions, eV an atom: how far the references of the atoms differ."""
    off = [
        (a.frame.energy - a.energy) / a.frame.size
        for a in predictions
        if a.frame.energy is not None
    ]
    return float(np.median(off)) if off else None


def check_references(predictions: Sequence[FoundationPrediction], kept: bool) -> Iterator[Finding]:
    """Energies relative to other references than the foundation's, where its baselines stay."""
    shift = baseline_shift(predictions)
    if kept and shift is not None and abs(shift) > _REFERENCES:
        yield Finding(
            "warning",
            "references",
            f"the energies are {shift:+.4g} eV an atom away from those of the foundation, whose "
            "baselines are kept",
            (),
            "The network would have to learn the difference of the atomic references.",
            "Set baseline: {mode: refit} (the default), or take the references out of the labels.",
            {"shift": shift},
        )


def check_residuals(predictions: Sequence[FoundationPrediction]) -> Iterator[Finding]:
    """Frames whose labels are much further from the foundation than those of the others."""
    labelled = [a for a in predictions if a.frame.energy is not None and a.frame.size > 1]
    off: dict[int, tuple[str, FoundationPrediction]] = {}
    if len(labelled) >= 10:
        rest = [(a.frame.energy or 0.0) - a.energy for a in labelled]
        left = _left(labelled, rest)
        left -= np.median(left)
        limit = max(_ENERGY, _ROBUST * robust_spread(left))
        for prediction, value in zip(labelled, left.tolist(), strict=True):
            if abs(value) > limit:
                off[id(prediction)] = (f"energy {value:+.3g} eV an atom", prediction)
    forced = [(a, _force_error(a)) for a in predictions if a.frame.forces is not None]
    if len(forced) >= 10:
        logs = np.log([max(1e-6, relative) for _, relative in forced])
        middle = float(np.median(logs))
        spread = max(0.25, robust_spread(logs))
        for (prediction, _), log in zip(forced, logs.tolist(), strict=True):
            if log - middle > _FORCE * spread:
                text = f"forces {np.exp(log - middle):.0f} times as far off as usual"
                told = off.get(id(prediction))
                off[id(prediction)] = (f"{told[0]}, {text}" if told else text, prediction)
    if not off:
        return
    worst = next(iter(off.values()))
    yield Finding(
        "warning",
        "foundation-outliers",
        f"the labels of {len(off)} of {len(predictions)} frames are much further from the "
        f"foundation than the others' ({worst[1].frame.structure.where}: {worst[0]})",
        frames_of(prediction.frame.structure for _, prediction in off.values()),
        "A calculation in a wrong state, without convergence or with other settings; or "
        "structures unlike all that the foundation knows.",
        "Look at these frames first; repeat or remove wrong ones.",
        {"frames": {a.frame.structure.where: text for text, a in off.values()}},
    )


def _force_error(prediction: FoundationPrediction) -> float:
    """Root mean square error of the forces, over their size plus that of a thermal force."""
    assert prediction.frame.forces is not None
    return rms(prediction.forces - prediction.frame.forces) / (0.3 + rms(prediction.forces))
