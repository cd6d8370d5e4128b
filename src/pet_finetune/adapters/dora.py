"""A linear layer whose update is decomposed into length and direction (DoRA, arXiv:2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pet_finetune.nn.projection import LowRankUpdate

from .lora import LoraLinear

_SHORTEST = 1e-30


class DoraLinear(LoraLinear):
    """A frozen linear layer with the weight ``m (W + s B A) / |W + s B A|``, row by row.

    The lengths m, [out], start as those of the rows of W, and B starts at zero, so the factor is
    exactly 1 at the start. The norm in the denominator counts as a constant when gradients are
    taken, as the paper (section 4.3) and Hugging Face PEFT have it.

    Args:
        base, rank, alpha, dropout, use_rslora: as for :class:`LoraLinear`.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, use_rslora)
        self.lora_magnitude_vector = nn.Parameter(_row_norms(base.weight.detach()))

    @torch.no_grad()
    def measure_lengths(self) -> None:
        """Start from the lengths of the base's rows as they are now."""
        self.lora_magnitude_vector.copy_(_row_norms(self.base_weight()))

    def updated_weight(self) -> Tensor:
        """The base weight turned and stretched, [out, in], differentiable."""
        weight = super().updated_weight()
        return self._stretch(weight).unsqueeze(1) * weight

    def _stretch(self, weight: Tensor) -> Tensor:
        """What the rows of W + s B A are multiplied with, [out]."""
        return self.lora_magnitude_vector / _row_norms(weight.detach())

    def _beside(self, x: Tensor) -> Tensor:
        """What is added to the base's output; the dropped inputs count for both its parts."""
        stretch = self._stretch(super().updated_weight())
        return (stretch - 1) * self._times_base(x) + stretch * super()._beside(x)

    def low_rank_update(self) -> LowRankUpdate | None:
        """None: the lengths train too, so the weight's gradient is needed whole."""
        return None


def _row_norms(weight: Tensor) -> Tensor:
    """Lengths of the rows, [out]; never zero, which some layers' rows are before training."""
    return torch.linalg.vector_norm(weight, dim=1).clamp_min(_SHORTEST)
