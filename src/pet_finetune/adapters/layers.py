"""The layers of adapters: low-rank updates, rows of new elements, and prompts.

A linear layer with a low-rank update is y = x (W + s B A)^T + b (LoRA, arXiv:2106.09685).
Embeddings of new elements train while those of known elements stay as they are. Prompts are learned
tokens in every attention layer (LLaMA-Adapter, arXiv:2303.16199).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pet_finetune.backends.reference import multiply
from pet_finetune.errors import AdapterError
from pet_finetune.model.potential import Potential
from pet_finetune.nn.block import Attention, PromptTokens
from pet_finetune.nn.primitives import ROWS, GrownEmbedding
from pet_finetune.nn.projection import Adapted, LowRankUpdate, plain_linear
from pet_finetune.nn.quantized import QuantizedWeight, product, quantize

#: Endings of the names of all tensors that adapted layers and tables add to a network.
_OWN = (".lora_A", ".lora_B", ".lora_magnitude_vector", f".{ROWS}")


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

    The base weight may be held in few bits (:meth:`quantize`). Then the update always goes its own
    way beside the product with it, and ``weight`` is None but while merged.

    Args:
        base: the layer to adapt; its tensors are shared, not copied.
        rank: rank of the update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability of dropping an input of the adapter during training.
        use_rslora: scale by ``alpha / sqrt(rank)`` instead (rsLoRA, arXiv:2312.03732).
    """

    quantized: QuantizedWeight | None
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
        self.quantized = None
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.register_buffer("_base_weight", None, persistent=False)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """Scale of the product B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def merged(self) -> bool:
        """Whether the update is part of ``weight`` at the moment."""
        held_twice = self.quantized is not None and self.weight is not None
        return held_twice or self._base_weight is not None

    @property
    def fusable(self) -> bool:
        """Whether the kernels may fuse the layer: not with a quantised weight."""
        return self.quantized is None

    def quantize(self, bits: int) -> None:
        """Hold the base weight in 4 or 8 bits from now on; what it was is forgotten."""
        self.unmerge()
        self.quantized = quantize(self.weight, bits)
        self.weight = None  # type: ignore[assignment]

    def base_weight(self) -> Tensor:
        """The weight without the adapter, [out, in]; whatever is merged."""
        if self.quantized is not None:
            return self.quantized.dense(self.lora_A.dtype)
        return self.weight if self._base_weight is None else self._base_weight

    def _times_base(self, x: Tensor) -> Tensor:
        """The product with that weight, [..., in] to [..., out]."""
        return x @ self.weight.T if self.quantized is None else product(x, self.quantized)

    def delta(self) -> Tensor:
        """The update of the weight, [out, in], differentiable."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def updated_weight(self) -> Tensor:
        """The base weight with the adapter, [out, in], differentiable; whatever is merged."""
        # One operation; the base's bits stay as they are where B is zero.
        return torch.addmm(self.base_weight(), self.lora_B, self.lora_A, alpha=self.scaling)

    def effective_weight(self) -> Tensor:
        """W + s B A, [out, in]; W alone if the adapter is disabled or computed separately."""
        return self.base_weight() if self._goes_apart else self._whole_weight()

    def _whole_weight(self) -> Tensor:
        """Effective weight of the layer, without dropout."""
        if not self.enabled:
            return self.base_weight()
        if self.made is not None:
            return self.made
        return self.weight if self.merged else self.updated_weight()

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float] | None:
        """See :class:`~pet_finetune.nn.projection.Adapted`."""
        if self.merged or self._goes_apart or not self.enabled:
            return None
        return self.weight, self.lora_A, self.lora_B, self.scaling

    @property
    def _goes_apart(self) -> bool:
        drops = self.training and self.dropout > 0.0
        return (drops or self.quantized is not None) and self.enabled and not self.merged

    def apart(self, x: Tensor) -> Tensor | None:
        """The update's own path, for dropout or a quantised weight: [n, in] to [n, out]."""
        if not self._goes_apart:
            return None
        return self._beside(nn.functional.dropout(x, self.dropout, self.training))

    def _beside(self, x: Tensor) -> Tensor:
        """Output of the adapter from two thin products."""
        return self.scaling * ((x @ self.lora_A.T) @ self.lora_B.T)

    def low_rank_update(self) -> LowRankUpdate | None:
        """The trained update."""
        if self.quantized is not None or self._goes_apart or self.merged or not self.enabled:
            return None
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return None
        with torch.no_grad():
            weight = self.effective_weight()
        return LowRankUpdate(weight, self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.quantized is not None and not (self.merged and self.enabled):
            out = product(x, self.quantized, self.bias)
        else:
            out = multiply(x, self.effective_weight(), self.bias)
        apart = self.apart(x)
        return out if apart is None else out + apart

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into ``weight``; the base weight is kept for :meth:`unmerge`."""
        if self.quantized is not None:
            self.weight = nn.Parameter(self._whole_weight(), requires_grad=False)
        elif not self.merged:
            base = self.weight.detach().clone()
            self.weight.copy_(self.updated_weight())
            self._base_weight = base

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give ``weight`` back the base's value, to the last bit."""
        if self.quantized is not None:
            self.weight = None  # type: ignore[assignment]
        elif self._base_weight is not None:
            self.weight.copy_(self._base_weight)
            self._base_weight = None

    def base_linear(self) -> nn.Linear:
        """The layer as it was before it was adapted, with the very same parameters."""
        self.unmerge()
        return plain_linear(cast("nn.Parameter", self.weight), self.bias)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the update merged, for a model without adapters."""
        with torch.no_grad():
            weight = nn.Parameter(self._whole_weight().detach().clone())
            bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return plain_linear(weight, bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


_SHORTEST = 1e-30


class DoraLinear(LoraLinear):
    """A frozen linear layer with the weight ``m (W + s B A) / |W + s B A|``, row by row.

    The lengths m, [out], start as those of the rows of W, and B starts at zero, so the factor is
    exactly 1 at the start. The norm in the denominator counts as a constant when gradients are
    taken, as the paper (section 4.3) and Hugging Face PEFT have it.
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
        """Scale of each row of W + s B A, [out]."""
        return self.lora_magnitude_vector / _row_norms(weight.detach())

    def _beside(self, x: Tensor) -> Tensor:
        """Output added to the base's; dropout applies to both parts."""
        stretch = self._stretch(super().updated_weight())
        return (stretch - 1) * self._times_base(x) + stretch * super()._beside(x)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float] | None:
        """None: the rows are stretched."""
        return None

    def low_rank_update(self) -> LowRankUpdate | None:
        """None: the lengths train too, so the weight's gradient is needed whole."""
        return None


