"""Writing a Potential as a checkpoint of metatrain's PET, of the model format 16.

metatrain's checkpoints are pickles of its own classes. metatrain is not needed to write one: the
names of its two classes are written with the values that their instances have, and the tensor maps
inside are metatensor's. Facts from metatrain 2026.4.1 (BSD-3-Clause), which the parity tests hold
against what it reads.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pet_finetune.committee.llpr import fresh
from pet_finetune.data.convert_sets import tensor_block
from pet_finetune.errors import CheckpointError
from pet_finetune.keys import TargetSpec, base_name, direct_quantity, output_name
from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential

from .metatrain_formats import NEWEST_VERSION, wrapped_content
from .native import save_content, stored_tensor

#: The format of the trainer's part, which a restart reads.
_TRAINER_VERSION = 15
_PAPER = "https://arxiv.org/abs/2305.19302v3"
#: Options of the network that metatrain has not.
_OURS = {"num_prompts"}


@dataclass(frozen=True)
class MetatrainFile:
    """A checkpoint of metatrain that was written.

    Attributes:
        path: the file.
        targets: metatrain's name of each target, and ours.
        notices: what the user should know about the conversion, one line each.
    """

    path: Path
    targets: dict[str, str]
    notices: tuple[str, ...] = ()


def save_metatrain(
    path: str | os.PathLike[str],
    model: Potential,
    *,
    name: str = "",
    authors: Sequence[str] = (),
    card: Mapping[str, str] | None = None,
    check: Callable[[Path, Mapping[str, str]], None] | None = None,
) -> MetatrainFile:
    """Write a model for metatrain in one step: the whole new file is there, or the old one.

    Args:
        path: the file; its folder is made when missing.
        model: without adapters; it is not changed.
        name: of the model, for the metadata.
        authors: of the model.
        card: what else the metadata say.
        check: is shown the new file and its targets before it takes its place; raises if wrong.

    Raises:
        CheckpointError: metatrain's PET has no place for a part, or the file cannot be written.
    """
    from metatomic.torch import ModelMetadata

    path = Path(path)
    notices: list[str] = []
    targets = _targets(model, str(path), notices)
    described = {new: _described(model.target(old), notices) for new, old in targets.items()}
    metadata = ModelMetadata(
        name=name,
        authors=list(authors),
        references={"architecture": [_PAPER]},
        extra=dict(card or {}),
    )
    state = _state(model, targets, described)
    hypers = {key: value for key, value in model.hypers.model_dump().items() if key not in _OURS}
    content = {
        "architecture_name": "pet",
        "model_ckpt_version": NEWEST_VERSION,
        "metadata": metadata,
        "model_data": {
            "model_hypers": hypers,
            "dataset_info": _instance(
                _DatasetInfo,
                length_unit="angstrom",
                _atomic_types=list(model.species),
                targets={new: info for new, (info, _) in described.items()},
                extra_data={},
            ),
        },
        "epoch": None,
        "best_epoch": None,
        "model_state_dict": {**state, "finetune_config": {}},
        "best_model_state_dict": {**state, "finetune_config": {}},
        # A restart begins the training anew, with these weights.
        "trainer_ckpt_version": _TRAINER_VERSION,
        "train_hypers": {},
        "optimizer_state_dict": None,
        "scheduler_state_dict": None,
        "best_metric": None,
        "best_optimizer_state_dict": None,
    }
    layers = fresh(model)
    if layers:
        content = wrapped_content(content, layers, targets, model.dtype)
        notices.append("The uncertainty goes with it: the file is a checkpoint of 'llpr'.")
    checked = None if check is None else lambda written: check(written, targets)
    save_content(path, content, pickle_module=_PICKLE, check=checked)
    return MetatrainFile(path, targets, tuple(notices))


def _targets(model: Potential, where: str, notices: list[str]) -> dict[str, str]:
    """Metatrain's name of each target, and ours."""
    if model.hypers.num_prompts:
        raise CheckpointError(
            f"{where}: the model has {model.hypers.num_prompts} prompt tokens in each layer, which "
            "metatrain's PET has not. Export it as a metatomic file (.pt), or fine-tune with "
            "another method (lora, full, heads) for metatrain."
        )
    targets: dict[str, str] = {}
    for name, spec in model.targets.items():
        known = direct_quantity(name) == "force" and spec.shape == (3,) and spec.per_atom
        new = name if known else output_name(spec)
        problem = _problem(model, new, spec)
        if new in targets:
            problem = f"would be called '{new}' in metatrain, as '{targets[new]}' is"
        if problem is not None:
            raise CheckpointError(
                f"{where}: target '{name}' {problem}. Write the other targets (--target NAME takes "
                "one of them), or export the model as a metatomic file (.pt)."
            )
        if new != name:
            notices.append(f"Target '{name}' is called '{new}' there: metatrain wants the prefix.")
        targets[new] = name
    return targets


