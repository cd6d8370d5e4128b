"""A linear layer with a low-rank update: y = x (W + s B A)^T + b (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pet_finetune.nn.projection import Adapted, LowRankUpdate


class LoraLinear(Adapted):
    """A frozen linear layer and its adapter.

    ``weight`` and ``bias`` keep their names, so the layer's state dict is the base's plus
    ``lora_A`` and ``lora_B``. B starts at zero, hence a fresh adapter changes no output bit.

    The update is added to the weight, not to the output: for layers as narrow as PET's one
    matrix product with ``W + s B A`` is cheaper than two thin ones beside the first, and the
    merged layer computes the very same numbers. Dropout acts on the adapter's input, so while
    it is active (in training) the two paths are computed apart.

    Args:
        base: the layer to adapt; its tensors are shared, not copied.
        rank: rank of the update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability of dropping an input of the adapter during training.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.enabled = True
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self._base_weight: Tensor | None = None
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied with."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether the update is part of ``weight`` at the moment."""
        return self._base_weight is not None

    def effective_weight(self) -> Tensor:
        """W + s B A, [out, in]; W alone where the adapter is disabled or goes apart."""
        if not self.enabled:
            return self.weight if self._base_weight is None else self._base_weight
        if self.merged or self._drops:
            return self.weight
        return self.weight + self.scaling * (self.lora_B @ self.lora_A)

    @property
    def _drops(self) -> bool:
        active = self.training and self.dropout > 0.0
        return active and self.enabled and not self.merged

    def apart(self, x: Tensor) -> Tensor | None:
        """The update's own path, which only dropout needs: [n, in] to [n, out]."""
        if not self._drops:
            return None
        thin = nn.functional.dropout(x, self.dropout) @ self.lora_A.T
        return self.scaling * (thin @ self.lora_B.T)

    def low_rank_update(self) -> LowRankUpdate | None:
        """The update, where it is what trains."""
        frozen = not self.weight.requires_grad and (
            self.bias is None or not self.bias.requires_grad
        )
        if self._drops or self.merged or not (frozen and self.enabled):
            return None
        with torch.no_grad():
            weight = self.effective_weight()
        return LowRankUpdate(weight, self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out = nn.functional.linear(x, self.effective_weight(), self.bias)
        apart = self.apart(x)
        return out if apart is None else out + apart

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into ``weight``; the base weight is kept for :meth:`unmerge`."""
        if not self.merged:
            base = self.weight.detach().clone()
            self.weight.copy_(base + self.scaling * (self.lora_B @ self.lora_A))
            self._base_weight = base

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give ``weight`` back the base's value, to the last bit."""
        if self._base_weight is not None:
            self.weight.copy_(self._base_weight)
            self._base_weight = None

    def to_linear(self) -> nn.Linear:
        """A plain layer with the update merged, for a model without adapters."""
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            plain.weight.copy_(self.effective_weight())
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"
