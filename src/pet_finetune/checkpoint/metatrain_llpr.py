"""metatrain's LLPR: an uncertainty around a PET, in checkpoints of the architecture ``llpr``.

Facts from metatrain 2026.4.1 (BSD-3-Clause), formats 1 to 4, which the parity tests hold against
what it computes. Numbers of a target are in its unit, as those of its predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pet_finetune.adapters.base_weights import target_fingerprints
from pet_finetune.errors import CheckpointError
from pet_finetune.model.last_layer import LastLayer, cholesky_of
from pet_finetune.model.potential import Potential

from .archive import TorchArchive
from .native import stored_tensor

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