def _problem(model: Potential, name: str, spec: TargetSpec) -> str | None:
    """Why metatrain's PET cannot predict a target as this model does."""
    if spec.per_volume != (name == "non_conservative_stress"):
        return (
            f"is {'' if spec.per_volume else 'not '}divided by the volume, which metatrain does "
            "for the target called 'non_conservative_stress', and for that one alone"
        )
    if spec.rank and bool(model.composition.get(spec.name).any()):
        return "has baselines, which metatrain's PET has for scalars only"
    relative = model.scale.relative(spec.name)
    if relative is not None and not spec.per_atom and bool((relative != relative[0]).any()):
        return "has a scale for each element, which metatrain has for targets of atoms only"
    return None


def _described(spec: TargetSpec, notices: list[str]) -> tuple[Any, Any]:
    """Description and layout of a target for metatrain; metatomic must know the unit."""
    from metatomic.torch import ModelOutput

    unit = spec.unit
    try:
        ModelOutput(unit=unit)
    except (RuntimeError, ValueError):
        notices.append(
            f"Target '{spec.name}' is in '{unit}', a unit that metatrain does not know: none is "
            "written, and the numbers stay in it."
        )
        unit = ""
    layout = _layout(spec)
    shape = [3] * spec.rank + [spec.num_subtargets]
    info = _instance(
        _TargetInfo,
        layout=layout,
        is_scalar=spec.rank == 0,
        is_cartesian=spec.rank > 0,
        is_spherical=False,
        is_atomic_basis=False,
        quantity=spec.quantity,
        unit=unit,
        description=spec.description,
        blocks_shape={f"{spec.quantity}___0": shape},
    )
    return info, layout


def _layout(spec: TargetSpec) -> Any:
    """An empty tensor map with the axes of a target, and of the derivatives of an energy."""
    from metatensor.torch import Labels, TensorMap

    plain = "energy" if spec.is_energy else base_name(spec.name).replace("mtt::", "")

    def block(names: list[str], rank: int) -> Any:
        # float64 or metatensor cannot write it.
        values = torch.empty([0, *[3] * rank, spec.num_subtargets]).double()
        return tensor_block(values, names, torch.empty(0, len(names)), plain)

    values = block(["system", "atom"] if spec.per_atom else ["system"], spec.rank)
    if spec.is_energy:
        values.add_gradient("positions", block(["sample", "atom"], 1))
        values.add_gradient("strain", block(["sample"], 2))
    return TensorMap(Labels.single(), [values])


