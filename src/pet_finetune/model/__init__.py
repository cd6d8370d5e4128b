"""The PET potential: network, per-species baseline, scale, short-range repulsion, derivatives."""

from __future__ import annotations

from .composition import Composition, fit_composition
from .pet import PET
from .potential import Potential, Prediction

__all__ = ["PET", "Composition", "Potential", "Prediction", "fit_composition"]
