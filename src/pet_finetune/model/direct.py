"""Forces and stress that a model predicts directly, in place of an energy's derivatives.

They cost no derivative and are not conservative: an energy need not stay what it is along a
trajectory. Names and variants go together as in metatomic's calculator: with the energy
``energy/pbe`` go the direct forces ``non_conservative_force/pbe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from pet_finetune.errors import ConfigError
from pet_finetune.graph import Batch
from pet_finetune.keys import DIRECT_FORCES, DIRECT_STRESS, TargetSpec

from .potential import Potential
from .prediction import Prediction, Property

#: Which of forces and stress are predicted directly: both, one of them, or neither.
NonConservative = bool | Literal["forces", "stress"]


@dataclass(frozen=True)
class DirectTargets:
    """The targets that stand in for derivatives; None where a derivative is taken."""

    forces: str | None
    stress: str | None


def direct_targets(
    targets: Mapping[str, TargetSpec], energy: str, wanted: NonConservative
) -> DirectTargets | None:
    """Find the direct targets that go with an energy; None if none are wanted.

    Raises:
        ConfigError: there is no such head, or ``wanted`` is not one of its values.
    """
    if wanted not in (True, False, "forces", "stress"):
        raise ConfigError(
            f"non_conservative: {wanted!r} is not one of True, False, 'forces', 'stress'."
        )
    if not wanted:
        return None
    variant = energy.partition("/")[2]
    found: dict[str, str | None] = {}
    for what, bases in (("forces", DIRECT_FORCES), ("stress", DIRECT_STRESS)):
        names = [f"{base}/{variant}" if variant else base for base in bases]
        found[what] = next((name for name in names if name in targets), None)
        if found[what] is None and wanted in (True, what):
            other = "stress" if what == "forces" else "forces"
            raise ConfigError(
                f"non_conservative: the model has no head for direct {what} ({names[0]}) that was "
                f"trained with '{energy}'; trained together: {', '.join(targets)}. Use "
                f"non_conservative='{other}' or False, or train such a head: see 'Targets beyond "
                "the energy' in the documentation."
            )
    return DirectTargets(
        found["forces"] if wanted in (True, "forces") else None,
        found["stress"] if wanted in (True, "stress") else None,
    )


def predict_direct(
    model: Potential,
    batch: Batch,
    energy: str,
    direct: DirectTargets,
    stress: bool,
    features: bool = False,
) -> Prediction:
    """An energy with forces and stress, direct where they are to be.

    The mean of direct forces over a structure's atoms is taken out, as metatomic does: it would
    push the whole structure away.

    Args:
        model: with the direct targets.
        batch: as for :meth:`Potential.predict`.
        energy: which energy.
        direct: from :func:`direct_targets`.
        stress: whether a stress is wanted.
        features: whether those of the energy come back too.
    """
    wanted = {energy: (direct.forces is None, stress and direct.stress is None)}
    if direct.forces is not None:
        wanted[direct.forces] = (False, False)
    if direct.stress is not None and stress:
        wanted[direct.stress] = (False, False)
    found = model.predict_targets(batch, wanted, features_of=[energy] if features else [])
    prediction = found[energy]
    assert isinstance(prediction, Prediction)
    if direct.forces is not None:
        forces = _values(found[direct.forces])
        prediction = replace(prediction, forces=_without_net_force(batch, forces))
    if direct.stress is not None and stress:
        prediction = replace(prediction, stress=_values(found[direct.stress]))
    return prediction


def _values(found: Prediction | Property) -> Tensor:
    assert isinstance(found, Property)
    return found.values


def _without_net_force(batch: Batch, forces: Tensor) -> Tensor:
    """[n_atoms, 3] whose mean over each structure is zero."""
    total = forces.new_zeros(batch.num_structures, 3).index_add(0, batch.structure_index, forces)
    mean = total / batch.atoms_per_structure.unsqueeze(1)
    return forces - mean[batch.structure_index]
