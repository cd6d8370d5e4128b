"""metatrain's PET with random weights, and what metatrain itself predicts with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import metatensor.torch as mts
import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, diamond100, molecule
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import ModelOutput, System
from metatrain.pet import PET
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info, get_generic_target_info
from metatrain.utils.evaluate_model import evaluate_model
from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists
from omegaconf import OmegaConf

SPECIES = (1, 6, 8, 14)
CUTOFF = 3.6

#: Widths of the test models: as small as they can be with two attention heads.
SMALL: dict[str, Any] = {
    "cutoff": CUTOFF,
    "d_pet": 16,
    "d_head": 8,
    "d_node": 16,
    "d_feedforward": 12,
    "num_heads": 2,
}


@dataclass(frozen=True)
class Reference:
    """metatrain's answers for a list of structures, float64 on the CPU, eV and angstrom."""

    energies: np.ndarray
    forces: list[np.ndarray]
    #: Symmetrised; zero where a structure is not periodic in three directions.
    stresses: list[np.ndarray]


def random_model(
    seed: int,
    targets: Sequence[str] = ("energy",),
    unit: str = "eV",
    others: Mapping[str, Mapping[str, Any]] | None = None,
    **hypers: Any,
) -> PET:
    """A float64 model none of whose weights, baselines and scales is a default.

    ``others`` are targets that are no energies, each with the options in which it differs from a
    scalar of structures.
    """
    torch.manual_seed(seed)
    infos = {
        name: get_energy_target_info(
            name,
            {"quantity": "energy", "unit": unit},
            add_position_gradients=True,
            add_strain_gradients=True,
        )
        for name in targets
    }
    usual = {"quantity": "", "unit": "", "sample_kind": "system", "type": "scalar"}
    for name, given in (others or {}).items():
        full = OmegaConf.create({**usual, "num_subtargets": 1, **given})
        infos[name] = get_generic_target_info(name, full)
    info = DatasetInfo(length_unit="Angstrom", atomic_types=list(SPECIES), targets=infos)
    options = copy.deepcopy(get_default_hypers("pet")["model"])
    model = PET({**options, **SMALL, **hypers}, info).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    composition, scaler = model.additive_models[0], model.scaler
    for name in infos:
        if hasattr(composition, f"{name}_composition_buffer"):
            _overwrite(composition, f"{name}_composition_buffer", lambda r: 12.0 * (r - 0.5))
        state = torch.get_rng_state()
        for kind in ("scaler", "per_target_scaler"):
            torch.set_rng_state(state)  # the same numbers for both
            _overwrite(scaler, f"{name}_{kind}_buffer", lambda r: 0.5 + r)
    composition.sync_tensor_maps()
    scaler.sync_tensor_maps()
    return model.eval()


