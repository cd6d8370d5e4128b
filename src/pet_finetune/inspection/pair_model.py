"""A pair potential fitted to the forces of a file.

It says what energies and stresses go with the forces where no two frames are near each other. It is
crude: a few Gaussians of the distance over the sum of the covalent radii. It is
right within a factor of about two, where a wrong unit makes one of twenty or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase.data import covalent_radii
from scipy.sparse import csc_matrix

from pet_finetune.data.neighbors import expected_neighbors, find_pairs

from .evidence import Evidence, digits
from .inspected import NOBLE, InspectedFrame, compositions, rms, robust_spread

#: What each Gaussian contributes to a frame: see :func:`_design`.
_Design = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

#: Centres and width of the Gaussians, and where they end, in sums of covalent radii; Å beyond which
#: no pair is looked at.
_CENTRES, _WIDTH, _END, _REACH = np.linspace(0.65, 1.85, 7), 0.2, 2.0, 6.5
#: Kinds of pairs that get a potential of their own; of more there is one for all.
_KINDS = 10
#: Frames and atoms that are looked at: each file costs the same. Frames whose pairs take too much
#: memory are left out.
_FRAMES, _ATOMS, _PAIRS = 120, 10_000, 1_000_000
_RIDGE = 1e-4
#: Of the usual force, below which that of a frame is noise.
_SMALL = 0.2
_FEWEST = 8

#: Force on an atom over the sum of exp(-10 (d - 0.95)) / R along its pairs, d being a distance in
#: sums R of covalent radii, eV. Between 0.5 and 8 in 16 published sets of solids and hot water.
_REPULSION, _REPULSION_SIGMA = 2.2, 0.85
#: Energies and stresses over those of the model: 0.5 to 7 and 0.6 to 2 in the same sets.
_ENERGY, _ENERGY_SIGMA = 1.6, 0.75
_STRESS, _STRESS_SIGMA = 1.1, 0.75
#: eV: force times distance from which on atoms count as displaced.
_DISPLACED = 0.15
#: Correlations from which on a comparison says something of the size, and of the sign.
_CORRELATED, _SAME = 0.4, 0.65
#: What the wrong sign costs, and the wrong size at most: less than where frames are near each
#: other, since the model may fail altogether.
_SIGN, _CLEAR_SIGN, _CLEAR, _MOST = 10.0, 16.0, 0.75, 16.0


@dataclass(frozen=True, eq=False)
class PairModel:
    """A pair potential and its predictions for the frames of its fit.

    Attributes:
        frames: positions among the frames of the file.
        agreement: correlation of its forces with the labels.
        energies: eV an atom, ``[n]``.
        stresses: eV/Å³, ``[n, 3, 3]``; NaN for frames without a volume.
        repulsion: the force that a fixed repulsion takes, eV, with its sign, and how well it
            correlates.
    """

    places: Sequence[int]
    agreement: float
    energies: np.ndarray
    stresses: np.ndarray
    repulsion: tuple[float, float]

    def evidence(self, frames: Sequence[InspectedFrame]) -> list[Evidence]:
        """Evidence for the units of the frames.

        These may have other energies and stresses than those that the model was made of.
        """
        own = [frames[k] for k in self.places]
        forces, *others = self._of_forces(), self._of_energies(own), self._of_stresses(own)
        energies = others[0]
        if forces is not None and energies is not None and forces.sign * energies.sign < 0:
            # No wrong sign makes both: the model fails here, and says nothing of signs.
            others = [piece and replace(piece, sign=0) for piece in others]
        return [piece for piece in (forces, *others) if piece is not None]

    def _of_forces(self) -> Evidence | None:
        size, correlation = self.repulsion
        if abs(correlation) < 0.5 or size == 0.0:
            return None
        text = (
            f"the forces push atoms apart as a repulsion of {digits(size)} eV does at the sum of "
            f"the covalent radii (0.5 to 10 expected)"
        )
        log = float(np.log(abs(size) / _REPULSION))
        sign = 1 if size > 0 else -1
        return _evidence({"force": -1.0}, log, _REPULSION_SIGMA, text, sign, correlation)

    def _of_energies(self, frames: Sequence[InspectedFrame]) -> Evidence | None:
        """Spread of the energies of equal compositions and volumes against that of the model."""
        chosen = [k for k, e in enumerate(frames) if e.energy is not None and displaced(e)]
        if self.agreement < _CORRELATED or len(chosen) < _FEWEST:
            return None
        known = [frames[k] for k in chosen]
        trivial = _trivial(known)
        if len(chosen) < 1.5 * np.linalg.matrix_rank(trivial) + 4:
            return None
        labels = np.array([(e.energy or 0.0) / e.size for e in known])
        pair = np.stack([labels, self.energies[chosen]])
        left = pair - pair @ np.linalg.pinv(trivial.T, rcond=1e-8) @ trivial.T
        seen, said = map(robust_spread, left)
        if not seen > 1e-9 * float(abs(labels).max()) or not said > 0.0:
            return None
        correlation = float(np.corrcoef(left)[0, 1])
        if correlation != correlation or abs(correlation) < _CORRELATED:
            return None
        sign = int(np.sign(correlation)) if abs(correlation) > _SAME else 0
        text = (
            f"the energies of frames differ {digits(seen / said)} times as much as a pair "
            "potential fitted to the forces says (0.4 to 4 expected)"
        )
        log = float(np.log(seen / said / _ENERGY))
        powers = {"energy": -1.0, "force": 1.0}
        return _evidence(powers, log, _ENERGY_SIGMA, text, sign, correlation)

    def _of_stresses(self, frames: Sequence[InspectedFrame]) -> Evidence | None:
        """Shear, which displaced atoms make, by its size; shear and pressure by their sign."""
        chosen = [k for k, e in enumerate(frames) if e.stress is not None and e.volume > 0.0]
        chosen = [k for k in chosen if displaced(frames[k])]
        if self.agreement < _CORRELATED or len(chosen) < _FEWEST:
            return None
        labels = np.stack([frames[k].stress for k in chosen])  # type: ignore[misc]
        volumes = np.array([frames[k].volume / frames[k].size for k in chosen])
        pressures, shears = [], []
        for stress in (labels, self.stresses[chosen]):
            virials = stress * volumes[:, None, None]
            third = np.trace(virials, axis1=1, axis2=2) / 3.0
            pressures.append(third)
            shears.append((virials - third[:, None, None] * np.eye(3)).reshape(len(chosen), 9))
        seen, said = (np.sqrt((s**2).mean(axis=1)) for s in shears)
        if not np.median(seen) > 1e-12 or not np.median(said) > 0.0:
            return None
        shear = float((shears[0] * shears[1]).sum() / np.linalg.norm(shears[0]))
        shear /= float(np.linalg.norm(shears[1]))
        pressure = float(np.corrcoef(pressures)[0, 1]) if np.ptp(pressures[0]) > 0 else 0.0
        alike = (shear + pressure) / 2.0
        if max(abs(shear), abs(pressure)) < _CORRELATED:
            return None
        sign = int(np.sign(alike)) if abs(alike) > 0.5 else 0
        ratio = float(np.median(seen / np.maximum(said, 1e-12)))
        text = (
            f"the shear stress is {digits(ratio)} times that of a pair potential fitted to the "
            f"forces (0.4 to 4 expected; correlation of stress and pressure {alike:.2f})"
        )
        log = float(np.log(ratio / _STRESS))
        powers = {"stress": -1.0, "force": 1.0}
        return _evidence(powers, log, _STRESS_SIGMA, text, sign, alike)


def _evidence(
    powers: dict[str, float], log: float, sigma: float, text: str, sign: int, correlation: float
) -> Evidence:
    wrong = _CLEAR_SIGN if abs(correlation) > _CLEAR else _SIGN
    return Evidence(powers, log, sigma, text, sign, wrong_sign=wrong, most=_MOST)


def fit_pairs(frames: Sequence[InspectedFrame]) -> PairModel | None:
    """Fit the potential to the forces of frames that are spread over a file; None without any."""
    able = [k for k, e in enumerate(frames) if e.forces is not None and e.size > 1]
    atoms = sum(frames[k].size for k in able)
    step = max(1, -(-len(able) // _FRAMES), -(-atoms // _ATOMS))
    places = [k for k in able[::step] if _fits(frames[k])]
    chosen = [frames[k] for k in places]
    if len(places) < 2:
        return None
    # Each frame counts alike: else a few hot ones would say what the energies of all others are.
    sizes = np.array([rms(_forces(e)) for e in chosen])
    if not sizes.any():
        return None
    shares = 1.0 / np.maximum(sizes, _SMALL * rms(sizes))
    kinds = _kinds_of(chosen)
    made = [_design(frame, kinds) for frame in chosen]
    scaled = [one[0] * share for one, share in zip(made, shares, strict=True)]
    labels = [_forces(e) * share for e, share in zip(chosen, shares, strict=True)]
    halves = [_equations(scaled[k::2], labels[k::2]) for k in (0, 1)]
    normal, prediction = halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
    if not normal.any():
        return None
    weights = _solve(normal, prediction)
    # How well it agrees is asked of frames that it was not fitted to.
    apart = [_solve(*half) for half in halves]
    said = np.concatenate([one @ apart[1 - k % 2] for k, one in enumerate(scaled)])
    seen, push = np.concatenate([_forces(e) for e in chosen]), np.concatenate([m[3] for m in made])
    square = float(push @ push)
    return PairModel(
        places=places,
        agreement=_cosine(said, np.concatenate(labels)),
        energies=np.array([one[1] @ weights for one in made]),
        stresses=np.stack([one[2] @ weights for one in made]),
        repulsion=(float(push @ seen) / square if square > 0.0 else 0.0, _cosine(push, seen)),
    )


def _equations(
    forces: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares equations: matrix and right-hand side."""
    design = np.concatenate(forces)
    return design.T @ design, design.T @ np.concatenate(labels)


