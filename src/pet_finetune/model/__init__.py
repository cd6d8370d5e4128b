"""The PET potential: network, per-species baseline, scale, short-range repulsion, derivatives."""

from __future__ import annotations

from .composition import Composition, fit_composition
from .pet import PET
from .potential import Potential
from .prediction import Prediction, Property

__all__ = ["PET", "Composition", "Potential", "Prediction", "Property", "fit_composition"]
