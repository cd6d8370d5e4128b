"""Predictions of energies, with forces and stresses, and with an uncertainty.

Torch's inference mode records none of what derivatives need: here they are computed outside it.

The uncertainty comes from what the last layer of a target sees (metatrain's LLPR). With the
features f of a structure (sums over its atoms of what the last layer multiplies with its weights)
and their covariance C over the training set, the last-layer prediction rigidity of Bigi et al.
(Mach. Learn.: Sci. Technol. 5, 045018 (2024), https://doi.org/10.1088/2632-2153/ad805f) gives

    sigma^2 = alpha^2 f^T C^-1 f

with a factor alpha that a validation set sets. Members of an ensemble have last layers drawn from
the same distribution, so that derivatives have a spread as well. TorchScript reads the annotations
of :class:`LastLayer`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pet_finetune.backends.reference import permute_rows
from pet_finetune.graph import Batch
from pet_finetune.keys import TargetSpec
from pet_finetune.nn.quantized import FixedBuffers


def features_key(target: str) -> str:
    """Under which name the network returns what the last layer of a target sees."""
    return target + " (features)"


@dataclass(frozen=True)
class Prediction:
    """Prediction for a batch.

    Attributes:
        energy: [n_structures] float64, eV.
        atom_energies: [n_atoms] float64, eV; they sum to ``energy``.
        forces: [n_atoms, 3], eV/Angstrom, or None.
        stress: [n_structures, 3, 3], eV/Angstrom^3, symmetric, zero without a 3D cell; or None.
        features: what the last layer sees, [n_atoms, last_layer_width], where it is asked for.
    """

    energy: Tensor
    atom_energies: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None
    features: Tensor | None = None


def with_leaves(batch: Batch, far: bool, derive: bool) -> tuple[Batch, list[Tensor]]:
    """The batch with the tensors that its energies are differentiated by, and those tensors.

    Args:
        batch: the structures.
        far: whether the network has long-range features, which read positions and cells beside the
            edge vectors.
        derive: whether derivatives will be taken.
    """
    names = ("edge_vectors", "positions", "cells")[: 3 if far else 1]
    leaves = [getattr(batch, name).detach().requires_grad_(derive) for name in names]
    return batch._replace(**dict(zip(names, leaves, strict=True))), leaves


def forces_of(batch: Batch, gradients: Sequence[Tensor]) -> Tensor:
    """Forces from the energy's gradients on :func:`with_leaves`, [n_atoms, 3]."""
    gradient, *far = gradients
    pulls = gradient - permute_rows(gradient, batch.reverse, batch.reverse)
    forces = gradient.new_zeros(batch.num_atoms, 3).index_add(0, batch.centers, pulls)
    return forces - far[0] if far else forces


def stress_of(batch: Batch, gradients: Sequence[Tensor]) -> Tensor:
    """Symmetric stress, [n_structures, 3, 3]; zero where no volume is defined."""
    gradient, *far = gradients
    outer = batch.edge_vectors.detach().unsqueeze(-1) * gradient.unsqueeze(-2)
    virial = gradient.new_zeros(batch.num_structures, 3, 3).index_add(
        0, batch.structure_index[batch.centers], outer
    )
    if far:
        by_positions, by_cells = far
        outer = batch.positions.detach().unsqueeze(-1) * by_positions.unsqueeze(-2)
        virial = virial.index_add(0, batch.structure_index, outer)
        virial = virial + batch.cells.detach().transpose(1, 2) @ by_cells
    volumes = batch.volumes.view(-1, 1, 1)
    inverse = torch.where(volumes > 0, 1.0 / volumes.clamp_min(1e-30), 0.0)
    return 0.5 * (virial + virial.transpose(1, 2)) * inverse


@dataclass(frozen=True)
class Property:
    """Prediction of a target that is not an energy.

    Attributes:
        spec: the target.
        values: [n_atoms, ...] or [n_structures, ...] with ``spec.shape`` behind, in ``spec.unit``;
            scalars in float64, vectors and tensors in the network's dtype.
        features: as in :class:`Prediction`.
    """

    spec: TargetSpec
    values: Tensor
    features: Tensor | None = None


def property_of(
    batch: Batch, spec: TargetSpec, raw: Tensor, scale: Tensor, baseline: Tensor | None
) -> Property:
    """Make a prediction of the network's output.

    Args:
        batch: what it was computed for.
        spec: the target.
        raw: [n_atoms, num_outputs], Cartesian axes first, as metatrain orders them.
        scale: factor of each atom and subtarget, [n_atoms, num_subtargets], or one for all.
        baseline: [n_atoms] or [n_atoms, num_subtargets] float64, in ``spec.unit``; None for none.
    """
    scale = scale.to(raw)
    if scale.dim() > 0:
        scale = scale.view(scale.shape[0], *(1,) * spec.rank, -1)
    values = raw.view(raw.shape[0], *(3,) * spec.rank, spec.num_subtargets) * scale
    values = values.reshape(raw.shape[0], *spec.shape)
    if baseline is not None:
        values = values.to(torch.float64) + baseline.reshape(values.shape)
    elif spec.rank == 0:
        values = values.to(torch.float64)
    if not spec.per_atom:
        values = values.new_zeros(batch.num_structures, *spec.shape).index_add(
            0, batch.structure_index, values
        )
    return Property(spec, _over_volume(batch, values) if spec.per_volume else values)


