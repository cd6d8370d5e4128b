"""Options that are no longer those a run began with, and whether it heeds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pet_finetune.config import Options

__all__ = ["Change", "changed_options", "with_defaults_of"]

_TRAINING = "architecture.training."
_LEARNING_RATE = _TRAINING + "learning_rate"
#: Used before the first step only; what came of them is in the run's files.
_AS_BEGUN = (
    "seed",
    "validation_set",
    "test_set",
    "architecture.name",
    "architecture.model",
    *(_TRAINING + name for name in ("baseline", "atomic_baseline", "scale_targets")),
    _TRAINING + "fixed_scaling_weights",
)
#: Of ``finetune``, what is looked at again when a run goes on.
_LOOKED_AT = tuple(_TRAINING + "finetune." + name for name in ("unfreeze", "replay", "anchor"))
#: Of ``training``, what a run goes on with unless the file says otherwise, since its default was
#: another in older releases; with the value of runs that do not say.
_OLDER_DEFAULTS = {"optimizer": "adamw", "ema": None}
#: Change no number of a run that goes on; pre-training was over when it began.
_NO_MATTER = (
    *(_TRAINING + name for name in ("log_interval", "checkpoint_interval")),
    _TRAINING + "finetune.pretrain",
)


@dataclass(frozen=True)
class Change:
    """An option that has another value than when the run began.

    Attributes:
        name: with its sections, as on the command line.
        now, then: its values; None where it has none.
        heeded: whether the run goes on with the new one.
    """

    name: str
    now: Any
    then: Any
    heeded: bool


def changed_options(options: Options, before: Mapping[str, Any]) -> Iterator[Change]:
    """The options that differ from those of a run, by name.

    An option that the run does not look at again is a change only where it is written out: a run
    goes on with an options file that says no more of its start.

    Args:
        options: those of now.
        before: those of the run, as plain values.
    """
    now, then = dict(_flat(options.resolved())), dict(_flat(before))
    given = set(_given(options))
    for name in sorted(now.keys() | then.keys()):
        value, old = now.get(name), then.get(name)
        heeded = not _below(name, _AS_BEGUN) and (
            not _below(name, (_TRAINING + "finetune",)) or _below(name, _LOOKED_AT)
        )
        # What is not written out is a default, or what the run found for itself.
        silent = name not in given and (not heeded or name == _LEARNING_RATE or name not in then)
        if value == old or silent or _below(name, _NO_MATTER):
            continue
        yield Change(name, value, old, heeded)


def with_defaults_of(options: Options, before: Mapping[str, Any]) -> Options:
    """The options with which a run goes on that may have begun with other defaults.

    Args:
        options: those of now.
        before: those of the run, as plain values.
    """
    training = options.training
    then = before.get("architecture", {}).get("training", {})
    left_out = {
        name: then.get(name, default)
        for name, default in _OLDER_DEFAULTS.items()
        if name not in training.model_fields_set
    }
    return options.with_training(**left_out)


def _below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == s or name.startswith((f"{s}.", f"{s}[")) for s in sections)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values with the names of all sections above them; lists of sections count from 0."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}[{index}]")
    else:
        yield name, value


def _given(value: Any, name: str = "") -> Iterator[str]:
    """Names of the values that are written out, as :func:`_flat` has them."""
    if isinstance(value, BaseModel):
        for key in value.model_fields_set:
            yield from _given(getattr(value, key), f"{name}.{key}" if name else key)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _given(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], BaseModel):
        for index, item in enumerate(value):
            yield from _given(item, f"{name}[{index}]")
    else:
        yield name
