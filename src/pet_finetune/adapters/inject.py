"""Putting an adapter into a potential, merging it, taking it out; what of the potential trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.nn.primitives import ROWS
from pet_finetune.nn.quantized import QuantizedLinear, num_quantized

from .adapter_config import AdapterConfig, fitted, replace_module
from .base_weights import quantize_base
from .layers import (
    DoraLinear,
    LoraLinear,
    add_prompts,
    drop_new_rows,
    is_adapter_tensor,
    merge_new_rows,
    prompts,
    remove_prompts,
    train_new_rows,
)

_logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class AdapterTarget:
    """A target of an adapter, with its parts outside the network: baselines and scale.

    Attributes:
        spec: what is predicted.
        inherited_from: the target whose heads it started from, if any.
        composition: [n_species] or [n_species, n_values] float64 baselines; None: the base's.
        scale: the target's unit per unit of the network's output; None leaves the base's.
    """

    spec: TargetSpec
    inherited_from: str | None = None
    composition: Tensor | None = None
    scale: float | None = None

    def put_on(self, model: Potential) -> None:
        """Give the target of a model this baseline and scale."""
        if self.composition is not None:
            model.composition.set(self.spec.name, self.composition)
        if self.scale is not None:
            model.scale.set(self.spec.name, self.scale)


def target_of(model: Potential, name: str, inherited_from: str | None = None) -> AdapterTarget:
    """A target of a model with the baseline and the scale that it has now."""
    composition = model.composition.get(name).detach().clone()
    return AdapterTarget(
        model.target(name), inherited_from, composition, float(model.scale.get(name))
    )


@dataclass(frozen=True)
class AdapterState:
    """An adapter in a model, with what is needed to go back to the base.

    Attributes:
        config: resolved configuration.
        fingerprint: of the base, before anything was added to it.
        saved: the base's values of the parameters of ``modules_to_save``, by path.
        targets: those of ``config``, with the baselines and scales that they started with.
        brought_targets: those that came with the adapter and that the base lacks.
        brought_species: elements that came with the adapter and that the base lacks.
    """

    config: AdapterConfig
    fingerprint: str
    saved: dict[str, Tensor]
    targets: tuple[AdapterTarget, ...]
    brought_targets: tuple[str, ...] = ()
    brought_species: tuple[int, ...] = ()


def adapter_state(model: Potential) -> AdapterState:
    """The adapter in a model; an error where there is none."""
    state = model.adapter
    if not isinstance(state, AdapterState):
        raise AdapterError("The model carries no adapter.")
    return state


def active_adapter(model: Potential) -> AdapterConfig | None:
    """The configuration of the adapter in a model, or None."""
    return model.adapter.config if isinstance(model.adapter, AdapterState) else None


def inject(
    model: Potential,
    config: AdapterConfig,
    *,
    fingerprint: str | None = None,
    inherited: Mapping[str, str] | None = None,
    brought_targets: Sequence[str] = (),
    brought_species: Sequence[int] = (),
) -> AdapterConfig:
    """Put a fresh adapter into a model, in place, and freeze everything else.

    Every prediction stays what it was, bit for bit, until the adapter is trained; but for
    ``quant_bits``, which rounds the weights of the base.

    Args:
        model: a potential without adapter.
        config: what to inject; patterns are resolved against the model.
        fingerprint: of the base, where heads were added to it since; computed when left out.
        inherited: targets, and those whose heads theirs were copied from.
        brought_targets: targets that are not the base's, and leave with the adapter.
        brought_species: the same of elements, whose embeddings train.

    Returns:
        The configuration with ``target_modules`` and ``modules_to_save`` as full paths.

    Raises:
        AdapterError: no targets, patterns that match nothing, a rank below 1, one in
            ``rank_pattern`` above the width of its layer, or an adapter there already.
    """
    if active_adapter(model) is not None:
        raise AdapterError("The model carries an adapter already: merge or unload it first.")
    if not config.targets:
        raise AdapterError("targets is empty: name at least one target that the adapter is for.")
    for name in config.targets:
        model.target(name)
    resolved = fitted(model.network, config)
    if fingerprint is None:
        fingerprint = weights_fingerprint(model)
    layers = place(
        model,
        resolved,
        fingerprint=fingerprint,
        inherited=inherited or {},
        brought_targets=brought_targets,
        brought_species=brought_species,
    )
    if resolved.quant_bits is not None:
        _logger.info("%s", quantize_base(model, resolved))
        for layer in layers:
            if isinstance(layer, DoraLinear):
                layer.measure_lengths()
    return resolved


def place(
    model: Potential,
    config: AdapterConfig,
    *,
    fingerprint: str,
    inherited: Mapping[str, str],
    brought_targets: Sequence[str] = (),
    brought_species: Sequence[int] = (),
) -> list[LoraLinear]:
    """Adapt the layers of a resolved configuration; what goes into them is up to the caller."""
    layers, saved = list(config.target_modules), list(config.modules_to_save or ())
    adapted = []
    for path in layers:
        adapted.append(_adapted(model.network, path, config))
        replace_module(model.network, path, adapted[-1])
    if config.num_prompts:
        add_prompts(model, config.num_prompts)
    own = [f"{path}.lora_" for path in layers]
    own += [f"{path}." for path in prompts(model)] if config.num_prompts else []
    freeze(model, train=[*own, *(f"{path}." for path in saved)])
    train_new_rows(model, brought_species)
    model.adapter = AdapterState(
        config=config,
        fingerprint=fingerprint,
        saved={name: p.detach().clone() for name, p in saved_parameters(model, saved)},
        targets=tuple(target_of(model, name, inherited.get(name)) for name in config.targets),
        brought_targets=tuple(brought_targets),
        brought_species=tuple(brought_species),
    )
    return adapted


def _adapted(network: nn.Module, path: str, config: AdapterConfig) -> LoraLinear:
    """The layer that takes the place of a linear one."""
    base = network.get_submodule(path)
    assert isinstance(base, nn.Linear), f"{path} is not linear"
    kind = DoraLinear if config.use_dora else LoraLinear
    rank, alpha = config.rank_of(path), config.alpha_of(path)
    return kind(base, rank, alpha, config.dropout, config.use_rslora).train(base.training)


def saved_parameters(model: Potential, paths: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of ``modules_to_save`` with their names in the network."""
    beginnings = tuple(f"{path}." for path in paths)
    return [(n, p) for n, p in model.network.named_parameters() if n.startswith(beginnings)]


