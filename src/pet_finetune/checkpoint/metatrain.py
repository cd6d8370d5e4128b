"""Reading PET checkpoints written by metatrain, of model format 1 to 16, into a Potential."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pet_finetune.errors import CheckpointError, UnitError
from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential
from pet_finetune.model.terms import species_table
from pet_finetune.units import length_to_angstrom

from .archive import Checkpoint, TorchArchive, build_potential, model_options, plain_value
from .metatrain_formats import LLPR, RawCheckpoint, merge_lora_layers, read_llpr, upgrade
from .safe_pickle import Inert
from .stored_targets import StoredTarget, usable_targets

#: Architectures of numbers without a network, and where a PET has the same numbers.
_OF_NUMBERS = {"composition": "additive_models.0.", "scaler": "scaler."}

_BACKEND = "backend."
#: What of our network stands beside metatrain's.
_BESIDE = ("long_range_featurizer.charges_map.", "long_range_featurizer.out_projection.")
#: Parts of a state dict that say nothing the rest does not, or nothing about predictions.
_IGNORED = (
    "system_conditioning.",
    "additive_models.0.",
    "scaler.",
    "additive_models.1.",
    "long_range_featurizer.direct_calculator.",
    "long_range_featurizer.ewald_calculator.",
    "long_range_featurizer.p3m_calculator.",
)


def is_metatrain(content: Any) -> bool:
    """Whether what a file holds looks like a checkpoint of metatrain, of any architecture."""
    return isinstance(content, dict) and "architecture_name" in content


def read_metatrain(archive: TorchArchive, content: Mapping[str, Any]) -> Checkpoint:
    """Convert a checkpoint of metatrain's PET.

    The weights of the best epoch are used, as metatrain does to fine-tune and to export.

    Raises:
        CheckpointError: if it is of another architecture, holds no target that can be used, or is
            damaged.
    """
    where = str(archive.path)
    notices: list[str] = []
    wrapper, content = content, _unwrapped(content, where)
    written = _version(content, where)
    raw = upgrade(read_raw(archive, content, notices), where)
    info = _dataset_info(content, where)
    species = _species(info, where)
    state = merge_lora_layers(raw.state, raw.finetune, where, notices)
    hypers = model_options(raw.hypers, where)
    targets = usable_targets(
        archive, _targets(info, where), state, raw.scales, species, hypers.zbl, notices
    )
    network = _network(state, {stored.spec.name for stored in targets}, where)
    model = build_potential(
        hypers,
        species,
        [stored.spec for stored in targets],
        network,
        composition={t.spec.name: t.composition for t in targets if t.composition is not None},
        scale={t.spec.name: t.scale for t in targets},
        relative={t.spec.name: t.relative for t in targets if t.relative is not None},
        radii=state.get("additive_models.1.covalent_radii"),
        where=where,
    )
    _check_species_table(model, network, where)
    if wrapper is not content:
        factors = {stored.spec.name: stored.factor for stored in targets}
        read_llpr(archive, wrapper, model, factors, notices)
    provenance = _provenance(content, written)
    return Checkpoint(model, "metatrain", provenance, None, archive.path, tuple(notices))


def is_of_numbers(content: Any) -> bool:
    """Whether a checkpoint is of the architecture ``composition`` or ``scaler``."""
    return is_metatrain(content) and content["architecture_name"] in _OF_NUMBERS


def read_numbers(
    archive: TorchArchive, content: Mapping[str, Any]
) -> tuple[list[int], list[StoredTarget]]:
    """The elements and targets of a checkpoint that holds baselines or scales and no network.

    Raises:
        CheckpointError: it holds no target that can be used, or is damaged.
    """
    where, name = str(archive.path), content["architecture_name"]
    info, state = _dataset_info(content, where), content.get("model_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: the checkpoint holds no numbers (model_state_dict).")
    numbers = {_OF_NUMBERS[name] + key: value for key, value in archive.tensors(state).items()}
    species = _species(info, where)
    targets = _targets(info, where)
    return species, usable_targets(archive, targets, numbers, {}, species, False, [])


def read_raw(
    archive: TorchArchive, content: Mapping[str, Any], notices: list[str] | None = None
) -> RawCheckpoint:
    """Read the parts of a checkpoint that decide predictions, in the format it was written in.

    Raises:
        CheckpointError: if it is of another architecture or lacks a part.
    """
    where = str(archive.path)
    if content.get("architecture_name") != "pet":
        raise CheckpointError(
            f"{where}: this is a checkpoint of metatrain's architecture "
            f"{content.get('architecture_name')!r}, and only 'pet' can be read."
        )
    version = _version(content, where)
    data = content.get("model_data")
    if not isinstance(data, dict) or not isinstance(data.get("model_hypers"), dict):
        raise CheckpointError(f"{where}: the checkpoint lacks its hyperparameters (model_data).")

    def error(problem: str) -> CheckpointError:
        return CheckpointError(f"{where}: {problem}, which no PET checkpoint needs.")

    hypers = plain_value(data["model_hypers"], "model_hypers", error)
    stored, finetune = _choose_state(content, version, where, [] if notices is None else notices)
    info = _dataset_info(content, where)
    return RawCheckpoint(
        version=version,
        hypers=hypers,
        state=archive.tensors(stored),
        targets=tuple(_targets(info, where)),
        finetune=plain_value(finetune, "finetune_config", error),
    )


def _unwrapped(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The model inside an uncertainty estimate, as metatrain takes it to fine-tune."""
    if content.get("architecture_name") != LLPR:
        return content
    inside = content.get("wrapped_model_checkpoint")
    if not isinstance(inside, dict):
        raise CheckpointError(
            f"{where}: this checkpoint is of '{LLPR}', an uncertainty estimate around another "
            "model, and holds no such model. Use the checkpoint it was made from."
        )
    return inside


