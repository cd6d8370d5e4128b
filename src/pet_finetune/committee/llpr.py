"""The uncertainty that the last layer of a potential gives (metatrain's LLPR): predicted, and made.

What is offered, and under which names, is as for a committee of adapters: see :mod:`.committee`.
Formulas of metatrain 2026.4.1, which the parity tests hold these against. Sums are in float64
whatever the precision of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pet_finetune.adapters.base_weights import target_fingerprints
from pet_finetune.config.finetune import LastLayerOptions
from pet_finetune.data.labelled_batch import LabelledBatch, on_device
from pet_finetune.errors import TrainingError
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import (
    LastLayer,
    Prediction,
    Property,
    autograd_possible,
    cholesky_of,
    features_key,
    forces_of,
    stress_of,
    with_leaves,
)
from pet_finetune.terminal import Watch

from .calibration import Curves, Deviations
from .committee import COMMITTEE_PROPERTIES, Calibration, CommitteePrediction

_logger = get_logger(__name__)


def fresh(model: Potential) -> dict[str, LastLayer]:
    """The last-layer uncertainties of a model whose weights are still those they were made for.

    Those that are not are named in the log.
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
    if stale:
        _logger.warning(
            "The last-layer uncertainty (LLPR) of %s was made for other weights and is not "
            "offered. Training with finetune.llpr: true makes one for the new weights.",
            ", ".join(f"'{target}'" for target in stale),
        )
    return found


