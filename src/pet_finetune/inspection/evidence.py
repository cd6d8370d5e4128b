"""Which units explain what was seen: each piece of evidence votes with its own uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Declared", "Evidence", "Reading", "best_readings", "log_ratio"]

# What evidence costs that has the wrong sign, in squared standard deviations.
_WRONG_SIGN = 25.0


@dataclass(frozen=True)
class Declared:
    """What the options say one unit of the file is, in eV and Å; labels were multiplied by it.

    Forces and stresses without a unit of their own follow from energy and length.
    """

    energy: float = 1.0
    length: float = 1.0
    own_force: float | None = None
    own_stress: float | None = None

    @property
    def force(self) -> float:
        """eV/Å in one unit of force."""
        return self.own_force or self.energy / self.length

    @property
    def stress(self) -> float:
        """eV/Å³ in one unit of stress."""
        return self.own_stress or self.energy / self.length**3


@dataclass(frozen=True)
class Evidence:
    """Something that has a known size when the units are right.

    Attributes:
        powers: by quantity, the power of its wrong factor that is in the observation.
        log: natural logarithm of what was observed over what is expected.
        sigma: its uncertainty.
        text: for the user.
        sign: of the observation; 0 where it says nothing.
        one_sided: whether only values that are too large say something.
        turned: ``log`` if the sign of the quantities is wrong; None where that is the same.
    """

    powers: Mapping[str, float]
    log: float
    sigma: float
    text: str
    sign: int = 0
    one_sided: bool = False
    turned: float | None = None

    def cost(self, reading: Reading) -> float:
        """How badly a reading explains it, in squared standard deviations."""
        expected = sum(p * reading.logs.get(name, 0.0) for name, p in self.powers.items())
        sign = math.prod(reading.signs.get(name, 1) for name in self.powers)
        off = (self.log if sign > 0 or self.turned is None else self.turned) - expected
        if self.one_sided:
            off = max(0.0, off)
        return (off / self.sigma) ** 2 + (_WRONG_SIGN if self.sign == -sign else 0.0)


@dataclass(frozen=True)
class Reading:
    """Units that a file may be in.

    Attributes:
        units: their names, by quantity.
        logs: logarithms of eV and Å in the true unit over those in the unit that is assumed.
        prior: what the reading costs before any evidence is seen.
        signs: -1 for quantities whose sign is wrong.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    logs: Mapping[str, float] = field(default_factory=dict)
    prior: float = 0.0
    signs: Mapping[str, int] = field(default_factory=dict)

    def cost(self, evidence: Iterable[Evidence]) -> float:
        """Of all the evidence, and of the prior."""
        return self.prior + sum(piece.cost(self) for piece in evidence)


def best_readings(
    readings: Sequence[Reading], evidence: Sequence[Evidence], margin: float, tie: float
) -> list[Reading]:
    """The readings that explain the evidence best, if they do so better than the first one.

    Args:
        readings: the first of them is the one assumed.
        evidence: at least one piece.
        margin: by how much the best one must be better.
        tie: by how much others may be worse than the best one.

    Returns:
        The best one first; none where the first reading holds.
    """
    costs = np.array([reading.cost(evidence) for reading in readings])
    if costs.min() + margin >= costs[0]:
        return []
    order = np.argsort(costs, kind="stable")
    return [readings[k] for k in order if costs[k] <= costs.min() + tie]


def log_ratio(seen: np.ndarray, expected: np.ndarray, floor: float) -> tuple[float, float, int]:
    """Median of the logarithms of ratios, its uncertainty, and the sign (0: unclear).

    Args:
        seen: values of the data.
        expected: what they should be equal to; where these are in their smaller half, both are
            left out, since noise rules them.
        floor: the least uncertainty.
    """
    large = np.abs(expected) >= np.median(np.abs(expected))
    ratios = seen[large] / expected[large]
    logs = np.log(np.maximum(np.abs(ratios), 1e-12))
    low, middle, high = np.quantile(logs, [0.25, 0.5, 0.75])
    positive = float((ratios > 0).mean())
    sign = 1 if positive > 0.75 else -1 if positive < 0.25 else 0
    return float(middle), max(floor, 0.5 * float(high - low)), sign
