"""Our own checkpoint: a dictionary of tensors and plain values, nothing else.

Opens with ``torch.load(path, weights_only=True)`` anywhere. Layout, version 1:

=============== ===================================================================================
``format``      ``"pet-finetune"``
``version``     ``1``
``hypers``      the hyperparameters of ``architecture.model``
``species``     atomic numbers, ascending
``targets``     for each target the fields of :class:`~pet_finetune.keys.TargetSpec`
``weights``     the network's state dict; names are those of metatrain's PET below ``backend.``;
                in a run of QLoRA those of a quantised layer ``X`` are ``X.quantized.<part>``
``composition`` for each target ``[n_species]`` float64 (with several values, one column each)
``scale``       for each target one number, in the target's unit
``relative``    of some properties, factors beside it, ``[n_species, num_subtargets]`` float64
``radii``       ZBL's covalent radii ``[n_species]``, Å, or None
``uncertainty`` for targets that have one, the parts of its
                :class:`~pet_finetune.model.prediction.LastLayer`; absent in older files
``provenance``  where the weights come from: parent, options, data, versions
``adapter``     None, or the unmerged adapter of a run that can be resumed
``training``    None, or the optimiser and the rest of such a run
=============== ===================================================================================
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.base_weights import quantize_base
from pet_finetune.adapters.inject import (
    AdapterTarget,
    adapter_state,
    adapter_tensors,
    merged_copy,
    place,
    unmerge,
)
from pet_finetune.adapters.layers import (
    grown_tables,
    is_adapter_tensor,
    merge_new_rows,
    remove_prompts,
)
from pet_finetune.committee.llpr import fresh
from pet_finetune.errors import CheckpointError, PetFinetuneError
from pet_finetune.files import replacing
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import LastLayer
from pet_finetune.nn.quantized import QUANTIZED_PART, dense_state

from .archive import Checkpoint, TorchArchive, build_potential, model_options, plain_value

FORMAT = "pet-finetune"
VERSION = 1


def is_native(content: Any) -> bool:
    """Whether the content of a file is in our format, of any version."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def save_checkpoint(
    path: str | os.PathLike[str],
    model: Potential,
    *,
    provenance: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint in one step: either the whole new file is there, or the old one.

    An adapter in the model is merged into the weights, so that the file needs nothing beside it;
    with ``training`` it is kept apart instead, since the run goes on with it.

    Args:
        path: the file; its folder is made when missing.
        model: what to save; it is not changed.
        provenance: plain values (text, numbers, lists, dictionaries).
        training: plain values and tensors needed to resume the run.

    Raises:
        CheckpointError: if the file cannot be written, or a value is not plain.
    """
    path = Path(path)
    keep_adapter = training is not None and model.adapter is not None
    adapter = None
    if keep_adapter:
        model = copy.deepcopy(model)
        unmerge(model)
        adapter = _adapter_content(model)
        if adapter["config"]["num_prompts"]:
            remove_prompts(model)
    elif model.adapter is not None:
        model = merged_copy(model)
    if not keep_adapter and any(grown_tables(model)):
        model = merge_new_rows(copy.deepcopy(model))
    network = model.network.state_dict()

    def error(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: cannot be saved: {problem}, which is not a plain value.")

    content = {
        "format": FORMAT,
        "version": VERSION,
        "hypers": model.hypers.model_dump(),
        "species": list(model.species),
        "targets": {name: asdict(spec) for name, spec in model.targets.items()},
        "weights": {n: stored_tensor(w) for n, w in network.items() if not is_adapter_tensor(n)},
        "composition": {name: stored_tensor(model.composition.get(name)) for name in model.targets},
        "scale": {name: float(model.scale.get(name)) for name in model.targets},
        "relative": {
            name: stored_tensor(factors)
            for name in model.targets
            if (factors := model.scale.relative(name)) is not None
        },
        "radii": None if model.zbl is None else stored_tensor(model.zbl.covalent_radii),
        "uncertainty": {
            target: {
                **{name: stored_tensor(values) for name, values in layer.named_buffers()},
                "fingerprint": layer.fingerprint,
            }
            for target, layer in ({} if keep_adapter else fresh(model)).items()
        },
        "provenance": plain_value(provenance or {}, "provenance", error),
        "adapter": adapter,
        "training": plain_value(training, "training", error, keep=(Tensor,)),
    }
    save_content(path, content)
    return path


def read_native(
    archive: TorchArchive, content: Mapping[str, Any], keep_adapter: bool = False
) -> Checkpoint:
    """Read a file in our format.

    Args:
        archive: the open file; what is read of it is compared with the archive's checksums.
        content: what :meth:`TorchArchive.content` gave.
        keep_adapter: leave the adapter of an interrupted run unmerged, to train it further.

    Raises:
        CheckpointError: if the file is of a newer version, or damaged.
    """
    path = archive.path
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: this file has version {content.get('version')!r} of our format, and this "
            f"release of pet-finetune reads version {VERSION}. Update pet-finetune."
        )
    content = archive.filled(content)
    try:
        model = _model(content, str(path))
        if content["adapter"] is not None:
            adapter = _with_targets(content["adapter"])
            adapter = _as_lora(adapter, str(path), resumes=keep_adapter)
            _restore_adapter(model, adapter, content["weights"])
            model = model if keep_adapter else merged_copy(model)
        provenance = dict(content["provenance"])
        return Checkpoint(model, "pet-finetune", provenance, content["training"], path)
    except CheckpointError:
        raise
    except PetFinetuneError as error:
        raise archive.damaged(f"a part does not fit the others: {error}") from error


def _model(content: Mapping[str, Any], where: str) -> Potential:
    known = {field.name for field in fields(TargetSpec)}
    targets = [
        TargetSpec(**{name: value for name, value in spec.items() if name in known})
        for spec in content["targets"].values()
    ]
    model = build_potential(
        model_options(content["hypers"], where),
        content["species"],
        targets,
        dense_state(content["weights"]),
        composition=content["composition"],
        scale=content["scale"],
        relative=content.get("relative"),
        radii=content["radii"],
        where=where,
    )
    for target, parts in content.get("uncertainty", {}).items():
        model.set_uncertainty(target, LastLayer(**parts))
    return model


def _adapter_content(model: Potential) -> dict[str, Any]:
    """An adapter and the way back to its base, as plain values and tensors."""
    state = adapter_state(model)
    config = asdict(state.config)
    config["target_modules"] = list(state.config.target_modules)
    config["modules_to_save"] = list(state.config.modules_to_save or ())
    config["targets"] = list(state.config.targets)
    return {
        "config": config,
        "fingerprint": state.fingerprint,
        "tensors": {n: stored_tensor(w) for n, w in adapter_tensors(model).items()},
        "saved": {name: stored_tensor(weight) for name, weight in state.saved.items()},
        "targets": {target.spec.name: _target_content(target) for target in state.targets},
        "brought_targets": list(state.brought_targets),
        "brought_species": list(state.brought_species),
    }


def _target_content(target: AdapterTarget) -> dict[str, Any]:
    """Values of the base for a target of an adapter."""
    assert target.composition is not None
    return {
        "inherited_from": target.inherited_from,
        "composition": stored_tensor(target.composition),
        "scale": target.scale,
    }


def _with_targets(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """An adapter as it is written today; releases before knew one target for it."""
    if "targets" in content:
        return content
    config = dict(content["config"])
    name = config.pop("target")
    own = {key: content[key] for key in ("inherited_from", "composition", "scale")}
    return {
        **content,
        "config": {**config, "targets": [name]},
        "targets": {name: {**own, "scale": float(own["scale"])}},
        "brought_targets": [name] if content.get("brought_target") else [],
    }


def _as_lora(content: Mapping[str, Any], where: str, *, resumes: bool) -> Mapping[str, Any]:
    """An adapter that started from PiSSA's or OLoRA's factors as plain LoRA of twice the rank.

    Releases before had these methods. Their update is ``s (B A - B0 A0)`` with the factors of the
    start in the file as well: one product of the factors side by side.
    """
    config, tensors = dict(content["config"]), dict(content["tensors"])
    start = config.pop("init", "default")
    if start != "default":
        if resumes:
            raise CheckpointError(
                f"{where}: this run trains factors that started as those of {start}, which this "
                "release no longer does. Start a new run from the file with -c; the model in it "
                "can be evaluated and exported as before."
            )
        for name in [name for name in tensors if name.endswith(".lora_A")]:
            other = name.removesuffix("A") + "B"
            start_a = tensors.pop(name.replace(".lora_A", ".start_A"))
            start_b = tensors.pop(other.replace(".lora_B", ".start_B"))
            tensors[name] = torch.cat([tensors[name], start_a])
            tensors[other] = torch.cat([tensors[other], -start_b], dim=1)
        stretch = 2**0.5 if config["use_rslora"] else 2.0
        config["rank"] *= 2
        config["alpha"] *= stretch
        config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
        config["alpha_pattern"] = {
            key: stretch * alpha for key, alpha in config["alpha_pattern"].items()
        }
    return {**content, "config": config, "tensors": tensors}


@torch.no_grad()
def _restore_adapter(
    model: Potential, content: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Put an adapter back, and the few bits of a quantised base as they were."""
    config = dict(content["config"])
    for name in ("target_modules", "modules_to_save", "targets"):
        config[name] = tuple(config[name])
    targets = {
        name: AdapterTarget(model.target(name), **own) for name, own in content["targets"].items()
    }
    place(
        model,
        AdapterConfig(**config),
        fingerprint=content["fingerprint"],
        inherited={},
        brought_targets=content["brought_targets"],
        brought_species=content.get("brought_species", ()),
    )
    room = model.network.state_dict()
    for name, value in content["tensors"].items():
        room[name].copy_(value)
    if adapter_state(model).config.quant_bits is not None:
        quantize_base(model, adapter_state(model).config)
        room = model.network.state_dict()
        for name in (name for name in weights if QUANTIZED_PART in name):
            room[name].copy_(weights[name])
    model.adapter = replace(
        adapter_state(model),
        saved=dict(content["saved"]),
        targets=tuple(targets[name] for name in config["targets"]),
    )


def stored_tensor(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that brings no more than its own numbers into the file."""
    tensor = tensor.detach().to("cpu").contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.clone()


def save_content(
    path: Path,
    content: Mapping[str, Any],
    pickle_module: Any = pickle,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint in one step: the whole new file is there, or the old one.

    Args:
        path: the file; its folder is made when missing.
        content: for ``torch.save``.
        pickle_module: for ``torch.save``.
        check: is shown the new file before it takes its place, and raises if it is wrong.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            with partial.open("wb") as file:
                torch.save(content, file, pickle_module=pickle_module)
            if check is not None:
                check(partial)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        if "inline_container" in reason:  # how torch says that a part was not written
            reason = "no space is left, or files may not be so large"
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({reason}). An earlier file of this name "
            "is as it was. Check that the folder exists, is writable and has space left."
        ) from error
