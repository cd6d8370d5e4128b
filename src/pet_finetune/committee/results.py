"""What a committee says of one structure, in the form of an ASE calculator's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from .committee import CommitteePrediction

__all__ = ["COMMITTEE_PROPERTIES", "OF_MEMBERS", "committee_results", "to_numpy"]

#: What a committee computes beside the properties of ASE.
COMMITTEE_PROPERTIES = (
    *("energy_uncertainty", "forces_uncertainty", "stress_uncertainty"),
    *("energy_ensemble", "forces_ensemble", "stress_ensemble"),
)
#: Those that take the derivatives of each member.
OF_MEMBERS = frozenset(COMMITTEE_PROPERTIES) - {"energy_uncertainty", "energy_ensemble"}


def committee_results(prediction: CommitteePrediction) -> dict[str, Any]:
    """What :data:`COMMITTEE_PROPERTIES` names, for the one structure of a prediction."""
    members = prediction.members
    results = {
        "energy_uncertainty": float(prediction.uncertainty("energy")[0]),
        "energy_ensemble": to_numpy(members.energy[:, 0]),
    }
    if members.forces is not None:
        # Of an atom, the root mean square over the components: the error to expect of each.
        forces = prediction.uncertainty("forces").square().mean(-1).sqrt()
        results["forces_uncertainty"] = to_numpy(forces)
        results["forces_ensemble"] = to_numpy(members.forces)
    if members.stress is not None:
        uncertainty = to_numpy(prediction.uncertainty("stress")[0])
        results["stress_uncertainty"] = full_3x3_to_voigt_6_stress(uncertainty)
        results["stress_ensemble"] = full_3x3_to_voigt_6_stress(to_numpy(members.stress[:, 0]))
    return results


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers in double precision, as calculators hand them on."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float64).numpy()
    return array
