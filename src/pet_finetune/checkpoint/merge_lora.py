"""Turning the LoRA layers in a metatrain checkpoint into plain weights.

metatrain keeps an adapted layer ``X`` as ``X.linear`` (the frozen layer), ``X.lora_A`` and
``X.lora_B``, and computes ``linear(x) + alpha / rank * B A x``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pet_finetune.errors import CheckpointError

__all__ = ["merge_lora_layers"]

_A, _B, _LINEAR = ".lora_A.weight", ".lora_B.weight", ".linear."
#: What metatrain takes for ``alpha`` when the options leave it out.
_DEFAULT_ALPHA = 8.0


def merge_lora_layers(
    state: Mapping[str, Tensor], finetune: Mapping[str, Any], where: str, notices: list[str]
) -> dict[str, Tensor]:
    """Merge every LoRA layer of a state dict into the layer it adapts.

    Args:
        state: names and tensors of the checkpoint's model.
        finetune: the checkpoint's ``finetune_config``, which holds ``alpha``.
        where: what to call the file in messages.
        notices: one line is appended when something was merged.

    Returns:
        a state dict as a model without LoRA has it.

    Raises:
        CheckpointError: if there are such layers and ``alpha`` or a part of them is missing.
    """
    layers = [name.removesuffix(_A) for name in state if name.endswith(_A)]
    if not layers:
        return dict(state)
    config = finetune.get("config")
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{where}: the checkpoint has LoRA layers, but not the alpha they were trained with "
            "(finetune_config). Merge them where they were trained."
        )
    alpha = float(config.get("alpha", _DEFAULT_ALPHA))
    merged = dict(state)
    for layer in layers:
        down, up = merged.pop(layer + _A), merged.pop(layer + _B, None)
        weight = merged.pop(f"{layer}{_LINEAR}weight", None)
        if up is None or weight is None or up.shape[1:] != down.shape[:1]:
            raise CheckpointError(f"{where}: the LoRA layer {layer} is incomplete.")
        update = up.to(torch.float64) @ down.to(torch.float64) * (alpha / down.shape[0])
        merged[f"{layer}.weight"] = (weight.to(torch.float64) + update).to(weight.dtype)
        bias = merged.pop(f"{layer}{_LINEAR}bias", None)
        if bias is not None:
            merged[f"{layer}.bias"] = bias
    notices.append(
        f"{len(layers)} LoRA layers of the file (alpha {alpha:g}) were merged into its weights."
    )
    return merged
