"""Adapter folders in the format of Hugging Face PEFT.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's, keys included, and load
there. What PEFT has no place for (the fingerprint of the base, the target, its baseline per species
and its scale) is JSON in the metadata of the safetensors file, where it cannot be parted from the
weights it belongs to.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec
from pet_finetune.model import Potential
from pet_finetune.model.fingerprint import weights_fingerprint

from .inject import AdapterConfig, active_adapter, adapter_state, inject
from .merge import lora_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA = "pet_finetune"
_PREFIX = "base_model.model."


def adapter_tensors(model: Potential) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU."""
    config = _require_adapter(model)
    tensors = {}
    for path, layer in lora_layers(model):
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B
    for path in config.modules_to_save or ():
        for name, value in model.network.get_submodule(path).state_dict().items():
            tensors[f"{_PREFIX}{path}.{name}"] = value
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def save_adapter(model: Potential, directory: str | Path, base_name: str = "") -> Path:
    """Write the adapter of a model into a folder; each file is replaced in one step.

    Args:
        model: a potential with an adapter.
        directory: made where it does not exist.
        base_name: what the base is called, for the reader (``base_model_name_or_path``).

    Returns:
        The folder.

    Raises:
        AdapterError: the model has no adapter, or the folder cannot be written.
    """
    config = _require_adapter(model)
    state = adapter_state(model)
    folder = Path(directory)
    extra = {
        "format": "pet-finetune adapter",
        "version": 1,
        "base_fingerprint": state.fingerprint,
        "base_name": base_name,
        "target": asdict(model.target(config.target)),
        "inherited_from": state.inherited_from,
        "species": list(model.species),
        "composition": model.composition.get(config.target).tolist(),
        "scale": float(model.scale.get(config.target)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        peft = json.dumps(_peft_config(config, base_name), indent=2) + "\n"
        _replace(folder / CONFIG_FILE, peft.encode())
        metadata = {"format": "pt", _METADATA: json.dumps(extra)}
        _replace(folder / WEIGHTS_FILE, to_bytes(adapter_tensors(model), metadata))
    except OSError as error:
        raise AdapterError(f"Cannot write the adapter to '{folder}': {error}.") from error
    return folder


def load_adapter(model: Potential, directory: str | Path) -> AdapterConfig:
    """Put the adapter of a folder into its base model, in place.

    Args:
        model: the base, without adapter.
        directory: written by :func:`save_adapter` or by PEFT.

    Raises:
        AdapterError: no adapter there, a damaged one, one of another base (both are named), or
            one of a method that is not LoRA.
    """
    folder = Path(directory)
    peft = _read_json(folder / CONFIG_FILE)
    extra = read_metadata(folder)
    _check_method(peft, folder)
    fingerprint = _check_base(model, extra, folder)
    try:
        target = _prepare_target(model, extra)
        config = AdapterConfig(
            rank=int(peft["r"]),
            alpha=float(peft["lora_alpha"]),
            dropout=float(peft.get("lora_dropout") or 0.0),
            target_modules=peft["target_modules"],
            modules_to_save=peft.get("modules_to_save") or (),
            target=target,
        )
        inherited = extra.get("inherited_from")
        resolved = inject(model, config, fingerprint=fingerprint, inherited_from=inherited)
        _load_tensors(model, folder / WEIGHTS_FILE)
        if extra:
            composition = torch.tensor(extra["composition"], dtype=torch.float64)
            model.composition.set(target, composition)
            model.scale.set(target, float(extra["scale"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"'{folder}' is damaged: a value in its files is missing or of the wrong kind "
            f"({type(error).__name__}: {error})."
        ) from error
    return resolved


def _require_adapter(model: Potential) -> AdapterConfig:
    config = active_adapter(model)
    if config is None:
        raise AdapterError("The model carries no adapter.")
    return config


def _peft_config(config: AdapterConfig, base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "modules_to_save": list(config.modules_to_save or ()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _check_method(peft: dict[str, Any], folder: Path) -> None:
    """Refuse what would load but mean something else."""
    if peft.get("peft_type") != "LORA":
        raise AdapterError(f"'{folder}' holds a {peft.get('peft_type')} adapter, not a LoRA.")
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in peft]
    if missing:
        raise AdapterError(f"'{folder / CONFIG_FILE}' lacks {', '.join(missing)}.")
    for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if peft.get(name):
            raise AdapterError(f"'{folder}' uses {name}, which is not supported.")
    if peft.get("bias", "none") != "none":
        raise AdapterError(f"'{folder}' trains biases (bias: {peft['bias']}): not supported.")


def _check_base(model: Potential, extra: dict[str, Any], folder: Path) -> str:
    """The fingerprint of the model, which must be the one that the adapter was made for."""
    have = weights_fingerprint(model)
    want = str(extra.get("base_fingerprint", have))
    if have != want:
        name = extra.get("base_name") or "unnamed"
        raise AdapterError(
            f"The adapter '{folder}' belongs to the base '{name}' (fingerprint {want[:12]}), "
            f"but this model has the fingerprint {have[:12]}. Open it with the checkpoint it was "
            "trained from."
        )
    return have


def _prepare_target(model: Potential, extra: dict[str, Any]) -> str:
    """The adapter's target; its heads are made where the base lacks them."""
    if not extra:
        return next(iter(model.targets))
    spec = TargetSpec(**extra["target"])
    if spec.name not in model.targets:
        model.add_target(spec, inherit_from=extra.get("inherited_from"))
    return spec.name


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """What we wrote beside the tensors of an adapter; empty for one that PEFT wrote.

    Raises:
        AdapterError: the weights file is missing or damaged.
    """
    path = Path(directory) / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as stored:
            text = (stored.metadata() or {}).get(_METADATA)
        return {} if text is None else dict(json.loads(text))
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise AdapterError(f"Cannot read the adapter weights '{path}': {error}.") from error


def _load_tensors(model: Potential, path: Path) -> None:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"Cannot read the adapter weights '{path}': {error}.") from error
    wanted = adapter_tensors(model)
    missing, unknown = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing or unknown:
        raise AdapterError(
            f"'{path}' does not fit the model: {len(missing)} tensors are missing "
            f"({', '.join(sorted(missing)[:3])}...), {len(unknown)} are unknown "
            f"({', '.join(sorted(unknown)[:3])}...)."
        )
    parameters = dict(model.network.named_parameters())
    with torch.no_grad():
        for name, value in stored.items():
            own = name.removeprefix(_PREFIX)
            own = own.replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")
            if parameters[own].shape != value.shape:
                raise AdapterError(
                    f"'{path}': {name} has the shape {tuple(value.shape)}, the model needs "
                    f"{tuple(parameters[own].shape)}."
                )
            parameters[own].copy_(value)


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: either the whole new one is there, or the old one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"There is no adapter in '{path.parent}': {path.name} is missing."
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot read '{path}': {error}.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"'{path}' holds no JSON object.")
    return content