def _version(content: Mapping[str, Any], where: str) -> int:
    # Files from before versions were counted are taken for the first, as metatrain does.
    version = content.get("model_ckpt_version", 1)
    if type(version) is not int:
        raise CheckpointError(f"{where}: the format version {version!r} is not a number.")
    return version


def _choose_state(
    content: Mapping[str, Any], version: int, where: str, notices: list[str]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The state dict that metatrain would evaluate, and how it was fine-tuned."""
    best, last = content.get("best_model_state_dict"), content.get("model_state_dict")
    # Format 7 and before: the large models were always used as of their last epoch.
    large = version <= 7 and isinstance(last, dict) and "node_embedding.weight" in last
    state: Any = last if large or not best else best
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{where}: the checkpoint holds no weights (model_state_dict).")
    if not best and not large and version >= 6:
        notices.append("The file has no best epoch yet; the weights of its last epoch are used.")
    training = content.get("train_hypers")
    of_training = training.get("finetune") if isinstance(training, dict) else None
    of_last = last.get("finetune_config") if isinstance(last, dict) else None
    for finetune in (state.get("finetune_config"), of_last, of_training):
        if isinstance(finetune, dict) and finetune:
            return state, finetune
    return state, {}


def _dataset_info(content: Mapping[str, Any], where: str) -> Inert:
    data = content.get("model_data")
    info = data.get("dataset_info") if isinstance(data, dict) else None
    if not isinstance(info, Inert) or not isinstance(info.state, dict):
        raise CheckpointError(f"{where}: the checkpoint lacks its dataset_info (model_data).")
    unit = info.get("length_unit") or "angstrom"
    try:
        in_angstrom = length_to_angstrom(str(unit)) == 1.0
    except UnitError:
        in_angstrom = False
    if not in_angstrom:
        raise CheckpointError(
            f"{where}: this model was trained with lengths in {unit!r}; only models in angstrom "
            "can be read."
        )
    return info


def _species(info: Inert, where: str) -> list[int]:
    types = info.get("_atomic_types", info.get("atomic_types"))
    if not isinstance(types, (list, tuple, set)) or any(type(z) is not int for z in types):
        raise CheckpointError(f"{where}: the list of chemical elements is damaged.")
    return sorted(set(types))


def _targets(info: Inert, where: str) -> dict[str, Inert]:
    targets = info.get("targets")
    if isinstance(targets, Inert):
        targets = targets.state
    if not isinstance(targets, dict) or not all(isinstance(t, Inert) for t in targets.values()):
        raise CheckpointError(f"{where}: the description of the targets is damaged.")
    return {str(name): target for name, target in targets.items()}


def _network(state: Mapping[str, Tensor], targets: set[str], where: str) -> dict[str, Tensor]:
    """The weights of the network, without the heads of targets that are not converted."""
    known = (_BACKEND, *_BESIDE, *_IGNORED)
    unknown = [name for name in state if not name.startswith(known)]
    if unknown:
        raise CheckpointError(
            f"{where}: the checkpoint has parts that no PET known here has: "
            f"{', '.join(unknown[:4])}{'...' if len(unknown) > 4 else ''}."
        )
    network = {
        name.removeprefix(_BACKEND): weight
        for name, weight in state.items()
        if name.startswith((_BACKEND, *_BESIDE))
    }
    heads = tuple(f"{group}." for group in HEAD_GROUPS)
    others = [n for n in network if n.startswith(heads) and n.split(".")[1] not in targets]
    return {name: weight for name, weight in network.items() if name not in others}


def _check_species_table(model: Potential, network: Mapping[str, Tensor], where: str) -> None:
    """The order of elements in the file's tables must be the one the model now assumes."""
    if not torch.equal(network["species_to_species_index"].cpu(), species_table(model.species)):
        raise CheckpointError(f"{where}: the table of chemical elements contradicts their list.")


def _provenance(content: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Provenance in the file, as plain values."""
    result: dict[str, Any] = {"format": "metatrain", "format_version": version}
    for name in ("epoch", "best_epoch", "best_metric"):
        value = content.get(name)
        if type(value) in (int, float):
            result[name] = value
    state = content["metadata"].state if isinstance(content.get("metadata"), Inert) else None
    if isinstance(state, tuple) and state and isinstance(state[0], str):
        try:
            metadata = json.loads(state[0])
        except (ValueError, RecursionError):
            metadata = None
        if isinstance(metadata, dict):
            names = ("name", "description", "authors", "references")
            result["metadata"] = {n: metadata[n] for n in names if metadata.get(n)}
            result.update(_ancestors(metadata.get("extra")))
    return result


def _ancestors(card: Any) -> dict[str, Any]:
    """Provenance of the original model in a file that pet-finetune wrote for metatrain."""
    try:
        provenance = json.loads(card["provenance"])
        parent = {"parent": str(card["source"]), "parent_fingerprint": str(card["fingerprint"])}
    except (LookupError, TypeError, ValueError, RecursionError):
        return {}
    return {**parent, "parent_provenance": provenance} if isinstance(provenance, dict) else {}