def properties_of(layer: LastLayer | None, direct: bool) -> Sequence[str]:
    """Additional properties of a calculator.

    Args:
        layer: the uncertainty of its energy, if there is one.
        direct: whether forces or stress come from heads of their own, of which members say nothing.
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
    """Prediction of a potential with its uncertainty and its last-layer ensemble.

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
) -> dict[str, Prediction | Property]:
    """:meth:`Potential.predict_targets`, with the uncertainties of energies."""
    known = [name for name in wanted if name in layers and model.target(name).is_energy]
    found = model.predict_targets(batch, wanted, features_of=known)
    for name in known:
        prediction = found[name]
        assert isinstance(prediction, Prediction)
        found[name] = with_uncertainty(model, batch, prediction, name, layers[name])
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
    assert prediction.features is not None, "it was predicted with features_of"
    sums = _features(batch, model.target(target), prediction)
    forces = stress = None
    if members and layer.num_members and prediction.forces is not None:
        gradients = _gradients(model, batch, target, layer)
        forces = torch.stack([prediction.forces + forces_of(batch, g) for g in gradients])
        if prediction.stress is not None:
            stress = torch.stack([prediction.stress + stress_of(batch, g) for g in gradients])
    said = Prediction(
        energy=prediction.energy + layer.deviations(sums).T,
        atom_energies=prediction.atom_energies + layer.deviations(prediction.features).T,
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


def _gradients(
    model: Potential, batch: Batch, target: str, layer: LastLayer
) -> list[tuple[Tensor, ...]]:
    """Derivatives of each member's deviation by the leaves of the batch."""
    with autograd_possible(model, batch) as recordable, torch.enable_grad():
        leafy, leaves = with_leaves(recordable, model.hypers.long_range.enable, True)
        outputs = model.network(leafy, [target], False, [target])
        # [n_members]
        sums = layer.deviations(outputs[features_key(target)]).sum(0)
        return [
            torch.autograd.grad(one, leaves, retain_graph=True, materialize_grads=True)
            for one in sums.unbind()
        ]


@torch.no_grad()
def fit_last_layers(
    model: Potential,
    training: Iterable[LabelledBatch],
    validation: Iterable[LabelledBatch],
    targets: Sequence[str],
    options: LastLayerOptions,
    seed: int = 0,
) -> dict[str, tuple[LastLayer, Curves | None]]:
    """Uncertainties of targets, calibrated; of energies with their coverage on the validation set.

    Args:
        model: in evaluation mode; not changed.
        training: batches of the structures that it was trained on.
        validation: batches of others, with labels.
        targets: to make an uncertainty for; those without labels for validation are left out.
        options: how.
        seed: of the members' weights.

    Raises:
        TrainingError: features or errors that no uncertainty can be made from.
    """
    covariances = _covariances(model, training, targets)
    fingerprints = target_fingerprints(model, targets)
    smallest = torch.finfo(model.dtype).eps
    bare: dict[str, LastLayer] = {}
    for target, covariance in covariances.items():
        typical = float(covariance.diagonal().mean())
        try:
            factor = cholesky_of(covariance, options.regularizer, smallest * typical)
        except ValueError as error:
            raise TrainingError(
                f"finetune.llpr: no uncertainty of '{target}' can be made: {error}. Choose another "
                "regularizer, or null."
            ) from error
        bare[target] = LastLayer(covariance, factor, 1.0, None, fingerprints[target])
    found: dict[str, tuple[LastLayer, Curves | None]] = {}
    for target, (errors, sizes) in _residuals(model, validation, bare).items():
        multiplier = _multiplier(errors, sizes, options.calibration_method, target)
        layer, curves, members = bare[target], None, None
        if model.target(target).is_energy:
            members = _members(model, target, layer, multiplier, options, seed)
            curves = Curves.of(Deviations(errors.numpy(), sizes.numpy()), multiplier)
        parts = layer.covariance, layer.cholesky, multiplier, members, layer.fingerprint
        found[target] = LastLayer(*parts).to(model.device), curves
    return found


def _features(batch: Batch, spec: TargetSpec, found: Prediction | Property) -> Tensor:
    """Last-layer features of each row of a target, [n_rows, k] float64."""
    assert found.features is not None
    features = found.features.double()
    if spec.per_atom:
        return features
    sums = features.new_zeros(batch.num_structures, features.shape[1])
    return sums.index_add(0, batch.structure_index, features)


def _covariances(
    model: Potential, training: Iterable[LabelledBatch], targets: Sequence[str]
) -> dict[str, Tensor]:
    """Sums of f f^T, [k, k], with the features of structures divided by their numbers of atoms."""
    width = model.network.last_layer_width
    zeros = torch.zeros(width, width, dtype=torch.float64, device=model.device)
    sums = {target: zeros.clone() for target in targets}
    for batch, found in _predicted(model, training, targets, "features of the training set"):
        for target in targets:
            spec = model.target(target)
            rows = _features(batch.graph, spec, found[target])
            if not spec.per_atom:
                rows = rows / batch.graph.atoms_per_structure.unsqueeze(1)
            sums[target] += rows.T @ rows
    return sums


def _predicted(
    model: Potential, batches: Iterable[LabelledBatch], targets: Sequence[str], what: str
) -> Iterator[tuple[LabelledBatch, dict[str, Prediction | Property]]]:
    """Batches with predictions of targets and their features; ``what`` is shown."""
    wanted = dict.fromkeys(targets, (False, False))
    with Watch(what, "structures") as watch:
        for batch in on_device(batches, model.device, model.dtype):
            yield batch, model.predict_targets(batch.graph, wanted, features_of=targets)
            watch.step(batch.graph.num_structures)


def _residuals(
    model: Potential, validation: Iterable[LabelledBatch], layers: dict[str, LastLayer]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Errors and uncertainties without a factor of the numbers of each target, both [n]."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    what = "calibration of the uncertainty"
    for batch, found in _predicted(model, validation, list(layers), what):
        for target, layer in layers.items():
            label, said, spec = batch.labels.get(target), found[target], model.target(target)
            if label is None:
                continue
            values = said.energy if isinstance(said, Prediction) else said.values
            error = (values - label.to(values)).double()
            size = layer.to(model.device)(_features(batch.graph, spec, said))
            # Every number of a row has the row's uncertainty.
            error = error.reshape(len(size), -1)
            known = ~error.isnan()
            both = error[known].cpu(), size.unsqueeze(1).expand_as(error)[known].cpu()
            parts.setdefault(target, []).append(both)
    joined = {
        target: (torch.cat([error for error, _ in both]), torch.cat([size for _, size in both]))
        for target, both in parts.items()
    }
    return {target: both for target, both in joined.items() if len(both[0])}


def _multiplier(errors: Tensor, sizes: Tensor, method: str, target: str) -> float:
    """The factor between uncertainties without one and errors, both [n]."""
    if not bool((sizes > 0).all()):
        raise TrainingError(
            f"finetune.llpr: some structures have no features of '{target}', so their uncertainty "
            "would be zero. Leave llpr out."
        )
    ratios = (errors / sizes).numpy()
    if method == "absolute_residuals":  # of a normal distribution
        return float(np.abs(ratios).mean() * math.sqrt(math.pi / 2.0))
    if method == "squared_residuals":
        return float(np.sqrt(np.square(ratios).mean()))
    return _smallest_score(ratios, sizes.numpy())


def _smallest_score(ratios: np.ndarray, sizes: np.ndarray) -> float:
    """The factor with the smallest continuous ranked probability score of normal distributions.

    The derivative of the mean score by the factor a has the sign of the sum of
    ``size * (1/sqrt(pi) - 2 phi(ratio / a))`` with the other sign, and that falls with a: from
    above zero where the distributions are narrow to below it where they are wide.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped,unused-ignore]

    def slope(logarithm: float) -> float:
        scaled = ratios * math.exp(-logarithm)
        density = np.exp(-0.5 * np.minimum(scaled**2, 1400.0)) / math.sqrt(2.0 * math.pi)
        return float(np.sum(sizes * (1.0 / math.sqrt(math.pi) - 2.0 * density)))

    largest = float(np.abs(ratios).max())
    if largest == 0.0:
        return 0.0
    # At ten times the largest ratio all are wide; the other end is where most are narrow.
    high = math.log(10.0 * largest)
    low = high
    while slope(low) <= 0.0:
        low -= 2.0
        if low < high - 200.0:
            return 0.0  # most errors are zero
    return math.exp(float(brentq(slope, low, high, xtol=1e-13)))


def _members(
    model: Potential,
    target: str,
    layer: LastLayer,
    multiplier: float,
    options: LastLayerOptions,
    seed: int,
) -> Tensor | None:
    """Weights of last layers drawn around the model's own, [n_members, k]; None for none."""
    if not options.num_ensemble_members:
        return None
    groups = (model.network.node_last_layers, model.network.edge_last_layers)
    pairs = zip(*(group[target] for group in groups), strict=True)
    weights = [
        next(iter(part.children())).get_parameter("weight").double().cpu()
        for pair in pairs
        for part in pair
    ]
    draw = torch.Generator().manual_seed(seed)
    shape = (layer.width, options.num_ensemble_members)
    noise = torch.randn(shape, generator=draw, dtype=torch.float64)
    moves = torch.linalg.solve_triangular(layer.cholesky.cpu().T, noise, upper=True)
    return torch.cat(weights, dim=1) + multiplier * moves.T
