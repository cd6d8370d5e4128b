"""An adapter at rest: all that is needed to put it onto its base, and nothing of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.errors import AdapterError
from pet_finetune.model.potential import Potential

from .adapter_config import AdapterConfig, resolve
from .base_weights import quantize_base
from .inject import (
    AdapterTarget,
    active_adapter,
    adapter_state,
    adapter_tensors,
    eject,
    place,
    saved_parameters,
    target_of,
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter without its model: tensors, configuration and targets.

    Attributes:
        config: resolved, unless Hugging Face PEFT wrote it.
        tensors: on the CPU, by their names in the network: those that adapted layers add, and the
            parameters of ``modules_to_save``.
        fingerprint: of the base that it belongs to; None where the writer did not say.
        base_name: what that base is called.
        targets: what it predicts, with baselines on the CPU; none: the model's first target.
        species: atomic numbers of the baselines; those that the base lacks came with the adapter.
        name: what to call it in messages: its folder.
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    fingerprint: str | None = None
    base_name: str = ""
    targets: tuple[AdapterTarget, ...] = ()
    species: tuple[int, ...] = ()
    name: str = ""

    @property
    def base_in_words(self) -> str:
        """To which base it belongs, for messages."""
        return (
            f"'{self.name}' belongs to the base '{self.base_name or 'unnamed'}' "
            f"(fingerprint {str(self.fingerprint)[:12]})"
        )

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def capture(model: Potential, base_name: str = "") -> Adapter:
    """The adapter that a model carries."""
    state = adapter_state(model)
    config = state.config
    tensors = adapter_tensors(model)
    tensors |= dict(saved_parameters(model, config.modules_to_save or ()))
    return Adapter(
        config=config,
        tensors={n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()},
        fingerprint=state.fingerprint,
        base_name=base_name,
        targets=tuple(_at_rest(model, target) for target in state.targets),
        species=model.species,
    )


def _at_rest(model: Potential, start: AdapterTarget) -> AdapterTarget:
    """A target as the adapter has made it, on the CPU."""
    now = target_of(model, start.spec.name, start.inherited_from)
    assert now.composition is not None
    return replace(now, composition=now.composition.cpu())


def check_base(adapter: Adapter, fingerprint: str) -> None:
    """Make sure that an adapter was made for the base with this fingerprint."""
    if adapter.fingerprint not in (None, fingerprint):
        raise AdapterError(
            f"The adapter {adapter.base_in_words}, but this model has the fingerprint "
            f"{fingerprint[:12]}. Open it with the checkpoint it was trained from."
        )


def install(model: Potential, adapter: Adapter, fingerprint: str | None = None) -> AdapterConfig:
    """Put an adapter onto its base, in place.

    Args:
        model: the base, without adapter.
        adapter: what to put on.
        fingerprint: of the base, where it is known; computed when left out.

    Returns:
        Its configuration with full paths and the names of its targets.

    Raises:
        AdapterError: the model carries an adapter, is another base, or the tensors do not fit.
    """
    if active_adapter(model) is not None:
        raise AdapterError("The model carries an adapter already: merge or unload it first.")
    fingerprint = fingerprint or weights_fingerprint(model)
    check_base(adapter, fingerprint)
    targets = adapter.targets or (AdapterTarget(next(iter(model.targets.values()))),)
    brought = [target for target in targets if target.spec.name not in model.targets]
    new_species = tuple(number for number in adapter.species if number not in model.species)
    try:
        for target in brought:
            model.add_target(target.spec, inherit_from=target.inherited_from)
        # What they start with does not matter: the adapter holds their embeddings.
        model.add_species(new_species, dict.fromkeys(new_species, model.species[0]))
        names = tuple(target.spec.name for target in targets)
        config = resolve(model.network, replace(adapter.config, targets=names))
        place(
            model,
            config,
            fingerprint=fingerprint,
            inherited={t.spec.name: t.inherited_from for t in targets if t.inherited_from},
            brought_targets=[target.spec.name for target in brought],
            brought_species=new_species,
        )
        _copy_tensors(model, config, adapter)
        for target in targets:
            target.put_on(model)
        if config.quant_bits is not None:  # last, because there is no way back from it
            quantize_base(model, config)
    except BaseException:
        if active_adapter(model) is not None:
            eject(model)
        else:
            model.remove_species([number for number in new_species if number in model.species])
            for name in {target.spec.name for target in brought} & model.targets.keys():
                model.remove_target(name)
        raise
    return config


@torch.no_grad()
def _copy_tensors(model: Potential, config: AdapterConfig, adapter: Adapter) -> None:
    room = adapter_tensors(model)
    room |= dict(saved_parameters(model, config.modules_to_save or ()))
    missing, unknown = room.keys() - adapter.tensors.keys(), adapter.tensors.keys() - room.keys()
    if missing or unknown:
        raise AdapterError(
            f"'{adapter.name}' does not fit the model: {len(missing)} tensors are missing "
            f"({', '.join(sorted(missing)[:3])}...), {len(unknown)} are unknown "
            f"({', '.join(sorted(unknown)[:3])}...)."
        )
    for name, value in adapter.tensors.items():
        if room[name].shape != value.shape:
            raise AdapterError(
                f"'{adapter.name}': {name} has the shape {tuple(value.shape)}, the model needs "
                f"{tuple(room[name].shape)}."
            )
        room[name].copy_(value)
