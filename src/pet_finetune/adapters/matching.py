"""Which layers a pattern means, in the conventions of Hugging Face PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from pet_finetune.errors import AdapterError, did_you_mean
from pet_finetune.model.pet import HEAD_GROUPS

ALL_LINEAR = "all-linear"
# Heads and last layers are trained whole beside an adapter, so "all-linear" leaves them out.
_HEADS = tuple(f"{group}." for group in HEAD_GROUPS)


def linear_layers(network: nn.Module) -> list[str]:
    """Paths of all linear layers outside the heads: what an adapter can sit on."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(_HEADS)
    ]


def _suffixes(names: Sequence[str]) -> list[str]:
    """The short spellings that would match, such as ``attention.input_linear``."""
    shortened = {re.sub(r"^.*\.(?=[^.\d]+\.[^.]+$)", "", name) for name in names}
    return sorted(shortened)


def match_layers(network: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers that the patterns name, in the network's order.

    Args:
        network: the network to look into.
        patterns: ``"all-linear"``; one string: a regular expression for whole paths; a list:
            paths, endings of paths, or regular expressions.

    Raises:
        AdapterError: a pattern that matches nothing, or is no regular expression.
    """
    candidates = linear_layers(network)
    if patterns == ALL_LINEAR:
        return candidates
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    if not listed:
        raise AdapterError("target_modules is empty: name at least one layer, or 'all-linear'.")
    chosen: set[str] = set()
    for pattern in listed:
        found = [name for name in candidates if _matches(name, pattern)]
        if not found:
            endings = _suffixes(candidates)
            raise AdapterError(
                f"target_modules: '{pattern}' matches no linear layer of the model."
                f"{did_you_mean(pattern, endings)} What could match: {', '.join(endings)} "
                f"(an ending, a whole path, a regular expression, or '{ALL_LINEAR}')."
            )
        chosen.update(found)
    return [name for name in candidates if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise AdapterError(
            f"target_modules: '{pattern}' is neither a layer nor a regular expression ({error})."
        ) from error


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a network, in the place of the one that is there."""
    parent_path, _, name = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    if isinstance(parent, nn.Sequential):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)
