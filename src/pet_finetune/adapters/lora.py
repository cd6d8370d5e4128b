"""A linear layer with a low-rank update: y = x (W + s B A)^T + b (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune.nn.embedding import ROWS
from pet_finetune.nn.projection import Adapted, LowRankUpdate

#: Endings of the names of all tensors that adapted layers and tables add to a network.
_OWN = (".lora_A", ".lora_B", ".lora_magnitude_vector", ".start_A", ".start_B", f".{ROWS}")


def is_adapter_tensor(name: str) -> bool:
    """Whether a name in a network's state dict is one that an adapter added."""
    return name.endswith(_OWN)


class LoraLinear(Adapted):
    """A frozen linear layer and its adapter.

    ``weight`` and ``bias`` keep their names, so the layer's state dict is the base's plus
    ``lora_A`` and ``lora_B``. B starts at zero, hence a fresh adapter changes no output bit.

    The update is added to the weight, not to the output: for layers as narrow as PET's one
    matrix product with ``W + s B A`` is cheaper than two thin ones beside the first, and the
    merged layer computes the very same numbers. Dropout acts on the adapter's input, so while
    it is active (in training) the two paths are computed apart.

    Where training starts from other factors than B = 0 (:meth:`start_from`), the update is what
    the factors' product has gained since, ``s (B A - B0 A0)``, which is zero to the last bit at
    the start.

    Args:
        base: the layer to adapt; its tensors are shared, not copied.
        rank: rank of the update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability of dropping an input of the adapter during training.
        use_rslora: scale by ``alpha / sqrt(rank)`` instead (rsLoRA, arXiv:2312.03732).
    """

    start_A: Tensor | None
    start_B: Tensor | None
    _base_weight: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.enabled = True
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.register_buffer("_base_weight", None, persistent=False)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def merged(self) -> bool:
        """Whether the update is part of ``weight`` at the moment."""
        return self._base_weight is not None

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Begin with the factors A, [r, in], and B, [out, r]; the layer's output stays."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def delta(self) -> Tensor:
        """The update of the weight, [out, in], differentiable."""
        product = self.lora_B @ self.lora_A
        if self.start_A is not None and self.start_B is not None:
            product = product - self.start_B @ self.start_A
        return self.scaling * product

    def updated_weight(self) -> Tensor:
        """The base weight with the adapter, [out, in], differentiable; whatever is merged."""
        base = self.weight if self._base_weight is None else self._base_weight
        return base + self.delta()

    def effective_weight(self) -> Tensor:
        """W + s B A, [out, in]; W alone where the adapter is disabled or goes apart."""
        if not self.enabled:
            return self.weight if self._base_weight is None else self._base_weight
        if self.merged or self._drops:
            return self.weight
        return self.updated_weight()

    @property
    def _drops(self) -> bool:
        active = self.training and self.dropout > 0.0
        return active and self.enabled and not self.merged

    def apart(self, x: Tensor) -> Tensor | None:
        """The update's own path, which only dropout needs: [n, in] to [n, out]."""
        if not self._drops:
            return None
        return self._dropped(nn.functional.dropout(x, self.dropout))

    def _dropped(self, x: Tensor) -> Tensor:
        """What the adapter adds for inputs of which some were dropped."""
        out = (x @ self.lora_A.T) @ self.lora_B.T
        if self.start_A is not None and self.start_B is not None:
            out = out - (x @ self.start_A.T) @ self.start_B.T
        return self.scaling * out

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
            self.weight.copy_(self.updated_weight())
            self._base_weight = base

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give ``weight`` back the base's value, to the last bit."""
        if self._base_weight is not None:
            self.weight.copy_(self._base_weight)
            self._base_weight = None

    def base_linear(self) -> nn.Linear:
        """The layer as it was before it was adapted, with the very same parameters."""
        self.unmerge()
        return _plain(cast("nn.Parameter", self.weight), self.bias)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the update merged, for a model without adapters."""
        with torch.no_grad():
            weight = nn.Parameter(self.effective_weight().detach().clone())
            bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return _plain(weight, bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def _plain(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer made of these parameters, without drawing any."""
    out_features, in_features = weight.shape
    plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    plain.weight = weight
    plain.bias = bias  # type: ignore[assignment]  # None without one, as torch has it
    return plain
