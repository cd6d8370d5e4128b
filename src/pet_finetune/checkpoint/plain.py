"""Checking that a value is plain: numbers, text, lists and dictionaries of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["plain_value"]

_DEEPEST = 30


def plain_value(
    value: Any,
    where: str,
    error: Callable[[str], Exception],
    keep: tuple[type, ...] = (),
    depth: int = 0,
) -> Any:
    """Return a copy of ``value`` made of built-in types only; paths become text.

    Args:
        value: anything.
        where: what the value is called, e.g. ``"training.optimizer"``.
        error: makes the exception that is raised for a value of another type.
        keep: further types that are passed through, e.g. tensors.
        depth: how deep in the whole value this one lies.
    """
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, keep):
        return value
    if depth > _DEEPEST:
        raise error(f"{where} is nested more than {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise error(f"{where} has the key {key!r}, which is neither text nor an integer")
        return {
            key: plain_value(item, f"{where}.{key}", error, keep, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [
            plain_value(item, f"{where}[{index}]", error, keep, depth + 1)
            for index, item in enumerate(value)
        ]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # numpy's numbers, and subclasses of the built-in ones.
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain_value(value.item(), where, error, keep, _DEEPEST)
    raise error(f"{where} is of type {type(value).__module__}.{type(value).__qualname__}")
