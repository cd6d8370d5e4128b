"""Bringing metatrain's PET checkpoints of format 1 to 15 to format 16, today's.

Facts from metatrain 2026.4.1 (BSD-3-Clause), whose own upgrade the parity tests hold ours
against. Each step knows one change of the format. Steps that concern only the optimiser or the
bookkeeping of metatrain have no counterpart here. What a step pins (``PostLN``, ``Cosine``,
``grid``...) is what the models of that time computed; today's defaults would change their
predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pet_finetune.errors import CheckpointError

#: The newest model format of metatrain that can be read.
NEWEST_VERSION = 16


# An adapted layer X is X.linear (frozen), X.lora_A and X.lora_B: linear(x) + alpha / rank * B A x.
_A, _B, _LINEAR = ".lora_A.weight", ".lora_B.weight", ".linear."
#: What metatrain takes for ``alpha`` when the options leave it out.
_DEFAULT_ALPHA = 8.0


@dataclass
class RawCheckpoint:
    """The parts of a metatrain checkpoint that decide what the model predicts."""

    version: int
    hypers: dict[str, Any]
    #: The chosen state dict, without ``finetune_config``.
    state: dict[str, Tensor]
    #: Names of the targets, in the file's order.
    targets: tuple[str, ...]
    #: ``finetune_config``: how the model was fine-tuned, needed to undo its LoRA layers.
    finetune: dict[str, Any] = field(default_factory=dict)
    #: One factor for each target; formats before 7 keep them outside the TensorMap buffers.
    scales: dict[str, float] = field(default_factory=dict)


def upgrade(raw: RawCheckpoint, where: str) -> RawCheckpoint:
    """Bring a checkpoint to :data:`NEWEST_VERSION`, in place.

    Raises:
        CheckpointError: if its format is newer than that, or is not what it claims to be.
    """
    if not 1 <= raw.version <= NEWEST_VERSION:
        raise CheckpointError(
            f"{where}: metatrain's PET format {raw.version} is not known here; formats 1 to "
            f"{NEWEST_VERSION} are. Update pet-finetune, or write the checkpoint again with the "
            "metatrain release that this version supports."
        )
    while raw.version < NEWEST_VERSION:
        step = _STEPS.get(raw.version)
        if step is not None:
            try:
                step(raw)
            except (KeyError, IndexError, ValueError) as error:
                raise CheckpointError(
                    f"{where}: the file says it has metatrain's PET format {raw.version}, but "
                    f"lacks a part of it ({error})."
                ) from error
        raw.version += 1
    return raw


def _scales_leave_the_state(raw: RawCheckpoint) -> None:
    """6 to 7: one tensor with a factor for each target became a buffer for each target."""
    if "scaler.scales" in raw.state:
        factors = raw.state.pop("scaler.scales").tolist()
        raw.scales = {name: factors[index] for index, name in enumerate(raw.targets)}


def _one_architecture(raw: RawCheckpoint) -> None:
    """7 to 8: two generations of PET became one with options."""
    if "node_embedding.weight" in raw.state:
        # The large models of the second generation did not write these options down.
        d_pet = raw.hypers["d_pet"]
        raw.hypers.update(
            normalization="RMSNorm",
            activation="SwiGLU",
            transformer_type="PreLN",
            featurizer_type="feedforward",
            d_node=4 * d_pet,
            d_feedforward=2 * d_pet,
        )
    else:
        first_generation = {
            "normalization": "LayerNorm",
            "activation": "SiLU",
            "transformer_type": "PostLN",
            "featurizer_type": "residual",
            "d_node": raw.hypers["d_pet"],
        }
        for name, value in first_generation.items():
            raw.hypers.setdefault(name, value)
    raw.state = rename_before_8(raw.state)


def rename_before_8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the parameters of formats 1 to 7 the names and shapes of format 8.

    The embedding tables had one more row, for padding, which nothing uses any more.
    """
    large = "node_embedding.weight" in state
    renamed = {}
    for name, weight in state.items():
        if name == "node_embedding.weight":
            name, weight = "node_embedders.0.weight", weight[:-1]
        elif name == "embedding.weight":
            name, weight = "edge_embedder.weight", weight[:-1]
        elif name.endswith(".neighbor_embedder.weight"):
            weight = weight[:-1]
        elif name.endswith(".node_embedder.weight"):
            layer = name.split(".")[1]
            name, weight = f"node_embedders.{layer}.weight", weight[:-1]
        elif large:
            name = name.replace("combination_rmsnorms", "combination_norms")
        else:
            name = name.replace(".mlp.0.", ".mlp.w_in.").replace(".mlp.3.", ".mlp.w_out.")
        renamed[name] = weight
    return renamed


def _pin(**values: Any) -> Callable[[RawCheckpoint], None]:
    """A step that writes down what was not an option before."""

    def step(raw: RawCheckpoint) -> None:
        for name, value in values.items():
            raw.hypers.setdefault(name, value)

    return step


def _adaptive_width(raw: RawCheckpoint) -> None:
    """13 to 14: counting neighbours got a width of its own."""
    raw.hypers.setdefault("cutoff_width_adaptive", raw.hypers["cutoff_width"])


#: The parts of the network that hold weights.
NETWORK_PARTS = (
    "gnn_layers.",
    "node_embedders.",
    "edge_embedder.",
    "combination_norms.",
    "combination_mlps.",
    "node_heads.",
    "edge_heads.",
    "node_last_layers.",
    "edge_last_layers.",
    "system_conditioning.",
)
#: What moved below ``backend.``: these, and parts without weights.
_MOVED = (
    *NETWORK_PARTS,
    "gnn_layers_post_mp_node.",
    "gnn_layers_post_mp_edge.",
    "node_backbone.",
    "edge_backbone.",
    "species_to_species_index",
)


def _network_below_backend(raw: RawCheckpoint) -> None:
    """15 to 16: the network became a module of its own."""
    raw.state = {
        f"backend.{name}" if name.startswith(_MOVED) else name: weight
        for name, weight in raw.state.items()
    }


#: The change from each format to the next.
_STEPS: dict[int, Callable[[RawCheckpoint], None]] = {
    6: _scales_leave_the_state,
    7: _one_architecture,
    9: _pin(num_neighbors_adaptive=None, cutoff_function="Cosine"),
    10: _pin(attention_temperature=1.0),
    11: _pin(adaptive_cutoff_method="grid"),
    13: _adaptive_width,
    14: _pin(system_conditioning=False, max_charge=10, max_spin_multiplicity=10),
    15: _network_below_backend,
}


def merge_lora_layers(
    state: Mapping[str, Tensor], finetune: Mapping[str, Any], where: str, notices: list[str]
) -> dict[str, Tensor]:
    """Merge every LoRA layer of a state dict into the layer it adapts.

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
