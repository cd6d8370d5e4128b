"""Adapter folders in the format of Hugging Face PEFT.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's, keys included, and load
there. What PEFT has no place for (the fingerprint of the base, the targets, their baselines per
species and their scales) is JSON in the metadata of the safetensors file, where it cannot be parted
from the weights it belongs to. As safetensors has no checksum, a digest of tensors and settings is
there too, and is compared on every read.

Releases that could start from the factors of PiSSA or OLoRA wrote such an update as plain LoRA of
twice the rank, which is what it is read as. Those that knew one target for an adapter wrote what
belongs to it beside everything else (version 1); they are read as adapters of one target.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from pet_finetune.adapters.base_weights import content_digest
from pet_finetune.errors import AdapterError, DataError, damage_explained
from pet_finetune.files import read_object, write_whole
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential

from .adapter_config import AdapterConfig
from .at_rest import Adapter, capture, install
from .inject import AdapterTarget

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA = "pet_finetune"
_DIGEST = "digest"
_VERSION = 2
#: Entry of our ``adapter_config.json``, by PEFT's name for where a base is from: its weights have a
#: digest.
_CHECKED = {"auto_mapping": {"base_model_class": "Potential", "parent_library": "pet_finetune"}}

_logger = get_logger(__name__)


def save_adapter(model: Potential, directory: str | Path, base_name: str = "") -> Path:
    """Write the adapter of a model into a folder; each file is replaced in one step.

    Args:
        model: a potential with an adapter.
        directory: made where it does not exist.
        base_name: what the base is called, for the reader (``base_model_name_or_path``).

    Raises:
        AdapterError: the model has no adapter, or the folder cannot be written.
    """
    return write_adapter(capture(model, base_name), directory)


def load_adapter(model: Potential, directory: str | Path) -> AdapterConfig:
    """Put the adapter of a folder (of :func:`save_adapter` or PEFT) into its base, in place.

    Raises:
        AdapterError: no adapter there, a damaged one, one of another base (both are named), or
            one of a method that we do not have.
    """
    adapter = read_adapter(directory)
    with _explained(adapter.name):
        return install(model, adapter)


def write_adapter(adapter: Adapter, directory: str | Path) -> Path:
    """Write an adapter into a folder; each file is replaced in one step."""
    folder = Path(directory)
    is_new = not folder.exists()
    config = adapter.config
    extra = {
        "format": "pet-finetune adapter",
        "version": _VERSION,
        "base_fingerprint": adapter.fingerprint,
        "base_name": adapter.base_name,
        "targets": [_stored_target(target) for target in adapter.targets],
        "species": list(adapter.species),
        "quant_bits": config.quant_bits,
    }
    stored = {stored_name(name): value.contiguous() for name, value in adapter.tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        peft = {**to_peft(config, adapter.base_name), **_CHECKED}
        extra[_DIGEST] = _digest(peft, extra, adapter.tensors)
        write_whole(folder / CONFIG_FILE, json.dumps(peft, indent=2) + "\n")
        metadata = {"format": "pt", _METADATA: json.dumps(extra)}
        write_whole(folder / WEIGHTS_FILE, to_bytes(stored, metadata))
    except OSError as error:
        if is_new:  # half of an adapter is none
            shutil.rmtree(folder, ignore_errors=True)
        why = error.strerror or error
        raise AdapterError(f"Cannot write the adapter to '{folder}': {why}.") from error
    return folder


def read_adapter(directory: str | Path) -> Adapter:
    """The adapter in a folder, written by us or by PEFT.

    Raises:
        AdapterError: none there, a damaged one, or of an unknown method or a newer release.
    """
    folder = Path(directory)
    peft = _read_json(folder / CONFIG_FILE)
    extra = read_metadata(folder)
    check_method(peft, folder / CONFIG_FILE)
    with _weights_explained(folder / WEIGHTS_FILE):
        stored = load_file(folder / WEIGHTS_FILE)
        tensors = {own_name(name): value for name, value in stored.items()}
    with _explained(str(folder)):
        if int(extra.get("version", _VERSION)) > _VERSION:
            raise AdapterError(
                f"'{folder}' has version {extra['version']} of our format, and this release of "
                f"pet-finetune reads versions up to {_VERSION}. Update pet-finetune."
            )
        _check_digest(folder, peft, extra, tensors)
        config = from_peft(peft)
        if not extra:
            return Adapter(config, tensors, name=str(folder))
        # Version 1 has what belongs to its one target among the rest.
        entries = extra["targets"] if "targets" in extra else [{**extra, "spec": extra["target"]}]
        targets = tuple(_read_target(entry) for entry in entries)
        names = tuple(target.spec.name for target in targets)
        fingerprint = extra["base_fingerprint"]
        return Adapter(
            config=replace(
                config, targets=names or config.targets, quant_bits=extra.get("quant_bits")
            ),
            tensors=tensors,
            fingerprint=None if fingerprint is None else str(fingerprint),
            base_name=str(extra.get("base_name") or ""),
            targets=targets,
            species=tuple(extra.get("species") or ()),
            name=str(folder),
        )


def _stored_target(target: AdapterTarget) -> dict[str, Any]:
    composition = target.composition
    return {
        "spec": asdict(target.spec),
        "inherited_from": target.inherited_from,
        "composition": None if composition is None else composition.tolist(),
        "scale": target.scale,
    }


def _read_target(stored: Mapping[str, Any]) -> AdapterTarget:
    composition, scale = stored["composition"], stored["scale"]
    return AdapterTarget(
        spec=TargetSpec(**stored["spec"]),
        inherited_from=stored.get("inherited_from"),
        composition=None if composition is None else torch.tensor(composition, dtype=torch.float64),
        scale=None if scale is None else float(scale),
    )


def _explained(folder: str) -> AbstractContextManager[None]:
    """Turn whatever a wrong value in the files leads to into one message."""
    return damage_explained(
        lambda why: AdapterError(
            f"'{folder}' is damaged: a value in its files is missing or of the wrong kind ({why})."
        )
    )


def _digest(
    peft: Mapping[str, Any], extra: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    """Over all that decides what an adapter does; not over the name of its base."""
    beside = {name: value for name, value in extra.items() if name != _DIGEST}
    settings = asdict(from_peft(dict(peft)))
    # PEFT's file names no targets; in digests that is spelt as in the first file that had one.
    del settings["targets"]
    return content_digest(tensors, [{**settings, "target": "energy"}, beside])


def _check_digest(
    folder: Path, peft: Mapping[str, Any], extra: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Make sure that an adapter of ours is what was written."""
    if _DIGEST not in extra and not peft.items() >= _CHECKED.items():
        if extra:
            _logger.info(
                "'%s' was written by an earlier release and has no checksum: damage to its numbers "
                "would not be noticed",
                folder,
            )
        return
    if extra.get(_DIGEST) != _digest(peft, extra, tensors):
        raise AdapterError(
            f"'{folder}' is damaged: {WEIGHTS_FILE} or {CONFIG_FILE} is not what was saved (their "
            "checksum differs). Copy both from where the adapter was made; where that is gone, "
            "train it again."
        )


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """Our metadata of an adapter file; empty for a file of PEFT."""
    path = Path(directory) / WEIGHTS_FILE
    with _weights_explained(path), safe_open(path, framework="pt") as stored:
        text = (stored.metadata() or {}).get(_METADATA)
        return {} if text is None else dict(json.loads(text))


