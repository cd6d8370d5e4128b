"""Small models, and files as metatrain writes them, made without metatrain."""

from __future__ import annotations

import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import metatensor.torch as mts
import torch
from metatensor.torch import Labels, TensorBlock, TensorMap

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

SMALL: dict[str, Any] = {
    "cutoff": 3.0,
    "d_pet": 8,
    "d_head": 6,
    "d_node": 12,
    "d_feedforward": 10,
    "num_heads": 2,
    "num_attention_layers": 2,
    "num_gnn_layers": 2,
}


def small_model(species=(1, 6, 8), targets=("energy",), seed=0, **hypers) -> Potential:
    """A random model with a baseline and a scale that are not trivial."""
    torch.manual_seed(seed)
    options = ModelOptions(**{**SMALL, **hypers})
    model = Potential(options, species, [TargetSpec(name=name) for name in targets])
    for index, name in enumerate(targets):
        model.composition.set(name, -13.0 * torch.arange(1, len(species) + 1) - index)
        model.scale.set(name, 0.25 + index)
    return model.eval()


def rewrite(source: Path, destination: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy a zip entry by entry through ``change(name, data)``; None leaves the entry out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(destination, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return destination


class _Script:
    """Pickles as a ``torch.ScriptObject`` holding some metatensor or metatomic object."""

    def __init__(self, buffer: Any, name: str) -> None:
        self.state = (buffer, f"__torch__.torch.classes.{name}")

    def __reduce__(self) -> Any:
        return torch.ScriptObject, (), self.state


class TargetInfo:
    pass


class DatasetInfo:
    pass


def _tensor_map(values: torch.Tensor, samples: Labels, components: list[Labels]) -> TensorMap:
    block = TensorBlock(
        values=values.to(torch.float64),
        samples=samples,
        components=components,
        properties=Labels.range("energy", values.shape[-1]),
    )
    return TensorMap(Labels.single(), [block])


def target_info(
    quantity="energy", unit="eV", components=(), properties=1, per_atom=False
) -> TargetInfo:
    names = ["system", "atom"] if per_atom else ["system"]
    labels = [Labels([name], torch.arange(3).reshape(-1, 1)) for name in components]
    layout = _tensor_map(
        torch.empty(0, *[3] * len(components), properties),
        Labels(names, torch.empty((0, len(names)), dtype=torch.int32)),
        labels,
    )
    info = TargetInfo()
    info.quantity, info.unit, info.description = quantity, unit, "made up"
    info.layout = _Script(mts.save_buffer(layout), "metatensor.TensorMap")
    return info


def scale_buffer(values: list[float]) -> torch.Tensor:
    table = torch.tensor(values).reshape(-1, 1)
    samples = Labels(["atomic_type"], torch.arange(len(values)).reshape(-1, 1))
    return mts.save_buffer(_tensor_map(table, samples, []))


def composition_buffer(species: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    samples = Labels(["center_type"], torch.tensor(species).reshape(-1, 1))
    return mts.save_buffer(_tensor_map(values.reshape(-1, 1), samples, []))


def metatrain_state(model: Potential) -> dict[str, torch.Tensor]:
    """The state dict metatrain would have for ``model``, format 16."""
    state = {f"backend.{name}": value for name, value in model.network.state_dict().items()}
    for name in model.targets:
        state[f"additive_models.0.{name}_composition_buffer"] = composition_buffer(
            model.species, model.composition.get(name)
        )
        state[f"scaler.{name}_scaler_buffer"] = scale_buffer([float(model.scale.get(name))])
    state["scaler.dummy_buffer"] = torch.zeros(1)
    return state


def metatrain_content(model: Potential, **changes: Any) -> dict[str, Any]:
    """What a format 16 file of metatrain holds."""
    info = DatasetInfo()
    info.length_unit, info._atomic_types = "angstrom", list(model.species)
    info.targets = {name: target_info() for name in model.targets}
    state = metatrain_state(model)
    content = {
        "architecture_name": "pet",
        "model_ckpt_version": 16,
        "metadata": _Script('{"name": "tiny", "extra": {}}', "metatomic.ModelMetadata"),
        "model_data": {"model_hypers": model.hypers.model_dump(), "dataset_info": info},
        "epoch": 3,
        "best_epoch": 2,
        "best_metric": 0.5,
        "model_state_dict": {**state, "finetune_config": {}},
        "best_model_state_dict": {**state, "finetune_config": {}},
        "train_hypers": {"learning_rate": 1e-4},
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
    }
    return {**content, **changes}


def write_metatrain(path: Path, content: Mapping[str, Any]) -> Path:
    """Save as if the classes were metatrain's; the fake modules are gone again afterwards."""
    homes = {
        TargetInfo: "metatrain.utils.data.target_info",
        DatasetInfo: "metatrain.utils.data.dataset",
    }
    before = {name: sys.modules.get(name) for name in homes.values()}
    for kind, module in homes.items():
        kind.__module__ = module
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], kind.__name__, kind)
    try:
        torch.save(dict(content), path)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return path
