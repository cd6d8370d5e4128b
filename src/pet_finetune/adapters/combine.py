"""Combine adapters into one: weighted sums of their updates.

Low-rank updates are blended in one of three ways, by the names of Hugging Face PEFT's
``add_weighted_adapter``. With weights w, scalings s and factors B, A:

========== ========================================================= ==================
``cat``    the exact sum of the updates, ``sum w s B A``             ranks add up
``svd``    its best approximation of a given rank                    the highest rank
``linear`` ``(sum sqrt(w s) B) (sum sqrt(w s) A)``, with the cross   the common rank
           terms that this brings: rough unless the adapters are
           close relatives
========== ========================================================= ==================

What trained whole (heads, last layers, baselines) becomes the weighted sum of its changes since the
base; for weights that sum to 1 the base drops out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pet_finetune.errors import AdapterError, did_you_mean
from pet_finetune.model.potential import Potential
from pet_finetune.nn.primitives import ROWS

from .at_rest import Adapter, install
from .inject import AdapterTarget, adapter_state, eject
from .layers import is_adapter_tensor

Combination = Literal["linear", "cat", "svd"]
Weighted = Sequence[tuple[Adapter, float]]

_WHOLE = 1e-9  # weights whose sum is this close to 1 need no base


def combine(
    parts: Weighted,
    combination: str = "cat",
    *,
    rank: int | None = None,
    base: Potential | None = None,
    name: str = "",
) -> Adapter:
    """Blend adapters of one base into one.

    Args:
        parts: adapters with their weights, which may be negative.
        combination: ``linear``, ``cat`` or ``svd``.
        rank: of the result, for ``svd``; the highest of the parts when left out.
        base: the base without an adapter; needed where the weights do not sum to 1. With it, heads
            that began at random are found too.
        name: of the result.

    Raises:
        AdapterError: unknown combination, adapters that do not go together (other bases, targets,
            heads or scales), ranks that ``linear`` cannot blend, or DoRA and prompts, which are no
            updates of low rank.
    """
    _check_request(parts, combination, rank)
    _check_together(parts)
    if base is not None:
        _check_heads(parts, base)
    if combination == "linear":
        _check_ranks(parts)
    updates = {}
    layers = dict.fromkeys(path for adapter, _ in parts for path in _layers(adapter))
    for path in layers:
        factors = [_factors(a, path) for a, _ in parts]
        weights = [w for (_, w), f in zip(parts, factors, strict=True) if f is not None]
        known = [f for f in factors if f is not None]
        blended = _BLENDS[combination](known, weights)
        if combination == "svd":
            blended = _truncated(blended, rank or max(len(a) for a, _ in known))
        updates[path] = blended
    first = parts[0][0]
    ranks = {path: len(a) for path, (a, _) in updates.items()}
    common = max(ranks.values(), default=1)
    config = replace(
        first.config,
        rank=common,
        alpha=float(common),
        use_rslora=False,
        target_modules=tuple(layers),
        rank_pattern={p: r for p, r in ranks.items() if r != common},
        alpha_pattern={p: float(r) for p, r in ranks.items() if r != common},
    )
    tensors = _whole_modules(parts, base)
    for path, (a, b) in updates.items():
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = a.contiguous(), b.contiguous()
    return replace(first, config=config, tensors=tensors, targets=_targets(parts, base), name=name)


def _check_request(parts: Weighted, combination: str, rank: int | None) -> None:
    names = get_args(Combination)
    if combination not in names:
        raise AdapterError(
            f"There is no combination '{combination}'.{did_you_mean(combination, names)} Choose "
            f"one of {', '.join(names)}."
        )
    if not parts:
        raise AdapterError("There is nothing to combine: name at least one adapter.")
    if not all(math.isfinite(weight) for _, weight in parts):
        raise AdapterError("The weights of adapters to combine are finite numbers.")
    if rank is not None and (combination != "svd" or rank < 1):
        raise AdapterError(f"The rank {rank} can be chosen for svd alone, and is at least 1.")


def _check_together(parts: Weighted) -> None:
    first = parts[0][0]
    for adapter, _ in parts:
        if adapter.config.use_dora:
            raise AdapterError(
                f"'{adapter.name}' is a DoRA adapter: its update is not of low rank and cannot be "
                "blended. Merge it into a checkpoint instead."
            )
        if adapter.config.num_prompts:
            raise AdapterError(
                f"'{adapter.name}' holds prompts, which are no updates of weights and cannot be "
                "blended. Choose adapters of method lora."
            )
        for what, one, other in (
            ("base", first.fingerprint, adapter.fingerprint),
            ("list of targets", sorted(first.config.targets), sorted(adapter.config.targets)),
            *_of_each_target("scale", first, adapter, lambda target: target.scale),
            ("list of elements", first.species, adapter.species),
            *_of_each_target("start of the heads", first, adapter, lambda t: t.inherited_from),
            ("number of bits of the base", first.config.quant_bits, adapter.config.quant_bits),
        ):
            if one != other:
                raise AdapterError(
                    f"The adapters '{first.name}' and '{adapter.name}' do not go together: "
                    f"the {what} of the one is {one}, that of the other {other}."
                )
        ours, theirs = _heads(first), _heads(adapter)
        if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
            raise AdapterError(
                f"The adapters '{first.name}' and '{adapter.name}' do not go together: they bring "
                "different heads (modules_to_save). Retrain one of them with those of the other."
            )


def _of_each_target(
    what: str, one: Adapter, other: Adapter, value: Callable[[AdapterTarget], object]
) -> Iterator[tuple[str, object, object]]:
    """Values of two adapters for each shared target."""
    theirs = {target.spec.name: target for target in other.targets}
    for target in one.targets:
        if target.spec.name in theirs:
            name = target.spec.name
            yield f"{what} of '{name}'", value(target), value(theirs[name])


def _check_heads(parts: Weighted, base: Potential) -> None:
    """Random heads are no neighbours of each other: the mean of two predicts nothing."""
    first, *others = [adapter for adapter, _ in parts]
    for target in first.targets if others else ():
        if target.spec.name not in base.targets and target.inherited_from is None:
            raise AdapterError(
                f"The adapters '{first.name}' and '{others[0].name}' do not go together: each "
                f"brings heads of its own for '{target.spec.name}', which their base lacks, and "
                "they began at random. Train them with inherit_heads to blend them."
            )


def _check_ranks(parts: Weighted) -> None:
    first = parts[0][0]
    for adapter, _ in parts:
        for path in dict.fromkeys([*_layers(first), *_layers(adapter)]):
            one, other = _factors(first, path), _factors(adapter, path)
            if one is None or other is None or len(one[0]) != len(other[0]):
                ranks = [0 if found is None else len(found[0]) for found in (one, other)]
                raise AdapterError(
                    f"linear blends adapters of the same ranks, and those of {path} are "
                    f"{ranks[0]} in '{first.name}' and {ranks[1]} in '{adapter.name}'. Use cat or "
                    "svd."
                )


def _layers(adapter: Adapter) -> list[str]:
    """Paths of the adapted layers."""
    return [n.removesuffix(".lora_A") for n in adapter.tensors if n.endswith(".lora_A")]


def _heads(adapter: Adapter) -> dict[str, Tensor]:
    """Modules trained in full, with embeddings of new elements."""
    return {
        n: t
        for n, t in adapter.tensors.items()
        if n.endswith(f".{ROWS}") or not is_adapter_tensor(n)
    }


def _factors(adapter: Adapter, path: str) -> tuple[Tensor, Tensor] | None:
    """A and s B of a layer; None where it has none."""
    tensors, config = adapter.tensors, adapter.config
    a, b = tensors.get(f"{path}.lora_A"), tensors.get(f"{path}.lora_B")
    if a is None or b is None:
        return None
    rank = config.rank_of(path)
    scaling = config.alpha_of(path) / (math.sqrt(rank) if config.use_rslora else rank)
    return a, scaling * b


Factors = tuple[Tensor, Tensor]


def _concatenated(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    a = torch.cat([a for a, _ in factors])
    b = torch.cat([w * b for (_, b), w in zip(factors, weights, strict=True)], dim=1)
    return a, b


def _linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """PEFT's: the square root of each weight and scaling goes to both factors, its sign to A."""
    a, b = torch.zeros_like(factors[0][0]), torch.zeros_like(factors[0][1])
    for (one, other), weight in zip(factors, weights, strict=True):
        root = math.sqrt(abs(weight))
        a, b = a + math.copysign(root, weight) * one, b + root * other
    return a, b


