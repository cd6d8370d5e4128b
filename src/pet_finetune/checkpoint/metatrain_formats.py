"""metatrain's other formats: PET checkpoints 1 to 15, brought to 16, and uncertainties (LLPR).

Facts from metatrain 2026.4.1 (BSD-3-Clause), which the parity tests hold against its own upgrade
and against what it computes. Each step of the upgrade knows one change of the format. Steps that
concern only the optimiser or the bookkeeping of metatrain have no counterpart here. What a step
pins (``PostLN``, ``Cosine``, ``grid``...) is what the models of that time computed; today's
defaults would change their predictions. Of LLPR the formats 1 to 4 are read; numbers of a target
are in its unit, as those of its predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pet_finetune.adapters.base_weights import target_fingerprints
from pet_finetune.errors import CheckpointError
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import LastLayer, cholesky_of

from .archive import TorchArchive
from .native import stored_tensor

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


#: The architecture's name.
LLPR = "llpr"
_VERSION, _TRAINER_VERSION = 4, 7
_ENSEMBLE = "llpr_ensemble_layers.{}.weight"


def uncertainty_name(target: str) -> str:
    """Metatrain's name of the uncertainty of a target."""
    if target == "energy":
        return "energy_uncertainty"
    return f"mtt::aux::{target.replace('mtt::', '')}_uncertainty"


def read_llpr(
    archive: TorchArchive,
    content: Mapping[str, Any],
    model: Potential,
    factors: Mapping[str, float],
    notices: list[str],
) -> None:
    """Give a model the uncertainties that a checkpoint has of its targets.

    Raises:
        CheckpointError: the format is newer, or the wrapper damaged.
    """
    version = content.get("model_ckpt_version", 1)
    if type(version) is not int or version > _VERSION:
        raise CheckpointError(
            f"{archive.path}: this checkpoint of '{LLPR}' has the format {version!r}, and formats "
            f"1 to {_VERSION} are known. Update pet-finetune."
        )
    last = content.get("model_state_dict", content.get("state_dict"))
    chosen = content.get("best_model_state_dict") or last
    if not isinstance(chosen, dict):
        raise archive.damaged(f"the '{LLPR}' in it has no state")
    state = archive.tensors(chosen)
    old = state.pop("energy_ensemble_weights", None)  # formats 1 and 2
    if old is not None:
        state[_ENSEMBLE.format("energy")] = old.T
    fingerprints = target_fingerprints(model, model.targets)
    for target in model.targets:
        try:
            layer = _layer(state, target, factors[target], fingerprints[target], notices)
            if layer is not None:
                model.set_uncertainty(target, layer)
        except ValueError as error:
            raise archive.damaged(f"the uncertainty of '{target}': {error}") from error
    known = {f"multiplier_{uncertainty_name(target)}" for target in model.targets}
    for name in state:
        if name.startswith("multiplier_") and name not in known:
            notices.append(f"Left out: {name.removeprefix('multiplier_')}: no such target is used.")
    if not model.uncertainties:
        notices.append(
            "The file is of 'llpr', an uncertainty around a model, and holds none of its targets: "
            "the model is used without it."
        )


def _layer(
    state: Mapping[str, Tensor],
    target: str,
    factor: float,
    fingerprint: str,
    notices: list[str],
) -> LastLayer | None:
    """The uncertainty of one target; None where it was never calibrated."""
    name = uncertainty_name(target)
    parts = [state.get(f"{part}_{name}") for part in ("covariance", "cholesky", "multiplier")]
    covariance, cholesky, multiplier = (None if p is None else p.double() for p in parts)
    if covariance is None or multiplier is None or not bool(covariance.any()):
        return None
    if cholesky is None:  # formats before 4
        cholesky = cholesky_of(covariance)
    if multiplier.numel() != 1:
        raise ValueError(f"it has {multiplier.numel()} factors instead of one")
    members = state.get(_ENSEMBLE.format(target))
    if members is not None and members.shape[1:] != covariance.shape[1:]:
        notices.append(
            f"Left out: the ensemble of '{target}', whose weights have the shape "
            f"{tuple(members.shape)} and not members x {len(covariance)}."
        )
        members = None
    if members is not None:
        members = members.double() * factor
    multiplier = multiplier.reshape(()) * factor
    return LastLayer(covariance, cholesky, multiplier, members, fingerprint)


def wrapped_content(
    content: Mapping[str, Any],
    layers: Mapping[str, LastLayer],
    targets: Mapping[str, str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The checkpoint of a PET with an LLPR around it.

    Args:
        content: the checkpoint of the PET.
        layers: uncertainties by our names of the targets.
        targets: metatrain's name of each target, and ours.
        dtype: of the weights, in which metatrain keeps all of this.
    """
    state: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for new, old in targets.items():
        layer = layers.get(old)
        if layer is None:
            continue
        name = uncertainty_name(new)
        state[f"covariance_{name}"] = stored_tensor(layer.covariance.to(dtype))
        state[f"cholesky_{name}"] = stored_tensor(layer.cholesky.to(dtype))
        state[f"multiplier_{name}"] = stored_tensor(layer.multiplier.to(dtype).reshape(1))
        if layer.num_members:
            sizes[new] = layer.num_members
    for new, old in targets.items():
        if new in sizes:
            state[_ENSEMBLE.format(new)] = stored_tensor(layers[old].members.to(dtype))
    return {
        **content,  # what a restart of the trainer looks for
        "architecture_name": LLPR,
        "model_ckpt_version": _VERSION,
        "model_data": {
            "hypers": {"num_ensemble_members": sizes},
            "dataset_info": content["model_data"]["dataset_info"],
        },
        "model_state_dict": state,
        "best_model_state_dict": state,
        "wrapped_model_checkpoint": content,
        "trainer_ckpt_version": _TRAINER_VERSION,
    }
