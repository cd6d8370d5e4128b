"""Where training starts: the command line's ``-c`` and the options put together."""

from __future__ import annotations

import os
from typing import Any

from .finetune import METHOD_KEYS, METHOD_SHORTHANDS
from .legacy import Rewriting
from .problems import Path, Problem

__all__ = ["apply_start"]

_FINETUNE: Path = ("architecture", "training", "finetune")
_READ_FROM: Path = (*_FINETUNE, "read_from")
_METHOD: Path = (*_FINETUNE, "method")
_NEED_A_MODEL = ("replay", "anchor")


def apply_start(rewriting: Rewriting, checkpoint: str | None, *, require_start: bool) -> None:
    """Merge ``-c`` into ``finetune.read_from`` and settle the method.

    Args:
        rewriting: the raw options, changed in place, and where findings go.
        checkpoint: what the user gave with ``-c``.
        require_start: whether a method that needs a model to start from must have one.
    """
    finetune = rewriting.section(_FINETUNE, create=checkpoint is not None)
    if finetune is None:
        return
    _merge_checkpoint(rewriting, finetune, checkpoint)
    _spell_out(finetune)
    read_from = finetune.get("read_from")
    legacy = isinstance(finetune.get("legacy_start"), dict)
    if legacy and isinstance(read_from, str):
        source = "-c" if read_from == checkpoint else "finetune.read_from"
        rewriting.problems.append(
            Problem(
                (*_FINETUNE, "legacy_start"),
                "training cannot start from these files (MODEL_TO_START_WITH...) and from "
                f"{source} ({read_from}) at once. Remove one.",
            )
        )
    if finetune.get("method") is None:
        finetune["method"] = _choose_method(rewriting, finetune, checkpoint)
    starts = legacy or read_from is not None
    changing = [method for method in METHOD_KEYS if method != "full"]
    if not starts and require_start and finetune["method"] in changing:
        rewriting.problems.append(
            Problem(
                _METHOD,
                f"{finetune['method']} changes an existing model, but none is given. Give its "
                "checkpoint with -c or finetune.read_from, or remove the section to train from "
                "scratch.",
            )
        )
    if not starts and require_start:
        for name in _NEED_A_MODEL:
            if finetune.get(name) is not None:
                rewriting.problems.append(
                    Problem(
                        (*_FINETUNE, name),
                        "keeps what a model knew that training starts from, but none is given. "
                        "Give its checkpoint with -c or finetune.read_from, or remove the section.",
                    )
                )


def _merge_checkpoint(
    rewriting: Rewriting, finetune: dict[str, Any], checkpoint: str | None
) -> None:
    if checkpoint is None:
        return
    given = finetune.get("read_from")
    if isinstance(given, str) and os.path.abspath(given) != os.path.abspath(checkpoint):
        rewriting.problems.append(
            Problem(
                _READ_FROM,
                f"is {given!r}, but -c gives {checkpoint!r}. Remove one of them.",
            )
        )
    finetune["read_from"] = checkpoint


def _spell_out(finetune: dict[str, Any]) -> None:
    """A shorthand of a method becomes the method it stands for, and its setting."""
    config = finetune.get("config") or {}
    if finetune.get("method") in METHOD_SHORTHANDS and isinstance(config, dict):
        finetune["method"], settings = METHOD_SHORTHANDS[finetune["method"]]
        finetune["config"] = {**settings, **config}


def _choose_method(rewriting: Rewriting, finetune: dict[str, Any], checkpoint: str | None) -> str:
    """The method when none is named: what the settings belong to, else LoRA with ``-c``.

    A ``read_from`` in the file without a method means ``full``, as it does in metatrain.
    """
    config = finetune.get("config")
    keys = set(config) if isinstance(config, dict) else set()
    starts = checkpoint is not None or finetune.get("read_from") or finetune.get("legacy_start")
    if not starts and not keys:
        return "full"
    method = max(METHOD_KEYS, key=lambda name: len(keys & METHOD_KEYS[name]))
    if keys & METHOD_KEYS[method]:
        why = "its settings are given"
    elif checkpoint is not None:
        method, why = "lora", "the default with -c"
    else:
        method, why = "full", "as in metatrain; `method: lora` needs fewer data"
    rewriting.notices.append(f"architecture.training.finetune.method not given: {method} ({why}).")
    return method
