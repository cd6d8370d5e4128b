"""The legacy start: a bare state dict with two numpy files.

``MODEL_TO_START_WITH`` is a state dict under metatrain's parameter names (of any era, with or
without the prefixes ``backend.``, ``model.`` or ``module.``), ``ALL_SPECIES_PATH`` the atomic
numbers it knows and ``SELF_CONTRIBUTIONS_PATH`` an energy for each of them. Sizes are read off
the weights; what leaves no trace there (cutoff, number of heads...) comes from the options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.errors import CheckpointError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

from .archive import TorchArchive, build_potential
from .metatrain_formats import NETWORK_PARTS, merge_lora_layers, rename_before_8
from .safe_pickle import StoredTensor

_PREFIXES = ("backend.", "model.", "module.", "network.", "pet_model.")
#: Where else a file may keep the state dict, when it is not the file's whole content.
_WRAPPERS = ("state_dict", "model_state_dict")
#: Parts of metatrain's state dicts that are not the network.
_BESIDE_NETWORK = ("additive_models.", "scaler.", "species_to_species_index")
#: Parameters that only the original ``pet`` package has.
_ORIGINAL_PET = ("heads.", "bond_heads.", "central_tokens_predictors.", "messages_predictors.")


def load_oldest_start(
    model_path: str | os.PathLike[str],
    all_species_path: str | os.PathLike[str],
    self_contributions_path: str | os.PathLike[str],
    hypers: ModelOptions | None = None,
) -> Potential:
    """Build a potential from a state dict and the two numpy files that belong to it.

    Args:
        model_path: the state dict, written by ``torch.save``.
        all_species_path: ``.npy``, ``[n_species]`` atomic numbers, ascending.
        self_contributions_path: ``.npy``, ``[n_species]`` energies in eV.
        hypers: the options' ``architecture.model``; sizes given there must be the weights'.

    Returns:
        the potential, with scale 1 and the self-contributions as its baseline.

    Raises:
        CheckpointError: with one line saying which of the three is wrong, and how.
    """
    species = _species(Path(all_species_path))
    baseline = _contributions(Path(self_contributions_path), len(species), Path(all_species_path))
    where = str(model_path)
    network = _network(_state(Path(model_path)), where)
    rows = network["edge_embedder.weight"].shape[0]
    if rows != len(species):
        raise CheckpointError(
            f"{where}: the weights know {rows} elements, and {all_species_path} lists "
            f"{len(species)}. The files do not belong together."
        )
    table = torch.full((max(species) + 1,), -1)
    table[list(species)] = torch.arange(len(species))
    network["species_to_species_index"] = table
    targets = _targets(network, where)
    options = _options(network, hypers or ModelOptions(), where)
    return build_potential(
        options,
        species,
        targets,
        network,
        composition={target.name: baseline for target in targets},
        scale={},
        radii=None,
        where=where,
    )


def infer_hypers(network: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the hyperparameters off a network's state dict that its shapes determine.

    Args:
        network: names as in :class:`~pet_finetune.model.pet.PET`.

    Raises:
        KeyError: if a part that every PET has is missing.
    """
    block = "gnn_layers.0.trans.layers.0."
    w_in, w_out = network[f"{block}mlp.w_in.weight"], network[f"{block}mlp.w_out.weight"]
    head = next(w for n, w in network.items() if re.match(r"node_heads\..+\.0\.0\.weight$", n))
    conditioned = "system_conditioning.charge_embedding.weight" in network
    found: dict[str, Any] = {
        "d_pet": network["edge_embedder.weight"].shape[1],
        "d_node": network["node_embedders.0.weight"].shape[1],
        "d_head": head.shape[0],
        "d_feedforward": w_out.shape[1],
        "activation": "SwiGLU" if w_in.shape[0] == 2 * w_out.shape[1] else "SiLU",
        "normalization": ("LayerNorm" if f"{block}norm_attention.bias" in network else "RMSNorm"),
        "num_gnn_layers": _count(network, r"gnn_layers\.(\d+)\."),
        "num_attention_layers": _count(network, r"gnn_layers\.0\.trans\.layers\.(\d+)\."),
        "featurizer_type": (
            "feedforward" if "combination_norms.0.weight" in network else "residual"
        ),
        "system_conditioning": conditioned,
    }
    if conditioned:
        charges = network["system_conditioning.charge_embedding.weight"]
        spins = network["system_conditioning.spin_multiplicity_embedding.weight"]
        found["max_charge"] = (charges.shape[0] - 1) // 2
        found["max_spin_multiplicity"] = spins.shape[0]
    return found


def _count(network: Mapping[str, Tensor], pattern: str) -> int:
    matches = (re.match(pattern, name) for name in network)
    return 1 + max(int(match[1]) for match in matches if match)


