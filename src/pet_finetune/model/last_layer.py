"""Uncertainty from what the last layer of a target sees: metatrain's LLPR.

With the features f of a structure (sums over its atoms of what the last layer multiplies with its
weights) and their covariance C over the training set, the last-layer prediction rigidity of Bigi et
al. (Mach. Learn.: Sci. Technol. 5, 045018 (2024), https://doi.org/10.1088/2632-2153/ad805f) gives

    sigma^2 = alpha^2 f^T C^-1 f

with a factor alpha that a validation set sets. Members of an ensemble have last layers drawn from
the same distribution, so that derivatives have a spread as well.

TorchScript reads the annotations of the class.
"""

import torch
from torch import Tensor

from pet_finetune.nn.quantized import FixedBuffers

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
        """How many features there are."""
        return self.cholesky.shape[0]

    @property
    def num_members(self) -> int:
        """How many members the ensemble has; 0 without one."""
        return self.members.shape[0]

    def forward(self, features: Tensor) -> Tensor:
        """Standard deviation for each row of features: [n, k] to [n] float64."""
        rows = features.to(torch.float64).transpose(0, 1)
        whitened = torch.linalg.solve_triangular(self.cholesky, rows, upper=False)
        return self.multiplier * torch.linalg.vector_norm(whitened, dim=0)

    def deviations(self, features: Tensor) -> Tensor:
        """What members say less the prediction: [n, k] to [n, n_members] float64.

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
