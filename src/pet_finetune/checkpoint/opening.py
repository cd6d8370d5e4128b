"""Opening any checkpoint, ours or metatrain's, recognised by its content."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from typing import Any

from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.adapters.inject import active_adapter, merged_copy
from pet_finetune.adapters.peft_files import load_adapter
from pet_finetune.backends.choice import choose_backend, use_backend
from pet_finetune.committee.committee import Committee
from pet_finetune.committee.committee_files import Adapters, load_committee
from pet_finetune.device import choose_device, plain_torch
from pet_finetune.errors import CheckpointError, ConfigError, damage_explained
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential

from .archive import Checkpoint, TorchArchive
from .metatrain import is_metatrain, is_of_numbers, read_metatrain, read_numbers
from .native import is_native, read_native
from .safe_pickle import StoredTensor
from .stored_targets import StoredTarget

_log = get_logger(__name__)


@plain_torch()
def load_checkpoint(path: str | os.PathLike[str], *, keep_adapter: bool = False) -> Checkpoint:
    """Open a checkpoint written by pet-finetune or by metatrain (PET, model format 1 to 16).

    Nothing in the file is executed, and metatrain need not be installed.

    Args:
        path: the file, or its address or name (:func:`~pet_finetune.hub.find_model`).
        keep_adapter: keep the adapter of an interrupted LoRA run unmerged, for further training;
            otherwise it is merged into the weights.

    Raises:
        CheckpointError: the file is something else, or damaged; the message says so in one line.
        ConfigError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise no_model(path)
    with TorchArchive(path) as archive, damage_explained(archive.damaged):
        content = archive.content()
        if is_native(content):
            return _finite(read_native(archive, content, keep_adapter))
        if not is_metatrain(content):
            raise CheckpointError(f"{archive.path}: {_what_it_is(content)}")
        converted = read_metatrain(archive, content)
    for notice in converted.notices:
        _log.info("%s: %s", converted.path, notice)
    return _finite(converted)


#: What to do with objects that are taken for models.
_HINTS = {
    "Checkpoint": " Give its attribute `model`.",
    "Committee": " For a committee, give its foundation and the folder of its run: PETCalculator("
    "foundation, adapters=folder), pf.export(foundation, file, adapter=folder).",
}


def no_model(given: object) -> ConfigError:
    """The error for an object that is neither a model nor the path of one."""
    kind = type(given).__name__
    return ConfigError(
        "model: expected a checkpoint (a path, an address or a name), or a model as pf.load gives "
        f"it, got {kind}.{_HINTS.get(kind, '')}"
    )


def _finite(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or an error if its weights are not finite."""
    for name, weights in checkpoint.model.network.named_parameters():
        # NaN and infinity are among the extremes, which are found in one pass.
        extremes = weights.detach().aminmax() if weights.numel() else ()
        if not all(map(math.isfinite, extremes)):
            raise CheckpointError(
                f"{checkpoint.path}: weights ({name}) are NaN or infinite: the training that wrote "
                "them has diverged, or the file is damaged. Take an earlier checkpoint of it."
            )
    return checkpoint


@plain_torch()
def load_numbers(path: str | os.PathLike[str]) -> tuple[Sequence[int], list[StoredTarget]]:
    """The elements of a checkpoint, and its targets with their baselines and scales.

    Also of metatrain's ``composition`` or ``scaler``, which are no whole models.
    """
    with TorchArchive(path) as archive, damage_explained(archive.damaged):
        content = archive.content()
        if is_of_numbers(content):
            return read_numbers(archive, content)
    model = load_checkpoint(path).model
    scale, composition = model.scale, model.composition
    return model.species, [
        StoredTarget(spec, composition.get(name), float(scale.get(name)), scale.relative(name))
        for name, spec in model.targets.items()
    ]


@plain_torch()
def load(path: str | os.PathLike[str]) -> AdaptedPotential:
    """Open a checkpoint as a base that adapters can be loaded onto.

    >>> model = load("foundation.ckpt")  # doctest: +SKIP
    >>> model.load_adapter("water_revpbe0/", name="water")  # doctest: +SKIP
    """
    checkpoint = load_checkpoint(path)
    adapted = AdaptedPotential(checkpoint.model)
    adapted.source = checkpoint.path
    return adapted


@plain_torch()
def open_adapted(
    model: str | os.PathLike[str] | Potential | AdaptedPotential,
    adapter: str | os.PathLike[str] | None = None,
) -> AdaptedPotential:
    """A base with its adapters, to predict with; a potential is copied.

    An adapter folder is put on as ``default``.
    """
    if isinstance(model, AdaptedPotential):
        adapted = copy.deepcopy(model)
    elif isinstance(model, Potential):
        adapted = AdaptedPotential(copy.deepcopy(model))
    else:
        adapted = load(model)
    if adapter is not None:
        adapted.load_adapter(os.fspath(adapter), name="default")
        adapted.set_adapter("default")
    return adapted


@plain_torch()
def open_potential(
    model: str | os.PathLike[str] | Potential, adapter: str | os.PathLike[str] | None = None
) -> tuple[Potential, tuple[str, ...]]:
    """A plain potential to predict with, and the targets of the adapter merged into it, if any.

    A potential is copied.
    """
    if isinstance(model, Potential):
        potential = copy.deepcopy(model)
    else:
        potential = load_checkpoint(model).model
    if adapter is not None:
        load_adapter(potential, os.fspath(adapter))
    config = active_adapter(potential)
    return (potential, ()) if config is None else (merged_copy(potential), tuple(config.targets))


def open_model(
    checkpoint: str | os.PathLike[str] | Potential,
    adapter: str | os.PathLike[str] | None,
    device: str,
) -> tuple[Potential, tuple[str, ...]]:
    """A model ready to predict, and the targets of its adapter."""
    model, targets = open_potential(checkpoint, adapter)
    chosen = choose_device(device)
    use_backend(model, choose_backend(chosen))
    return model.to(chosen).eval(), targets


@plain_torch()
def open_committee(
    model: str | os.PathLike[str] | Potential | AdaptedPotential,
    adapters: Adapters,
    target: str | None = None,
) -> Committee:
    """A committee to predict with, of several adapters of one base.

    Args:
        model: the base: a checkpoint, or a potential, which stays as it is.
        adapters: as for :func:`~pet_finetune.committee.committee_files.load_committee`.
        target: its energy, likewise.

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
        AdapterError: the adapters cannot be read, are too few, or do not belong together.
        ConfigError: the base has adapters, or there are several energies and none is named.
    """
    if isinstance(model, AdaptedPotential):
        raise ConfigError(
            "adapters: a committee is made of a base and adapter folders; this model has adapters "
            "of its own. Give its checkpoint instead."
        )
    base = model if isinstance(model, Potential) else load_checkpoint(model).model
    return load_committee(base, adapters, target)


def _what_it_is(content: Any) -> str:
    wanted = "A checkpoint is a file written by pet-finetune or metatrain, e.g. best_model.ckpt."
    if not isinstance(content, dict):
        return f"the file holds a {type(content).__name__}, not a checkpoint. {wanted}"
    if content and all(isinstance(value, StoredTensor) for value in content.values()):
        return (
            "the file is a bare state dict, without the model's hyperparameters. Start "
            "from it with MODEL_TO_START_WITH, ALL_SPECIES_PATH and SELF_CONTRIBUTIONS_PATH."
        )
    names = ", ".join(sorted(str(key) for key in content)[:5])
    return f"the file is no PET checkpoint (it holds: {names or 'nothing'}). {wanted}"