def _solve(normal: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Weights, regularised where the forces do not determine them."""
    size = float(np.trace(normal))
    if size == 0.0:
        return np.zeros(len(prediction))
    held = normal + _RIDGE * size / len(normal) * np.eye(len(normal))
    weights: np.ndarray = np.linalg.solve(held, prediction)
    return weights


def _fits(frame: InspectedFrame) -> bool:
    """Whether a frame can be fitted: not too many pairs, and no coinciding atoms."""
    near = expected_neighbors(frame.positions, frame.cell, frame.pbc, _REACH)
    return near * frame.size < _PAIRS and float(frame.nearest.min()) > 0.1


def displaced(frame: InspectedFrame) -> bool:
    """Whether displacements of the atoms dominate energies and stresses."""
    near = float(np.median(frame.nearest))
    return bool(np.isfinite(near)) and rms(_forces(frame)) * near > _DISPLACED


def _kinds_of(frames: Sequence[InspectedFrame]) -> dict[tuple[int, int], int]:
    """A number for each pair of elements; 0 for all where these are many."""
    elements = sorted({int(z) for e in frames for z in e.elements[0]})
    pairs = [(a, b) for k, a in enumerate(elements) for b in elements[k:]]
    return {pair: n if len(pairs) <= _KINDS else 0 for n, pair in enumerate(pairs)}


def _design(frame: InspectedFrame, kinds: dict[tuple[int, int], int]) -> _Design:
    """Contribution of each Gaussian to a frame.

    Returns:
        Forces ``[3 n, k]``, energy an atom ``[k]``, stress ``[3, 3, k]``; and the forces ``[3 n]``
        of the fixed repulsion.
    """
    radii = covalent_radii[frame.numbers]
    reach = min(_REACH, _END * 2.0 * float(radii.max()))
    first, second, vector, length = find_pairs(
        frame.positions, frame.cell, frame.pbc, reach, "ijDd", full=True,
        where=frame.structure.where,
    )  # fmt: skip
    first, second = first.astype(np.int64), second.astype(np.int64)
    sums = radii[first] + radii[second]
    inside = length < _END * sums
    first, second, sums = first[inside], second[inside], sums[inside]
    length, unit = length[inside], vector[inside] / length[inside, None]
    values, slopes = _gaussians(length / sums)
    slopes /= sums[:, None]
    low, high = np.minimum(frame.numbers[first], frame.numbers[second]), np.maximum(
        frame.numbers[first], frame.numbers[second]
    )  # fmt: skip
    number = np.array([kinds[a, b] for a, b in zip(low.tolist(), high.tolist(), strict=True)])
    width, count = len(_CENTRES), max(kinds.values()) + 1
    forces = np.empty((frame.size, 3, count * width))
    push = np.empty((frame.size, 3))
    repulsion = -np.exp(-10.0 * (length / sums - 0.95)) / sums
    noble = np.isin(frame.numbers, NOBLE)
    repulsion[noble[first] | noble[second]] = 0.0
    for axis in range(3):
        pulls = _sums(first * count + number, unit[:, axis], slopes, frame.size * count)
        forces[:, axis] = pulls.reshape(frame.size, -1)
        push[:, axis] = np.bincount(first, repulsion * unit[:, axis], minlength=frame.size)
    energy = _sums(number, np.full(len(number), 0.5 / frame.size), values, count).ravel()
    stress = np.full((3, 3, count * width), np.nan)
    if frame.volume > 0.0:
        arms = unit * (length / (2.0 * frame.volume))[:, None]
        for row, column in np.ndindex(3, 3):
            both = _sums(number, arms[:, row] * unit[:, column], slopes, count)
            stress[row, column] = both.ravel()
    return forces.reshape(3 * frame.size, -1), energy, stress, push.ravel()


def _sums(groups: np.ndarray, factors: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Rows of values times their factors, added up within each group, ``[count, k]``."""
    places = np.arange(len(groups) + 1)
    found: np.ndarray = csc_matrix((factors, groups, places), (count, len(groups))) @ values
    return found


def _gaussians(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The functions and their slopes, ``[n, 7]`` each, at distances in sums of radii."""
    away = distances[:, None] - _CENTRES
    bells = np.exp(-0.5 * (away / _WIDTH) ** 2)
    fade = np.maximum(0.0, 1.0 - distances / _END)[:, None]
    return bells * fade**2, -bells * fade * (away / _WIDTH**2 * fade + 2.0 / _END)


def _trivial(frames: Sequence[InspectedFrame]) -> np.ndarray:
    """Terms that forces do not determine: fractions of elements, functions of the volume."""
    elements = sorted({int(z) for e in frames for z in e.elements[0]})
    columns = [compositions(frames, elements)]
    volumes = np.array([e.volume / e.size for e in frames])
    if volumes.min() > 0.0 and np.ptp(volumes) > 1e-3 * volumes.min():
        logs = np.log(volumes)
        columns.append(np.stack([logs, logs**2], axis=1))
    return np.concatenate(columns, axis=1)


def _forces(frame: InspectedFrame) -> np.ndarray:
    assert frame.forces is not None
    return frame.forces.ravel()


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    """Correlation of two vectors whose means are zero."""
    size = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / size if size > 0.0 else 0.0
