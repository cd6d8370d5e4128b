"""Predictions of one potential with the uncertainty that its last layer gives (metatrain's LLPR).

What is offered, and under which names, is as for a committee of adapters: see :mod:`.committee`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pet_finetune.graph import Batch
from pet_finetune.log import get_logger
from pet_finetune.model import Potential, Prediction, Property
from pet_finetune.model.fingerprint import target_fingerprints
from pet_finetune.model.inference import autograd_possible
from pet_finetune.model.last_layer import LastLayer
from pet_finetune.model.pet import features_key
from pet_finetune.model.prediction import forces_of, stress_of

from .committee import COMMITTEE_PROPERTIES, Calibration, CommitteePrediction

__all__ = [
    "LastLayerPrediction",
    "fresh",
    "no_property",
    "predict_uncertain",
    "properties_of",
    "with_uncertainty",
]

_logger = get_logger(__name__)


def fresh(model: Potential, tell: bool = True) -> dict[str, LastLayer]:
    """The last-layer uncertainties of a model whose weights are still those they were made for.

    Args:
        model: with or without such.
        tell: whether those that are not are named in the log.
    """
    if not model.uncertainties:
        return {}
    now = target_fingerprints(model, model.uncertainties)
    found, stale = {}, []
    for target, layer in model.uncertainties.items():
        assert isinstance(layer, LastLayer)
        if layer.fingerprint == now[target]:
            found[target] = layer
        else:
            stale.append(target)
    if stale and tell:
        _logger.warning(
            "The last-layer uncertainty (LLPR) of %s was made for other weights and is not "
            "offered. Training with finetune.llpr: true makes one for the new weights.",
            ", ".join(f"'{target}'" for target in stale),
        )
    return found


def properties_of(layer: LastLayer | None, direct: bool) -> Sequence[str]:
    """What a calculator has beside the usual properties.

    Args:
        layer: the uncertainty of its energy, if there is one.
        direct: whether forces or stress come from heads of their own; members differ in the energy
            alone.
    """
    if layer is None:
        return []
    if not layer.num_members:
        return ["energy_uncertainty"]
    return ["energy_uncertainty", "energy_ensemble"] if direct else COMMITTEE_PROPERTIES


def no_property(layer: LastLayer | None, target: str) -> str:
    """Why a calculator of one model lacks one of :data:`COMMITTEE_PROPERTIES`."""
    if layer is None:
        return (
            f"the model has no uncertainty of '{target}'. Committees of adapters have one, and "
            "models with a last-layer uncertainty (LLPR; finetune.llpr: true) while their weights "
            "are those that it was made for."
        )
    if layer.num_members:
        return "members of a last layer differ in derivatives of the energy, not direct heads."
    return (
        "this last-layer uncertainty (LLPR) has no ensemble, so it is of energies alone. "
        "finetune.llpr: {num_ensemble_members: 16} makes one."
    )


@dataclass(frozen=True)
class LastLayerPrediction(CommitteePrediction):
    """What a potential says, how sure it is, and what the members of its last layer say.

    Attributes:
        sums: what the last layer sees of each structure, [n_structures, k].
        last_layer: makes an uncertainty of it.
    """

    sums: Tensor = field(kw_only=True)
    last_layer: LastLayer = field(kw_only=True)

    def knows(self, kind: str) -> bool:
        """Whether there is an uncertainty of ``energy``, ``forces`` or ``stress``."""
        return kind == "energy" or super().knows(kind)

    def spread(self, kind: str) -> Tensor:
        """The standard deviation of each number: of energies in closed form, else of members."""
        return self.last_layer(self.sums) if kind == "energy" else super().spread(kind)


def predict_uncertain(
    model: Potential,
    batch: Batch,
    wanted: Mapping[str, tuple[bool, bool]],
    layers: Mapping[str, LastLayer],
    members: bool = False,
) -> dict[str, Prediction | Property]:
    """As :meth:`Potential.predict_targets`; energies with uncertainties come with theirs.

    Args:
        model: predicts.
        batch: the structures.
        wanted: for each target, whether forces and stress are.
        layers: as :func:`fresh` gives them.
        members: as for :func:`with_uncertainty`.
    """
    known = [name for name in wanted if name in layers and model.target(name).is_energy]
    found = model.predict_targets(batch, wanted, features_of=known)
    for name in known:
        prediction = found[name]
        assert isinstance(prediction, Prediction)
        found[name] = with_uncertainty(model, batch, prediction, name, layers[name], members)
    return found


def with_uncertainty(
    model: Potential,
    batch: Batch,
    prediction: Prediction,
    target: str,
    layer: LastLayer,
    members: bool = False,
) -> LastLayerPrediction:
    """An energy with its uncertainty.

    Args:
        model: predicts.
        batch: the structures.
        prediction: what it says of them, with features.
        target: which energy.
        layer: of that energy.
        members: whether forces and stress of the members are derived, as far as those of the
            prediction are there. Each member takes a derivative of its own.
    """
    features = prediction.features
    assert features is not None, "it was predicted with features_of"
    sums = features.new_zeros(batch.num_structures, features.shape[1], dtype=torch.float64)
    sums = sums.index_add(0, batch.structure_index, features.double())
    forces = stress = None
    if members and layer.num_members and prediction.forces is not None:
        gradients = _gradients(model, batch, target, layer)
        forces = torch.stack([prediction.forces + forces_of(batch, g) for g in gradients])
        if prediction.stress is not None:
            stress = torch.stack([prediction.stress + stress_of(batch, g) for g in gradients])
    said = Prediction(
        energy=prediction.energy + layer.deviations(sums).T,
        atom_energies=prediction.atom_energies + layer.deviations(features).T,
        forces=forces,
        stress=stress,
    )
    return LastLayerPrediction(
        **{**vars(prediction), "features": None},
        members=said,
        calibration=Calibration(),
        sums=sums,
        last_layer=layer,
    )


def _gradients(model: Potential, batch: Batch, target: str, layer: LastLayer) -> list[Tensor]:
    """Derivative of each member's deviation by the edge vectors, [n_edges, 3]."""
    with autograd_possible(model, batch) as recordable, torch.enable_grad():
        vectors = recordable.edge_vectors.detach().requires_grad_()
        outputs = model.network(
            recordable._replace(edge_vectors=vectors), [target], False, [target]
        )
        # [n_members]
        sums = layer.deviations(outputs[features_key(target)]).sum(0)
        return [
            torch.autograd.grad(one, vectors, retain_graph=True, materialize_grads=True)[0]
            for one in sums.unbind()
        ]
