"""Putting one module in the place of another."""

from __future__ import annotations

from torch import nn


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a network, in the place of the one that is there."""
    parent_path, _, name = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    if isinstance(parent, nn.Sequential):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)
