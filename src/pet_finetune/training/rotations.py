"""How far a model's predictions of one structure in several orientations lie apart.

PET learns rotations from data instead of being built to obey them, so this is an error of its own:
see Langer, Pozdnyakov and Ceriotti, arXiv:2406.17747.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pet_finetune.data.augment import random_rotations
from pet_finetune.data.batch import LabelledBatch
from pet_finetune.data.prefetch import on_device
from pet_finetune.graph import Batch, rotate_graphs
from pet_finetune.model import Potential


@dataclass(frozen=True)
class Spread:
    """Mean absolute deviation from the mean over the orientations.

    Attributes:
        energy: eV/atom.
        forces: of components in the structure's own frame, eV/Angstrom.
    """

    energy: float
    forces: float


def rotational_spread(
    model: Potential, batches: Iterable[LabelledBatch], target: str, count: int, seed: int = 0
) -> Spread:
    """Turn (and maybe mirror) each structure at random, and compare what is predicted.

    Args:
        model: is put into evaluation mode, and back.
        batches: any device and dtype; moved to the model's.
        target: which energy.
        count: orientations of each structure, at least two.
        seed: of the orientations.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    sums, structures, components = [0.0, 0.0], 0, 0
    try:
        for batch in on_device(batches, model.device, model.dtype):
            energies, forces = _in_orientations(model, batch.graph, target, count, generator)
            sums[0] += _deviation(energies / batch.graph.atoms_per_structure)
            sums[1] += _deviation(forces)
            structures, components = (
                structures + batch.graph.num_structures,
                components + forces[0].numel(),
            )
    finally:
        model.train(training)
    return Spread(sums[0] / structures, sums[1] / components)


def _in_orientations(
    model: Potential, batch: Batch, target: str, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Energies [count, structures] and forces turned back [count, atoms, 3]."""
    energies, forces = [], []
    for _ in range(count):
        rotations = random_rotations(batch.num_structures, generator).to(batch.cells)
        said = model.predict(rotate_graphs(batch, rotations), target)
        assert said.forces is not None
        energies.append(said.energy)
        back = rotations.transpose(1, 2)[batch.structure_index]
        forces.append((back @ said.forces.unsqueeze(-1)).squeeze(-1))
    return torch.stack(energies), torch.stack(forces)


def _deviation(values: Tensor) -> float:
    """Sum over all but the first axis of the mean absolute deviation along the first."""
    return float((values - values.mean(0)).abs().mean(0).sum())