def _weights_explained(path: Path) -> AbstractContextManager[None]:
    return damage_explained(
        lambda why: AdapterError(f"Cannot read the adapter weights '{path}': {why}.")
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        inside = path.parent / "adapter"  # of a run
        hint = f" Did you mean '{inside}'?" if (inside / path.name).exists() else ""
        raise AdapterError(
            f"There is no adapter in '{path.parent}': {path.name} is missing.{hint}"
        ) from error
    except DataError as error:
        raise AdapterError(str(error)) from error


_PREFIX = "base_model.model."
# PEFT keeps these as modules, hence with a weight.
_FACTORS = (".lora_A", ".lora_B")
# PEFT's prompts are parameters of the adapted attention; ours of a module within it.
_PROMPT = ".prompt.adaption_"
_NEEDED = {
    "LORA": ("r", "lora_alpha", "target_modules"),
    "ADAPTION_PROMPT": ("adapter_len",),
}


def stored_name(name: str) -> str:
    """PEFT's name of a tensor of the network."""
    name = name.replace(_PROMPT, ".adaption_")
    return f"{_PREFIX}{name}.weight" if name.endswith(_FACTORS) else f"{_PREFIX}{name}"


def own_name(stored: str) -> str:
    """The opposite of :func:`stored_name`."""
    name = stored.removeprefix(_PREFIX).replace(".adaption_", _PROMPT)
    bare = name.removesuffix(".weight")
    return bare if bare.endswith(_FACTORS) else name


def to_peft(config: AdapterConfig, base_name: str) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json`` for a resolved configuration."""
    common = {
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": list(config.modules_to_save or ()),
    }
    if config.num_prompts:
        return {
            "peft_type": "ADAPTION_PROMPT",
            **common,
            "target_modules": "attention",
            "adapter_len": config.num_prompts,
            "adapter_layers": None,
        }
    return {
        "peft_type": "LORA",
        **common,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def from_peft(peft: dict[str, Any]) -> AdapterConfig:
    """The opposite of :func:`to_peft`, as far as PEFT's file goes."""
    saved = peft.get("modules_to_save") or ()
    if peft["peft_type"] == "ADAPTION_PROMPT":
        return AdapterConfig(num_prompts=int(peft["adapter_len"]), modules_to_save=saved)
    return AdapterConfig(
        rank=int(peft["r"]),
        alpha=float(peft["lora_alpha"]),
        dropout=float(peft.get("lora_dropout") or 0.0),
        target_modules=peft["target_modules"],
        modules_to_save=saved,
        use_rslora=bool(peft.get("use_rslora")),
        use_dora=bool(peft.get("use_dora")),
        rank_pattern=dict(peft.get("rank_pattern") or {}),
        alpha_pattern=dict(peft.get("alpha_pattern") or {}),
    )


def check_method(peft: dict[str, Any], path: Path) -> None:
    """Refuse what would load but mean something else."""
    folder, kind = path.parent, peft.get("peft_type")
    if kind not in _NEEDED:
        raise AdapterError(
            f"'{folder}' holds a {kind} adapter; those that can be read are {', '.join(_NEEDED)}."
        )
    missing = [name for name in _NEEDED[kind] if name not in peft]
    if missing:
        raise AdapterError(f"'{path}' lacks {', '.join(missing)}.")
    for name in ("fan_in_fan_out", "lora_bias", "layers_to_transform"):
        if peft.get(name):
            raise AdapterError(f"'{folder}' uses {name}, which is not supported.")
    if peft.get("bias", "none") != "none":
        raise AdapterError(f"'{folder}' trains biases (bias: {peft['bias']}): not supported.")
    start = str(peft.get("init_lora_weights", True)).casefold()
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        raise AdapterError(
            f"'{folder}' is an update of weights that {start} changed before training. Save it "
            "from PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA "
            "of it."
        )