def _over_volume(batch: Batch, values: Tensor) -> Tensor:
    """Symmetric part over the volume, [n_structures, 3, 3, ...]; zero without a volume."""
    volumes = batch.volumes.to(values)
    inverse = torch.where(volumes > 0, 1.0 / volumes.clamp_min(1e-30), 0.0)
    symmetric = 0.5 * (values + values.transpose(1, 2))
    return symmetric * inverse.view(-1, *(1,) * (values.dim() - 1))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and back in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def autograd_possible(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Compute outside the caller's inference mode; gradients stay enabled or disabled.

    Tensors made in that mode can never take part in a derivative. Weights that were (a model that
    was built or moved there) are replaced by equal ones for good.

    Args:
        model: what computes.
        batch: its input.

    Yields:
        The input, of tensors that autograd takes.
    """
    made_inside = batch.edge_vectors.is_inference() or next(model.parameters()).is_inference()
    if not (made_inside or torch.is_inference_mode_enabled()):
        yield batch
        return
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        _replace_weights(model)
        yield batch.map(_recordable)


def _recordable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _replace_weights(model: nn.Module) -> None:
    """Give a model ordinary tensors in place of those made in inference mode."""
    known: dict[int, nn.Parameter] = {}  # one parameter may stand in several modules
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_inference():
                new = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                module._parameters[name] = known.setdefault(id(weight), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _recordable(buffer)


#: The largest regularizer that is tried.
_MOST = 1e16


class LastLayer(FixedBuffers):
    """The uncertainty of one target, in the target's unit; all in float64.

    Args:
        covariance: of the features over the training set, [k, k].
        cholesky: lower triangular L of the regularised covariance, L L^T, [k, k].
        multiplier: alpha.
        members: last-layer weights of an ensemble, [n_members, k]; what they have in common does
            not matter. None for no ensemble.
        fingerprint: of the weights that it belongs to, as
            :func:`~pet_finetune.adapters.base_weights.target_fingerprints` gives it.

    Raises:
        ValueError: shapes that do not go together, or numbers that cannot be.
    """

    covariance: Tensor
    cholesky: Tensor
    multiplier: Tensor
    members: Tensor
    fingerprint: str

    def __init__(
        self,
        covariance: Tensor,
        cholesky: Tensor,
        multiplier: float | Tensor,
        members: Tensor | None = None,
        fingerprint: str = "",
    ) -> None:
        super().__init__()
        width = cholesky.shape[0] if cholesky.dim() else 0
        if members is None:
            members = torch.zeros(0, width)
        given = {
            "covariance": (covariance, (width, width)),
            "cholesky": (cholesky, (width, width)),
            "multiplier": (torch.as_tensor(multiplier, dtype=torch.float64), ()),
            "members": (members, (*members.shape[:1], width)),
        }
        for name, (values, shape) in given.items():
            if values.shape != shape:
                raise ValueError(
                    f"its {name} has the shape {tuple(values.shape)}, and {tuple(shape)} is needed"
                )
            if not bool(values.isfinite().all()):
                raise ValueError(f"its {name} holds what is no number")
            self.register_buffer(name, values.detach().to(torch.float64).clone())
        if not bool((self.cholesky.diagonal() > 0).all()) or float(self.multiplier) < 0:
            raise ValueError("its covariance or its factor is not positive")
        self.fingerprint = fingerprint

    @property
    def width(self) -> int:
        """Number of features."""
        return self.cholesky.shape[0]

    @property
    def num_members(self) -> int:
        """Number of ensemble members; 0 without an ensemble."""
        return self.members.shape[0]

    def forward(self, features: Tensor) -> Tensor:
        """Standard deviation for each row of features: [n, k] to [n] float64."""
        rows = features.to(torch.float64).transpose(0, 1)
        whitened = torch.linalg.solve_triangular(self.cholesky, rows, upper=False)
        return self.multiplier * torch.linalg.vector_norm(whitened, dim=0)

    def deviations(self, features: Tensor) -> Tensor:
        """Deviations of the members from the prediction: [n, k] to [n, n_members] float64.

        Their mean is zero: the mean of the ensemble is the prediction, as in metatrain.
        """
        centred = self.members - self.members.mean(0, keepdim=True)
        return features.to(torch.float64) @ centred.transpose(0, 1)


def cholesky_of(
    covariance: Tensor, regularizer: float | None = None, smallest: float = 1e-20
) -> Tensor:
    """Lower triangular L with L L^T = C + regularizer * 1, [k, k] float64.

    Args:
        covariance: C, [k, k].
        regularizer: None for the first of ``smallest``, ten times that, and so on with which the
            matrix can be decomposed, as metatrain does.
        smallest: to begin with.

    Raises:
        ValueError: it cannot be decomposed.
    """
    matrix = 0.5 * (covariance + covariance.T).to(torch.float64)
    identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    tried = smallest if regularizer is None else regularizer
    while tried < _MOST:
        factor, failed = torch.linalg.cholesky_ex(matrix + tried * identity)
        if not int(failed) and bool(factor.isfinite().all()):
            return factor
        if regularizer is not None:
            break
        tried *= 10.0
    raise ValueError(
        f"the covariance of its features cannot be decomposed with the regularizer {tried:g}"
    )