def _row_norms(weight: Tensor) -> Tensor:
    """Lengths of the rows, [out]; never zero, which some layers' rows are before training."""
    return torch.linalg.vector_norm(weight, dim=1).clamp_min(_SHORTEST)


def grown_tables(model: Potential) -> Iterator[tuple[str, GrownEmbedding]]:
    """The tables of a model with rows that train apart, with their paths in the network."""
    for path, table in model.network.species_embeddings().items():
        if isinstance(table, GrownEmbedding):
            yield path, table


def train_new_rows(model: Potential, species: Sequence[int]) -> None:
    """Let the embeddings of some species that the model knows train and keep all others, in place.

    Tables that train whole are left as they are.
    """
    rows = [model.species.index(number) for number in species]
    if not rows:
        return
    for path, table in model.network.species_embeddings().items():
        assert isinstance(table, nn.Embedding), f"{path} trains rows of its own already"
        if not table.weight.requires_grad:
            model.network.set_submodule(path, GrownEmbedding(table, rows).train(table.training))


def drop_new_rows(model: Potential) -> None:
    """Give tables back as they were before their rows trained, in place."""
    for path, table in list(grown_tables(model)):
        model.network.set_submodule(path, table.base_embedding())


def merge_new_rows(model: Potential) -> Potential:
    """Write trained rows into their tables, in place, and return the model."""
    for path, table in list(grown_tables(model)):
        model.network.set_submodule(path, table.to_embedding())
    return model


def _attentions(model: Potential) -> Iterator[tuple[str, Attention]]:
    for path, module in model.network.named_modules():
        if isinstance(module, Attention):
            yield path, module


def prompts(model: Potential) -> dict[str, PromptTokens]:
    """The prompts of a model by their path in the network."""
    found = ((f"{path}.prompt", attention.prompt) for path, attention in _attentions(model))
    return {path: prompt for path, prompt in found if prompt is not None}


def add_prompts(model: Potential, length: int) -> None:
    """Give every attention layer of a model a fresh prompt, in place; no prediction changes."""
    if model.hypers.num_prompts:
        raise AdapterError(
            f"The model has {model.hypers.num_prompts} prompt tokens in each layer already, which "
            "an earlier run of prompt tuning left in it. Start from the model that run started "
            "from, or fine-tune this one with another method."
        )
    for _, attention in _attentions(model):
        width, heads = attention.output_linear.in_features, attention.num_heads
        prompt = PromptTokens(length, width, heads).to(device=model.device, dtype=model.dtype)
        attention.prompt = prompt.train(attention.training)
    _set_number(model, length)


def remove_prompts(model: Potential) -> None:
    """The opposite of :func:`add_prompts`."""
    for _, attention in _attentions(model):
        attention.prompt = None
    _set_number(model, 0)


def _set_number(model: Potential, length: int) -> None:
    model.hypers = model.hypers.model_copy(update={"num_prompts": length})
    model.network.options = model.hypers