def _overwrite(
    module: torch.nn.Module, buffer: str, drawn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Put random numbers into the one block of a tensor map that a module keeps as bytes."""
    stored = mts.load_buffer(getattr(module, buffer))
    block = stored.block()
    new = TensorBlock(
        drawn(torch.rand(block.values.shape, dtype=torch.float64)),
        block.samples,
        block.components,
        block.properties,
    )
    setattr(module, buffer, mts.save_buffer(TensorMap(stored.keys, [new])))


def save(model: PET, path: Path) -> Path:
    """Write a checkpoint as metatrain's trainer does after an epoch."""
    content = model.get_checkpoint()
    content.update(epoch=1, best_epoch=1, best_metric=0.5)
    content["best_model_state_dict"]["finetune_config"] = model.finetune_config
    torch.save(content, path)
    return path


def _system(atoms: Atoms, model: PET, dtype: torch.dtype) -> System:
    cell = np.where(atoms.pbc[:, None], np.asarray(atoms.cell), 0.0)
    system = System(
        types=torch.tensor(atoms.numbers, dtype=torch.int32),
        positions=torch.tensor(atoms.positions, dtype=dtype),
        cell=torch.tensor(cell, dtype=dtype),
        pbc=torch.tensor(atoms.pbc),
    )
    options = list(model.requested_neighbor_lists())
    if len(model.additive_models) > 1:
        options += model.additive_models[1].requested_neighbor_lists()
    system = get_system_with_neighbor_lists(system, options)
    for name, key in (("charge", "charge"), ("spin_multiplicity", "spin")):
        if key in atoms.info:
            block = TensorBlock(
                torch.tensor([[float(atoms.info[key])]], dtype=dtype),
                Labels("system", torch.tensor([[0]])),
                [],
                Labels(name, torch.tensor([[0]])),
            )
            system.add_data(name, TensorMap(Labels.single(), [block]))
    return system


def reference(
    model: PET, frames: Sequence[Atoms], dtype: torch.dtype, target: str = "energy"
) -> Reference:
    """Evaluate metatrain's model on all frames in one batch."""
    systems = [_system(atoms, model, dtype) for atoms in frames]
    infos = {target: model.dataset_info.targets[target]}
    block = evaluate_model(model, systems, infos, is_training=False)[target].block()
    positions = block.gradient("positions").values.detach().double().squeeze(-1).numpy()
    strain = block.gradient("strain").values.detach().double().squeeze(-1).numpy()
    stresses = []
    for atoms, virial in zip(frames, strain, strict=True):
        periodic = bool(atoms.pbc.all())
        stresses.append((virial + virial.T) / (2 * atoms.get_volume()) if periodic else 0 * virial)
    return Reference(
        energies=block.values.detach().double().squeeze(-1).numpy(),
        forces=np.split(-positions, np.cumsum([len(atoms) for atoms in frames])[:-1]),
        stresses=stresses,
    )


def reference_properties(
    model: PET, frames: Sequence[Atoms], dtype: torch.dtype, targets: Sequence[str]
) -> dict[str, np.ndarray]:
    """What metatrain's model says of targets that are no energies, ``[rows, ..., subtargets]``."""
    systems = [_system(atoms, model, dtype) for atoms in frames]
    infos = model.dataset_info.targets
    outputs = {name: ModelOutput(sample_kind=infos[name].sample_kind) for name in targets}
    with torch.no_grad():
        found = model(systems, outputs)
    return {name: found[name].block().values.double().numpy() for name in targets}


def structures(charged: bool = False) -> dict[str, Atoms]:
    """What the models are compared on; ``charged`` gives each another charge and spin."""
    rng = np.random.default_rng(7)
    silicon_carbide = bulk("SiC", "zincblende", a=4.36)
    strained = bulk("C", "diamond", a=3.57)
    strained.set_cell(strained.cell.array @ (np.eye(3) + 0.04 * rng.normal(size=(3, 3))), True)
    slab = diamond100("C", size=(1, 1, 5), vacuum=6.0)
    add_adsorbate(slab, "H", 1.1, "ontop")
    slab.pbc = (True, True, False)
    chain = Atoms("SiOSiO", [[0, 0, 0], [1.6, 0.3, 0], [3.1, 0, 0.2], [4.7, 0, 0]], pbc=(1, 0, 0))
    chain.cell = [6.3, 0, 0]
    apart = slab + Atoms("O", positions=[slab.positions.mean(0) + [0, 0, 20.0]])
    named = {
        "ethanol": molecule("CH3CH2OH"),
        "water": molecule("H2O"),
        "crystal of 2 atoms": silicon_carbide,
        "strained crystal": strained * (2, 1, 1),
        "surface": slab,
        "surface and lone atom": apart,
        "chain": chain,
        "isolated atom": Atoms("O"),
        "dimer inside the cutoff": Atoms("CO", [[0, 0, 0], [0, 0, CUTOFF - 0.01]]),
        "dimer in the taper": Atoms("CO", [[0, 0, 0], [0, 0, CUTOFF - 0.2]]),
        "dimer outside the cutoff": Atoms("CO", [[0, 0, 0], [0, 0, CUTOFF + 0.01]]),
    }
    for index, (name, atoms) in enumerate(named.items()):
        if "dimer" not in name:
            atoms.positions += 0.08 * rng.normal(size=atoms.positions.shape)
        if charged:
            atoms.info.update(charge=index % 4 - 1, spin=1 + index % 3)
    return named
