"""Putting a LoRA adapter into a potential."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pet_finetune.errors import AdapterError
from pet_finetune.model import PET, Potential
from pet_finetune.model.fingerprint import weights_fingerprint

from .lora import LoraLinear
from .matching import match_layers
from .trainable import freeze

DEFAULT_TARGETS = (
    "attention.input_linear",
    "attention.output_linear",
    "mlp.w_in",
    "mlp.w_out",
)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is made of.

    Attributes:
        rank, alpha, dropout: as in :class:`~.lora.LoraLinear`.
        target_modules: as in :func:`~.matching.match_layers`.
        modules_to_save: paths of modules that train whole and are kept with the adapter; None
            stands for the heads and last layers of ``target``.
        target: the energy that the adapter is for.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = DEFAULT_TARGETS
    modules_to_save: Sequence[str] | None = None
    target: str = "energy"


@dataclass(frozen=True)
class AdapterState:
    """An adapter in a model, with what is needed to go back to the base.

    Attributes:
        config: resolved configuration.
        fingerprint: of the base, before anything was added to it.
        inherited_from: the target whose heads the adapter's target started from, if any.
        saved: the base's values of the parameters of ``modules_to_save``, by path.
        composition, scale: the base's baseline and scale of the target.
    """

    config: AdapterConfig
    fingerprint: str
    inherited_from: str | None
    saved: dict[str, Tensor]
    composition: Tensor
    scale: Tensor


def default_modules_to_save(network: PET, target: str) -> list[str]:
    """Paths of a target's heads and last layers, one for each read-out.

    Each is a module that Hugging Face PEFT can wrap, which lists and dictionaries are not.
    """
    paths = []
    for group, module in network.head_modules(target).items():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleDict):
                paths += [f"{group}.{name}.{key}" for key in child]
            else:
                paths.append(f"{group}.{name}")
    return paths


def _match_saved(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules named by ``modules_to_save``, by whole path, ending or beginning."""
    modules = [name for name, _ in network.named_modules() if name]
    paths: list[str] = []
    for wanted in names:
        found = [n for n in modules if n == wanted or n.endswith(f".{wanted}")]
        if not found:
            raise AdapterError(
                f"modules_to_save: the model has no module '{wanted}'. "
                f"It has, among others: {', '.join(sorted({n.split('.')[0] for n in modules}))}."
            )
        paths += found
    return list(dict.fromkeys(paths))


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
    inherited_from: str | None = None,
) -> AdapterConfig:
    """Put a fresh adapter into a model, in place, and freeze everything else.

    Every prediction stays what it was, bit for bit, until the adapter is trained.

    Args:
        model: a potential without adapter.
        config: what to inject; patterns are resolved against the model.
        fingerprint: of the base, where heads were added to it since; computed when left out.
        inherited_from: the target whose heads those of ``config.target`` were copied from.

    Returns:
        The configuration with ``target_modules`` and ``modules_to_save`` as full paths.

    Raises:
        AdapterError: patterns that match nothing, a rank below 1, or an adapter there already.
    """
    if active_adapter(model) is not None:
        raise AdapterError("The model carries an adapter already: merge or unload it first.")
    if config.rank < 1:
        raise AdapterError(f"The rank of an adapter is at least 1, got {config.rank}.")
    model.target(config.target)
    network = model.network
    layers = match_layers(network, config.target_modules)
    if config.modules_to_save is None:
        saved = default_modules_to_save(network, config.target)
    else:
        saved = _match_saved(network, config.modules_to_save)
    if fingerprint is None:
        fingerprint = weights_fingerprint(model)
    for path in layers:
        parent_path, _, name = path.rpartition(".")
        parent = network.get_submodule(parent_path)
        base = parent.get_submodule(name)
        assert isinstance(base, nn.Linear), f"{path} is not linear"
        adapted = LoraLinear(base, config.rank, config.alpha, config.dropout)
        adapted.train(base.training)
        if isinstance(parent, nn.Sequential):
            parent[int(name)] = adapted
        else:
            setattr(parent, name, adapted)
    resolved = replace(config, target_modules=tuple(layers), modules_to_save=tuple(saved))
    freeze(model, train=[*(f"{path}.lora_" for path in layers), *(f"{path}." for path in saved)])
    trained = tuple(f"{path}." for path in saved)
    model.adapter = AdapterState(
        config=resolved,
        fingerprint=fingerprint,
        inherited_from=inherited_from,
        saved={
            name: parameter.detach().clone()
            for name, parameter in network.named_parameters()
            if name.startswith(trained)
        },
        composition=model.composition.get(config.target).clone(),
        scale=model.scale.get(config.target).clone(),
    )
    return resolved
