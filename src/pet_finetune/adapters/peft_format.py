"""The configuration and the names of Hugging Face PEFT, and ours.

Low-rank adapters are PEFT's ``LORA``. Prompts are its ``ADAPTION_PROMPT`` by name and meaning; PEFT
itself knows these for a few language models only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pet_finetune.errors import AdapterError

from .config import AdapterConfig

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
    """Refuse what would load but mean something else.

    Args:
        peft: content of the file.
        path: of the file.

    Raises:
        AdapterError: another method, or settings that we do not have.
    """
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