def _options(network: Mapping[str, Tensor], given: ModelOptions, where: str) -> ModelOptions:
    """Complete the hyperparameters of the weights with the options, which must not contradict."""
    try:
        found = infer_hypers(network)
    except (KeyError, StopIteration, ValueError) as error:
        raise CheckpointError(
            f"{where}: these weights are not those of a whole PET ({error} is missing)."
        ) from error
    clashes = [
        f"{name} is {getattr(given, name)} in the options and {value} in the weights"
        for name, value in found.items()
        if name in given.model_fields_set and getattr(given, name) != value
    ]
    if clashes:
        raise CheckpointError(
            f"{where}: the weights and architecture.model contradict each other: "
            f"{'; '.join(clashes)}. Leave these options out to use the weights' values."
        )
    return given.model_copy(update=found)


def _targets(network: Mapping[str, Tensor], where: str) -> list[TargetSpec]:
    targets = []
    for name, weight in network.items():
        match = re.match(r"node_last_layers\.(.+)\.0\.([^.]+)\.weight$", name)
        if match and weight.shape[0] == 1:
            targets.append(TargetSpec(name=match[1], block=match[2]))
    if not targets:
        raise CheckpointError(f"{where}: the weights have no head that predicts an energy.")
    return targets


def _state(path: Path) -> dict[str, Tensor]:
    with TorchArchive(path) as archive:
        content = archive.content()
        for name in _WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(name), dict):
                content = content[name]
        if not isinstance(content, dict) or not any(
            isinstance(value, StoredTensor) for value in content.values()
        ):
            raise CheckpointError(
                f"{path}: MODEL_TO_START_WITH must be a state dict, i.e. what "
                "torch.save(model.state_dict(), path) writes."
            )
        return archive.tensors(content)


def _network(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The network's part of a state dict of any era, under today's names."""
    bare: dict[str, Tensor] = {}
    for name, weight in state.items():
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        bare[name] = weight
    if any(name.startswith(_ORIGINAL_PET) for name in bare):
        raise CheckpointError(
            f"{where}: these are weights of the original 'pet' package (spozdn/pet). Its network "
            "weighs neighbours differently from metatrain's PET, so they cannot be converted "
            "without changing what they predict. Start from a checkpoint written by metatrain."
        )
    if "embedding.weight" in bare:
        bare = rename_before_8(bare)
    bare = merge_lora_layers(bare, {}, where, [])
    network = {n: w for n, w in bare.items() if n.startswith(NETWORK_PARTS)}
    unknown = [n for n in bare if not n.startswith(NETWORK_PARTS + _BESIDE_NETWORK)]
    if unknown or "edge_embedder.weight" not in network:
        listed = ", ".join(unknown[:5]) or "no edge_embedder.weight"
        raise CheckpointError(
            f"{where}: the parameter names are not those of metatrain's PET, which is the only "
            f"model that can be read; it has: {listed}{'...' if len(unknown) > 5 else ''}."
        )
    return network


def _load_array(path: Path, option: str) -> np.ndarray[Any, Any]:
    try:
        # Without pickles, a .npy file is numbers and nothing else.
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file ({option}).") from error
    except Exception as error:  # NumPy's reader raises whatever a damaged header leads to
        raise CheckpointError(
            f"{path}: {option} must be a .npy file of numbers, and this is none ({error})."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise CheckpointError(f"{path}: {option} must be a .npy file of numbers.")
    return array.reshape(-1)


def _species(path: Path) -> tuple[int, ...]:
    numbers = _load_array(path, "ALL_SPECIES_PATH")
    species = tuple(int(z) for z in numbers)
    if (
        not species
        or any(z != n for z, n in zip(species, numbers.tolist(), strict=True))
        or any(not 1 <= z <= 118 for z in species)
        or list(species) != sorted(set(species))
    ):
        raise CheckpointError(
            f"{path}: ALL_SPECIES_PATH must list atomic numbers, each once and ascending; it has "
            f"{list(numbers[:10])}."
        )
    return species


def _contributions(path: Path, count: int, species_path: Path) -> Tensor:
    energies = _load_array(path, "SELF_CONTRIBUTIONS_PATH")
    if len(energies) != count:
        raise CheckpointError(
            f"{path}: SELF_CONTRIBUTIONS_PATH has {len(energies)} energies, and {species_path} "
            f"has {count} elements. One energy for each element is needed."
        )
    if not np.isfinite(energies).all():
        raise CheckpointError(f"{path}: SELF_CONTRIBUTIONS_PATH holds NaN or inf.")
    return torch.tensor(energies, dtype=torch.float64)
