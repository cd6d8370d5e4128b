"""Factors of a low-rank update to start from, other than B = 0.

Both take the factors out of the weight itself, so that training begins with its most important
directions. The papers subtract the factors' product from the frozen weight; here the weight stays
and the product at the start is subtracted from the update (:meth:`.lora.LoraLinear.start_from`),
which is the same sum and exact at the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Principal singular values and vectors (PiSSA, arXiv:2404.02948, equations 2 and 3).

    Args:
        weight: [out, in].
        rank: how many singular values, r.
        scaling: of the update; ``scaling * b @ a`` is the weight's best approximation of rank r.

    Returns:
        a, [r, in], and b, [out, r].
    """
    u, s, vh = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root.unsqueeze(1) * vh[:rank], u[:, :rank] * root


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of the weight's QR decomposition (arXiv:2406.01775).

    Args:
        weight, rank: as for :func:`pissa`.
        scaling: has no part in it: the product is then ``scaling`` times a part of the weight.

    Returns:
        a, [r, in], and b, [out, r], with orthonormal columns.
    """
    q, r = torch.linalg.qr(weight.to(torch.float64))
    return r[:rank], q[:, :rank]


STARTS = {"pissa": pissa, "olora": olora}
