"""Shared and differing layers of the members of a committee."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pet_finetune.adapters.adapter_config import replace_module
from pet_finetune.errors import AdapterError
from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential
from pet_finetune.model.shared_layers import SharedLayers
from pet_finetune.model.terms import Composition, Scale
from pet_finetune.nn.block import Attention, Block
from pet_finetune.nn.primitives import GroupedLinear, MemberRows


@dataclass(frozen=True)
class Member:
    """A plain potential, as what distinguishes it from another one of the same architecture.

    Attributes:
        weights: the parameters that are different, by name in the network.
        composition, scale: baseline and scale of the committee's target.
    """

    weights: dict[str, Tensor]
    composition: Tensor
    scale: Tensor


def gather(models: Iterable[Potential], target: str) -> tuple[Potential, list[Member]]:
    """The first model, and every one (the first included) as its difference from it.

    Models are let go one by one: a committee of a large model must not need the memory of as many.
    """
    first: Potential | None = None
    members = []
    for model in models:
        first = first or model
        members.append(_difference(first, model, target))
    if first is None or len(members) < 2:
        raise AdapterError(f"A committee has at least two members, got {len(members)}.")
    return first, members


def _difference(first: Potential, other: Potential, target: str) -> Member:
    ours, theirs = dict(first.network.named_parameters()), dict(other.network.named_parameters())
    same = (first.hypers, first.species) == (other.hypers, other.species)
    if not same or ours.keys() != theirs.keys():
        raise AdapterError(
            "The members of a committee must be models of one architecture with the same species "
            "and targets."
        )
    weights = {n: v.detach() for n, v in theirs.items() if not torch.equal(ours[n], v)}
    return Member(weights, other.composition.get(target), other.scale.get(target))


def restore(first: Potential, member: Member, target: str) -> Potential:
    """A member as a whole model again, independent of the first one."""
    model = copy.deepcopy(first)
    with torch.no_grad():
        for name, value in member.weights.items():
            model.network.get_parameter(name).copy_(value)
    model.composition.set(target, member.composition)
    model.scale.set(target, member.scale)
    return model


def differing_layers(first: Potential, members: Sequence[Member]) -> list[str] | None:
    """Paths of the linear layers in which members differ; None where they differ elsewhere too.

    None also for models with prompts, whose tokens belong to no member's rows.
    """
    if first.hypers.num_prompts:
        return None
    names = {name for member in members for name in member.weights}
    paths = sorted({name.rpartition(".")[0] for name in names})
    if all(type(first.network.get_submodule(path)) is nn.Linear for path in paths):
        return paths
    return None


def shared_before(first: Potential, paths: Sequence[str]) -> SharedLayers | None:
    """The GNN layers before the first one with one of these paths; None where that is the first."""
    network = first.network
    layers = len(network.gnn_layers)
    for path in paths:
        group, number, *_ = (*path.split("."), "", "")
        if group in ("gnn_layers", "combination_mlps"):
            layers = min(layers, int(number))
        elif group not in (
            *HEAD_GROUPS,
            "long_range_featurizer",
        ):  # of the structure as a whole, wanted by every layer
            return None
    return SharedLayers(layers) if layers else None


def join(
    first: Potential, members: Sequence[Member], paths: Sequence[str], rows: MemberRows
) -> None:
    """Make of the first model one that computes all members, given the structures of each.

    Args:
        first: changed in place.
        members: every one, the first included.
        paths: from :func:`differing_layers`.
        rows: the batch under way.
    """
    of_all_tokens = _layers_of_all_tokens(first)
    first.network.shared_layers = shared_before(first, paths)
    for path in paths:
        layer = first.network.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        weights = torch.stack([m.weights.get(f"{path}.weight", layer.weight) for m in members])
        biases = None
        if layer.bias is not None:
            biases = torch.stack([m.weights.get(f"{path}.bias", layer.bias) for m in members])
        grouped = GroupedLinear(weights, biases, rows, layer in of_all_tokens)
        replace_module(first.network, path, grouped)
    baselines = torch.stack([member.composition for member in members])
    first.composition = _Baselines(first.species, baselines, rows)
    first.scale = _Scales(torch.stack([member.scale for member in members]), rows)


def _layers_of_all_tokens(model: Potential) -> set[nn.Module]:
    """The layers that are given centre and edge tokens in one array."""
    found: set[nn.Module] = set()
    for module in model.network.modules():
        if isinstance(module, Attention):
            found.update(module.modules())
        elif isinstance(module, Block) and module.post_norm:
            found.update(module.mlp.modules())
    return found


class _Baselines(Composition):
    """The baselines per species of every member, [members, n_species]."""

    weights: Tensor

    def __init__(self, species: Sequence[int], weights: Tensor, rows: MemberRows) -> None:
        super().__init__(species)
        self.register_buffer("weights", weights)
        self._rows = rows
        self.to(weights.device)

    def forward(self, numbers: Tensor, target: str) -> Tensor:
        """Baseline energy of each atom of each member in turn, [members * n_atoms] float64, eV."""
        atoms = self.species_index[numbers[: self._rows.atoms]]
        return self.weights[self._rows.members][:, atoms].flatten()


class _Scales(Scale):
    """The scale of every member, [members]."""

    factors: Tensor

    def __init__(self, factors: Tensor, rows: MemberRows) -> None:
        super().__init__()
        self.register_buffer("factors", factors)
        self._rows = rows

    def get(self, target: str) -> Tensor:
        """The factor of each atom of each member in turn, [members * n_atoms] float64."""
        return self.factors[self._rows.members].repeat_interleave(self._rows.atoms)
