"""Scaling of a committee's spread to an uncertainty, coverage, miscalibration area, their plot."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pet_finetune.data.labelled_batch import LabelledBatch, on_device
from pet_finetune.installation import plotting
from pet_finetune.keys import forces_key, stress_key

from .committee import Committee, CommitteePrediction, to_numpy

#: Confidence levels of a coverage curve, those of the uncertainty toolbox.
LEVELS = np.linspace(0.0, 1.0, 100)


@dataclass(frozen=True, eq=False)
class Deviations:
    """Errors of a committee and the spread of its members, number by number.

    Attributes:
        errors: [n], mean of the members less the label.
        spreads: [n], standard deviation over the members.
    """

    errors: np.ndarray
    spreads: np.ndarray

    def scaled(self, factor: float) -> Deviations:
        """With other uncertainties for the same errors."""
        return Deviations(self.errors, factor * self.spreads)

    @property
    def factor(self) -> float:
        """Factor that makes the mean square of the spread that of the errors.

        The root of the ratio of the means, sum e^2 / sum s^2, which makes the root mean variance
        equal to the root mean squared error (the two that Levi et al., Sensors 22, 5540 (2022)
        compare). The mean of the ratios, e^2 / s^2 (Imbalzano et al., arXiv:2011.08828), has no
        finite expectation for three members or fewer: their spread is near zero too often. The
        factor is 1 where members agree in everything.
        """
        variance = float(np.mean(self.spreads**2))
        return math.sqrt(float(np.mean(self.errors**2)) / variance) if variance > 0.0 else 1.0

    def within(self, widths: float) -> float:
        """Which part of the errors is at most so many uncertainties large."""
        return float(np.mean(np.abs(self.errors) <= widths * self.spreads))

    def coverage(self) -> np.ndarray:
        """Which part of the errors lies within the central interval of each of :data:`LEVELS`.

        Intervals are those of a normal distribution around the mean, [n_levels].
        """
        normal = NormalDist()
        widths = [normal.inv_cdf(0.5 + 0.5 * level) for level in LEVELS[:-1].tolist()]
        inside = [self.within(width) for width in widths]
        return np.array([*inside, 1.0])  # the last interval is endless


def miscalibration_area(observed: np.ndarray, expected: np.ndarray = LEVELS) -> float:
    """Area between the curve of observed over expected coverage and the diagonal, 0 to 0.5.

    Definition of the uncertainty toolbox (Chung et al., arXiv:2109.10254; Tran et al., Mach.
    Learn.: Sci. Technol. 1, 025006 (2020)), which needs shapely and scikit-learn for it. Between
    levels the curve is a straight line, so the area is exact where it crosses the diagonal, too.
    """
    gaps = observed - expected
    left, right, steps = gaps[:-1], gaps[1:], np.diff(expected)
    sizes = np.abs(left) + np.abs(right)
    crossing = left * right < 0.0
    triangles = (left**2 + right**2) / np.where(sizes > 0.0, sizes, 1.0)
    return float(np.sum(0.5 * steps * np.where(crossing, triangles, sizes)))


class Comparison:
    """Errors and spreads, collected batch by batch."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}

    def add(self, batch: LabelledBatch, predictions: Mapping[str, object]) -> None:
        """Add labels of a batch and predictions by target, without those that have no spread."""
        atoms = batch.graph.atoms_per_structure
        for name, prediction in predictions.items():
            if not isinstance(prediction, CommitteePrediction):
                continue
            keys = {"energy": name, "forces": forces_key(name), "stress": stress_key(name)}
            for kind, key in keys.items():
                label, mean = batch.labels.get(key), getattr(prediction, kind)
                if label is None or mean is None or not prediction.knows(kind):
                    continue
                error, spread = mean - label, prediction.spread(kind)
                if kind == "energy":
                    error, spread = error / atoms, spread / atoms
                known = ~label.isnan()
                self._found.setdefault((name, kind), []).append((error[known], spread[known]))

    def of(self, target: str) -> dict[str, Deviations]:
        """Calibration of a target by kind: energies per atom, components of the others."""
        return {
            kind: Deviations(*(to_numpy(torch.cat(values)) for values in zip(*parts, strict=True)))
            for (name, kind), parts in self._found.items()
            if name == target and any(len(errors) for errors, _ in parts)
        }


def collect(
    committee: Committee, batches: Iterable[LabelledBatch], wanted: Mapping[str, tuple[bool, bool]]
) -> dict[str, Deviations]:
    """Errors and spreads of a committee on labelled batches, by kind."""
    comparison = Comparison()
    for batch in on_device(batches, committee.device, committee.dtype):
        comparison.add(batch, committee.predict_many(batch.graph, wanted))
    return comparison.of(committee.target)


@dataclass(frozen=True, eq=False)
class Curves:
    """Coverage of one kind of number, as parts of 1.

    Attributes:
        expected: [n_levels].
        before, after: [n_levels], observed without and with the factor.
        area_before, area_after: miscalibration areas.
        factor: of the calibration.
    """

    expected: np.ndarray
    before: np.ndarray
    after: np.ndarray
    area_before: float
    area_after: float
    factor: float

    @classmethod
    def of(cls, found: Deviations, factor: float) -> Curves:
        """Calibration from errors and spreads."""
        before, after = found.coverage(), found.scaled(factor).coverage()
        areas = miscalibration_area(before), miscalibration_area(after)
        return cls(LEVELS, before, after, *areas, factor)

    def plain(self) -> dict[str, Any]:
        """Numbers and lists for JSON."""
        return {
            key: value if isinstance(value, float) else value.tolist()
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Curves:
        """The opposite of :meth:`plain`."""
        arrays: dict[str, Any] = {
            key: np.array(value) if isinstance(value, list) else value
            for key, value in values.items()
        }
        return cls(**arrays)


def calibration_svg(curves: Mapping[str, Curves]) -> str:
    """Observed over expected coverage, one panel a kind, as SVG.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    _, Figure = plotting()
    figure = Figure(figsize=(3.2 * len(curves), 3.3), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (kind, curve) in zip(panels, curves.items(), strict=True):
        draw_coverage(panel, kind, curve, ("0.6", "tab:blue", "tab:orange"))
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue()


def draw_coverage(axes: Any, kind: str, curve: Curves, colours: tuple[str, str, str]) -> None:
    """Observed over expected coverage of one kind."""
    axes.plot([0, 1], [0, 1], color=colours[0], linewidth=1)
    for name, observed, area, colour in (
        ("spread", curve.before, curve.area_before, colours[1]),
        (f"times {curve.factor:.2f}", curve.after, curve.area_after, colours[2]),
    ):
        axes.plot(curve.expected, observed, label=f"{name}: area {area:.3f}", color=colour)
    axes.set(title=kind, xlabel="expected coverage", ylabel="observed coverage")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left", fontsize="small", frameon=False)
