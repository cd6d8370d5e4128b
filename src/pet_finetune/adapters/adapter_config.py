"""Configuration of an adapter: layer patterns as in PEFT, with ranks and alphas resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from pet_finetune.config.finetune import DEFAULT_TARGET_MODULES
from pet_finetune.errors import AdapterError, did_you_mean
from pet_finetune.model.pet import HEAD_GROUPS, PET


@dataclass(frozen=True)
class AdapterConfig:
    """Configuration of an adapter, with Hugging Face PEFT's names where they exist.

    Attributes:
        rank, alpha, dropout, use_rslora: as in :class:`~.layers.LoraLinear`.
        target_modules: as in :func:`~.adapter_config.match_layers`.
        modules_to_save: paths of modules that train whole and are kept with the adapter; None
            stands for the heads and last layers of ``targets``.
        targets: what the adapter predicts: energies and other targets, one or more.
        use_dora: train lengths and directions apart (:class:`~.layers.DoraLinear`).
        rank_pattern, alpha_pattern: other ranks and alphas for the layers whose path ends like
            the key, or matches it as a regular expression; the first match counts.
        quant_bits: hold the frozen weights in 4 or 8 bits (:mod:`.base_weights`); None keeps them.
        num_prompts: prompt tuning with this many tokens a layer in place of low-rank updates, whose
            settings then mean nothing; 0 for none.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = DEFAULT_TARGET_MODULES
    modules_to_save: Sequence[str] | None = None
    targets: Sequence[str] = ("energy",)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    quant_bits: int | None = None
    num_prompts: int = 0

    def rank_of(self, path: str) -> int:
        """The rank of the update of one layer."""
        key = _pattern_for(path, self.rank_pattern)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, path: str) -> float:
        """The alpha of one layer."""
        key = _pattern_for(path, self.alpha_pattern)
        return self.alpha if key is None else self.alpha_pattern[key]


def _pattern_for(path: str, patterns: Mapping[str, object]) -> str | None:
    """The first pattern that means a layer, by PEFT's rule."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def resolve(network: PET, config: AdapterConfig) -> AdapterConfig:
    """The configuration with whole paths of layers and modules."""
    layers = [] if config.num_prompts else match_layers(network, config.target_modules)
    saved = config.modules_to_save
    if saved is None:
        paths = [p for target in config.targets for p in default_modules_to_save(network, target)]
    else:
        paths = _match_saved(network, saved)
    return replace(
        config,
        target_modules=tuple(layers),
        modules_to_save=tuple(paths),
        targets=tuple(config.targets),
    )


def fitted(network: PET, config: AdapterConfig) -> AdapterConfig:
    """The result of :func:`resolve`, with ranks checked against the widths of the layers.

    A layer that is narrower than the rank gets as much rank as it can use, at the same scaling.

    Raises:
        AdapterError: a pattern that matches nothing, or a rank that is below 1, one in
            ``rank_pattern`` that is above the width of its layer, or ``quant_bits`` that cannot be.
    """
    if config.quant_bits not in (None, 4, 8):
        raise AdapterError(f"quant_bits is 4 or 8, got {config.quant_bits}.")
    if config.num_prompts:
        if config.quant_bits is not None:
            raise AdapterError("quant_bits goes with low-rank adapters, not with prompts.")
        return resolve(network, config)
    layers = match_layers(network, config.target_modules)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(name, getattr(config, name), layers)
    config = _lowered(network, config, layers)
    _check_ranks(network, config, layers)
    return resolve(network, config)


def _check_patterns(name: str, patterns: Mapping[str, object], layers: Sequence[str]) -> None:
    for key in patterns:
        try:
            found = any(_pattern_for(path, {key: None}) for path in layers)
        except re.error as error:
            raise AdapterError(
                f"{name}: '{key}' is neither a layer nor a regular expression ({error})."
            ) from error
        if not found:
            endings = sorted({".".join(path.split(".")[-2:]) for path in layers})
            raise AdapterError(
                f"{name}: '{key}' matches none of the adapted layers."
                f"{did_you_mean(key, endings)} They end in {', '.join(endings)}."
            )


def _width(network: nn.Module, path: str) -> int:
    linear = network.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is not linear"
    return min(linear.in_features, linear.out_features)


def _lowered(network: nn.Module, config: AdapterConfig, layers: Sequence[str]) -> AdapterConfig:
    """Ranks lowered where a layer has no room for them."""
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for path in layers:
        width, rank = _width(network, path), config.rank_of(path)
        if rank > width and _pattern_for(path, config.rank_pattern) is None:
            shrunk = (width / rank) ** (0.5 if config.use_rslora else 1.0)
            ranks[re.escape(path)] = width
            alphas[re.escape(path)] = config.alpha_of(path) * shrunk
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _check_ranks(network: nn.Module, config: AdapterConfig, layers: Sequence[str]) -> None:
    for path in layers:
        rank, width = config.rank_of(path), _width(network, path)
        if rank < 1:
            raise AdapterError(f"The rank of an adapter is at least 1, got {rank}.")
        if rank > width:
            raise AdapterError(
                f"The rank {rank} is above the width of the layer {path}, {width}. Choose a rank "
                f"of at most {width} for it in rank_pattern."
            )


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
