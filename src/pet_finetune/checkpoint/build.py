"""An opened checkpoint, and the :class:`Potential` made of what all kinds of files come down to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.errors import CheckpointError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, opened."""

    #: The potential, in eV and angstrom, on the CPU, in evaluation mode.
    model: Potential
    #: Who wrote the file.
    kind: Literal["pet-finetune", "metatrain"]
    #: Where the weights come from, as far as the file says.
    provenance: dict[str, Any]
    #: What is needed to resume the run that wrote the file; None where it cannot be resumed.
    training: dict[str, Any] | None
    path: Path
    #: What the user should know about the conversion, one line each; logged as well.
    notices: tuple[str, ...] = ()


def model_options(values: Mapping[str, Any], where: str) -> ModelOptions:
    """Check the hyperparameters found in a file."""
    try:
        return ModelOptions.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise CheckpointError(
            f"{where}: the hyperparameters in this file are not those of a PET this version "
            f"knows ({problems}). Update pet-finetune if the file is newer."
        ) from error


def build_potential(
    hypers: ModelOptions,
    species: Sequence[int],
    targets: Iterable[TargetSpec],
    network: Mapping[str, Tensor],
    *,
    composition: Mapping[str, Tensor],
    scale: Mapping[str, float | Tensor],
    relative: Mapping[str, Tensor] | None = None,
    radii: Tensor | None,
    where: str,
) -> Potential:
    """Build a potential and fill it; the global random state is left as it was.

    Args:
        hypers: sizes and kinds of the network's parts.
        species: atomic numbers, ascending.
        targets: what it predicts.
        network: the state dict of the network, names without prefix.
        composition: eV, ``[n_species]``, for each target that has a baseline.
        scale: factor for each target.
        relative: factors beside it for each element and value, of the targets that have some.
        radii: ZBL's covalent radii, ``[n_species]`` Å; None for ASE's table.
        where: what to call the file in messages.

    Raises:
        CheckpointError: if weights are missing, too many, or of another shape.
    """
    if any(not 1 <= z <= 150 for z in species) or len(set(species)) != len(species) or not species:
        raise CheckpointError(f"{where}: the list of chemical elements is damaged: {species}.")
    _check_sizes(hypers, network, where)
    with torch.random.fork_rng(devices=[]):
        try:
            model = Potential(hypers, species, targets)
        except (ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: no PET can be built from it ({error}).") from error
    floating = [weight.dtype for weight in network.values() if weight.is_floating_point()]
    if len(set(floating)) != 1:
        raise CheckpointError(
            f"{where}: the weights have {len(set(floating))} floating types "
            f"({', '.join(sorted(map(str, set(floating))))}), and one is needed."
        )
    model.to(floating[0])
    _check_names(model, network, where)
    try:
        model.network.load_state_dict(dict(network))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise CheckpointError(
            f"{where}: weights do not fit the hyperparameters in the file ({reason})."
        ) from error
    for name in model.targets:
        if name in composition:
            model.composition.set(name, composition[name])
        model.scale.set(name, scale.get(name, 1.0))
        model.scale.set_relative(name, (relative or {}).get(name))
    if model.zbl is not None and radii is not None:
        model.zbl.covalent_radii = radii.to(model.zbl.covalent_radii)
    return model.eval()


def _check_sizes(hypers: ModelOptions, network: Mapping[str, Tensor], where: str) -> None:
    """Refuse hyperparameters far beyond the weights before memory is taken for them."""
    widest = max((n for weight in network.values() for n in weight.shape), default=0)
    widths = (hypers.d_pet, hypers.d_node, hypers.d_head, hypers.d_feedforward)
    blocks = hypers.num_gnn_layers * hypers.num_attention_layers
    conditioning = max(hypers.max_charge, hypers.max_spin_multiplicity)
    if (
        max(widths) > widest
        or blocks > len(network)
        or (hypers.system_conditioning and conditioning > widest)
    ):
        raise CheckpointError(
            f"{where}: the weights in the file are fewer than its hyperparameters need."
        )


def _check_names(model: Potential, network: Mapping[str, Tensor], where: str) -> None:
    expected = model.network.state_dict().keys()
    for problem, names in (
        ("lacks weights", sorted(expected - network.keys())),
        ("has weights that no PET of its hyperparameters has", sorted(network.keys() - expected)),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(f"{where}: the file {problem}: {', '.join(names[:4])}{more}.")