def adapter_tensors(model: Potential) -> dict[str, Tensor]:
    """Tensors that the adapter added to the network, by name, without prompts of the base."""
    tensors = {n: t for n, t in model.network.state_dict().items() if is_adapter_tensor(n)}
    if adapter_state(model).config.num_prompts:
        for path, prompt in prompts(model).items():
            tensors |= {f"{path}.{name}": value for name, value in prompt.state_dict().items()}
    return tensors


@torch.no_grad()
def eject(model: Potential) -> None:
    """Take the adapter out of a model, in place: it is its base again, bit for bit.

    Nothing trains afterwards (``requires_grad`` is False everywhere).

    Raises:
        AdapterError: there is none, or the base was quantised and cannot be had back.
    """
    state = adapter_state(model)
    if num_quantized(model.network):
        raise AdapterError(
            f"The base under this adapter is held in {state.config.quant_bits} bits, and its own "
            "weights were not kept. Open its checkpoint again."
        )
    if state.config.num_prompts:
        remove_prompts(model)
    for path in state.config.target_modules:
        layer = model.network.get_submodule(path)
        assert isinstance(layer, LoraLinear), f"{path} is not adapted"
        replace_module(model.network, path, layer.base_linear().train(layer.training))
    for name, value in state.saved.items():
        model.network.get_parameter(name).copy_(value)
    drop_new_rows(model)
    for target in state.targets:
        if target.spec.name in state.brought_targets:
            model.remove_target(target.spec.name)
        else:
            target.put_on(model)
    model.adapter = None
    if state.brought_species:
        model.remove_species(state.brought_species)
    model.requires_grad_(False)


@dataclass(frozen=True)
class TrainableReport:
    """Numbers of trained parameters, in total and by kind.

    Attributes:
        trainable, total: counts.
        groups: counts of trained parameters by kind of module.
    """

    trainable: int
    total: int
    groups: dict[str, int]

    def __str__(self) -> str:
        share = 100.0 * self.trainable / max(self.total, 1)
        parts = ", ".join(f"{name} {count:,}" for name, count in self.groups.items())
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.1f} %): {parts}"


def freeze(model: Potential, train: Sequence[str] | None) -> None:
    """Let only the parameters train whose path in the network begins with one of ``train``."""
    found = False
    for name, parameter in model.network.named_parameters():
        trains = train is None or name.startswith(tuple(train))
        parameter.requires_grad_(trains)
        found |= trains
    if not found:
        parts = ", ".join(name for name, _ in model.network.named_children())
        raise AdapterError(
            f"Nothing would train: no parameter begins with {', '.join(train or ())}. "
            f"The model's parts are {parts}."
        )


def _kind(name: str) -> str:
    """Kind of a trained parameter in the report."""
    if name.endswith(f".{ROWS}"):
        return "embeddings of new elements"
    if ".adaption_" in name:
        return "prompts"
    return "adapters" if ".lora_" in name else name.split(".")[0]


def trainable_report(model: Potential) -> TrainableReport:
    """Count what trains."""
    groups: dict[str, int] = {}
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            kind = _kind(name)
            groups[kind] = groups.get(kind, 0) + parameter.numel()
    return TrainableReport(sum(groups.values()), model.num_parameters(), groups)


def lora_layers(model: Potential) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers of a model with their paths in the network."""
    for name, module in model.network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merge(model: Potential) -> None:
    """Merge the adapter into the weights, in place; the outputs stay the same bit for bit.

    Over a quantised base to rounding; the merged weights are floats until :func:`unmerge`. Prompts
    have nothing to merge into and stay as they are.
    """
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge(model: Potential) -> None:
    """Undo :func:`merge`: the base weights come back bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def merged_copy(model: Potential) -> Potential:
    """An independent plain model, without adapters, that predicts the same bit for bit.

    Over a quantised base the same to rounding. Prompts become part of the network.
    """
    plain = copy.deepcopy(model)
    plain.adapter = None
    for path, layer in list(lora_layers(plain)):
        replace_module(plain.network, path, layer.to_linear())
    for path, module in list(plain.network.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(plain.network, path, module.to_linear(plain.dtype))
    return merge_new_rows(plain)