def _state(
    model: Potential, targets: Mapping[str, str], described: Mapping[str, tuple[Any, Any]]
) -> dict[str, Tensor]:
    """The state dict of metatrain's PET, with its names and in its order."""
    network = model.network.state_dict()
    # metatrain reads the floating type off the second entry.
    names = ["species_to_species_index", *(n for n in network if n != "species_to_species_index")]
    state: dict[str, Tensor] = {}
    for name in names:
        beside = name.startswith("long_range_featurizer.")
        new = name if beside else f"backend.{_parameter(name, model, targets)}"
        state[new] = stored_tensor(network[name])
        if name.startswith("system_conditioning."):  # there under two names
            state[name] = state[new]
    if (
        model.network.long_range_featurizer is not None
    ):  # its constants, which are in no file of ours
        for name, value in model.network.long_range_featurizer.named_buffers(
            "long_range_featurizer", remove_duplicate=False
        ):
            state[name] = stored_tensor(value)
    species = torch.tensor(model.species)
    index = torch.zeros(int(species.max()) + 1, dtype=torch.long)
    index[species] = torch.arange(len(species))
    state["additive_models.0.dummy_buffer"] = torch.zeros(1, dtype=torch.float64)
    state["additive_models.0.model.type_to_index"] = index
    if model.zbl is not None:
        known = torch.full((len(index),), -1, dtype=torch.int32)
        known[species] = torch.arange(len(species), dtype=torch.int32)
        state["additive_models.1.species_to_index"] = known
        state["additive_models.1.covalent_radii"] = stored_tensor(model.zbl.covalent_radii.double())
    state["scaler.dummy_buffer"] = torch.zeros(1)
    state["scaler.model.type_to_index"] = index.clone()
    for new, old in targets.items():
        state.update(_baselines_and_scales(model, model.target(old), new, described[new][1]))
    return state


def _parameter(name: str, model: Potential, targets: Mapping[str, str]) -> str:
    """Metatrain's name of a weight, below ``backend.``."""
    group, *rest = name.split(".")
    if group in HEAD_GROUPS:
        for new, old in targets.items():
            if rest[0] == old:
                blocks = {model.target(old).block_key: f"{new}___0"}
                return ".".join([group, new, *(blocks.get(part, part) for part in rest[1:])])
    return name


def _baselines_and_scales(
    model: Potential, spec: TargetSpec, name: str, layout: Any
) -> dict[str, Tensor]:
    """The buffers of a target: tensor maps as bytes."""
    from metatensor.torch import Labels, TensorBlock, TensorMap, save_buffer

    properties = layout.block().properties

    def buffer(values: Tensor, axis: str, samples: Tensor) -> Tensor:
        labels = Labels([axis], samples.to(torch.int32).view(-1, 1))
        block = TensorBlock(values.contiguous(), labels, [], properties)
        return save_buffer(TensorMap(Labels.single(), [block]))

    count = len(model.species)
    state: dict[str, Tensor] = {}
    if spec.rank == 0:
        baselines = model.composition.get(spec.name).cpu().view(count, -1)
        state[f"additive_models.0.{name}_composition_buffer"] = buffer(
            baselines.expand(count, spec.num_subtargets), "center_type", torch.tensor(model.species)
        )
    rows = torch.arange(count) if spec.per_atom else torch.tensor([-1])
    whole = model.scale.get(spec.name).cpu().expand(len(rows), spec.num_subtargets)
    relative = model.scale.relative(spec.name)
    factors = torch.ones_like(whole) if relative is None else relative.cpu()[: len(rows)]
    # metatrain has factors within a target only where it has several numbers.
    parts = (whole, factors) if spec.num_subtargets > 1 else (whole * factors, whole / whole)
    for kind, values in zip(
        ("scaler", "per_target_scaler", "per_property_scaler"),
        (whole * factors, *parts),
        strict=True,
    ):
        state[f"scaler.{name}_{kind}_buffer"] = buffer(values, "atomic_type", rows)
    return state


class _DatasetInfo:
    """Stands for metatrain's class of the same name."""


class _TargetInfo:
    """Stands for metatrain's class of the same name."""


_NAMES = {
    _DatasetInfo: b"metatrain.utils.data.dataset\nDatasetInfo\n",
    _TargetInfo: b"metatrain.utils.data.target_info\nTargetInfo\n",
}


def _instance(kind: type, **state: Any) -> Any:
    made = kind()
    made.__dict__.update(state)
    return made


# The one written in Python, whose parts can be replaced; types know it not.
_PurePickler: Any = pickle._Pickler


class _Pickler(_PurePickler):
    """Writes the names of metatrain's classes in the place of those that stand for them."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj in _NAMES:
            self.write(pickle.GLOBAL + _NAMES[obj])
            self.memoize(obj)
        else:
            super().save_global(obj, name)


#: What ``torch.save`` looks for in the module that it pickles with.
_PICKLE = SimpleNamespace(__name__="pet_finetune", Pickler=_Pickler)