_BLENDS = {"cat": _concatenated, "linear": _linear, "svd": _concatenated}


def _truncated(factors: Factors, rank: int) -> Factors:
    """The best approximation of b a with a given rank (Eckart and Young, 1936)."""
    a, b = factors
    u, s, vh = torch.linalg.svd(b.to(torch.float64) @ a.to(torch.float64), full_matrices=False)
    root = s[:rank].sqrt()
    return (root.unsqueeze(1) * vh[:rank]).to(a), (u[:, :rank] * root).to(b)


def _whole_modules(parts: Weighted, base: Potential | None) -> dict[str, Tensor]:
    """The weighted sum of what trained whole."""
    heads = [_heads(adapter) for adapter, _ in parts]
    left = 1.0 - sum(weight for _, weight in parts)
    if abs(left) > _WHOLE and any(name.endswith(f".{ROWS}") for name in heads[0]):
        raise AdapterError(
            "The adapters bring elements that their base lacks, so there is nothing to add where "
            "the weights do not sum to 1: choose weights that do."
        )
    start = _at_the_base(parts[0][0], base)[0] if abs(left) > _WHOLE and heads[0] else {}
    return {
        name: sum(
            (weight * own[name] for own, (_, weight) in zip(heads, parts, strict=True)),
            left * start[name].cpu() if start else torch.zeros_like(heads[0][name]),
        )
        for name in heads[0]
    }


def _targets(parts: Weighted, base: Potential | None) -> tuple[AdapterTarget, ...]:
    """The targets with the weighted sums of their baselines."""
    first, left = parts[0][0], 1.0 - sum(weight for _, weight in parts)
    start = _at_the_base(first, base)[1] if abs(left) > _WHOLE and first.targets else ()
    at_base = {target.spec.name: target for target in start}
    blended = []
    for target in first.targets:
        name = target.spec.name
        same = [(t, w) for a, w in parts for t in a.targets if t.spec.name == name]
        if start:
            same.append((at_base[name], left))
        baselines = [(t.composition, weight) for t, weight in same]
        composition = None
        if all(baseline is not None for baseline, _ in baselines):
            terms = [weight * b.cpu() for b, weight in baselines if b is not None]
            composition = torch.stack(terms).sum(0)
        blended.append(replace(target, composition=composition))
    return tuple(blended)


def _at_the_base(
    adapter: Adapter, base: Potential | None
) -> tuple[Mapping[str, Tensor], tuple[AdapterTarget, ...]]:
    """The base's modules in place of those trained in full, and its targets."""
    if base is None:
        raise AdapterError(
            "The weights do not sum to 1, so the heads cannot be blended without those of the "
            "base: give the base, or choose weights that sum to 1."
        )
    install(base, replace(adapter, config=replace(adapter.config, quant_bits=None)))
    state = adapter_state(base)
    found = state.saved, state.targets
    eject(base)
    return found
