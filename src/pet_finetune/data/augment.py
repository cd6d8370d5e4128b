"""Random rotations and inversions, with which PET learns symmetry; distorted structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pet_finetune.graph import rotate_graphs, rotate_rows
from pet_finetune.keys import LabelKind, label_kind
from pet_finetune.rng import Stream

from .batch import LabelledBatch
from .structure import Structure

__all__ = ["distorted", "random_rotations", "rotate_batch"]


def random_rotations(
    count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw orthogonal matrices uniformly from O(3).

    A unit quaternion uniform on the 3-sphere gives a uniform rotation (K. Shoemake, Graphics
    Gems III, 1992); half of the matrices are multiplied by -1. Drawn in float64, so that the same
    generator gives the same rotations in every dtype.

    Args:
        count: number of matrices ``b``.
        generator: source of randomness, on the CPU.
        dtype: dtype of the result.

    Returns:
        ``[b, 3, 3]``; ``v' = R v``, determinant +1 or -1.
    """
    quaternions = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rotations = torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        dim=1,
    ).reshape(count, 3, 3)  # fmt: skip
    signs = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2 - 1
    return (rotations * signs).to(dtype)


def rotate_batch(batch: LabelledBatch, rotations: Tensor) -> LabelledBatch:
    """Turn each structure of a batch with its labels.

    Vectors become ``R v``, tensors ``R s R^T``; scalars stay. Missing labels (NaN) stay NaN; one
    NaN component makes all three of a vector, or all nine of a tensor, NaN.

    Args:
        batch: the batch.
        rotations: ``[b, 3, 3]``, on the device of the batch.
    """
    graph, labels = batch.graph, dict(batch.labels)
    if not graph.num_structures:
        return batch
    for name, value in batch.labels.items():
        kind = label_kind(name, batch.kinds)
        if kind == LabelKind(per_atom=True, rank=1) and value.dim() == 2:
            transposed = rotations.to(value.dtype).transpose(1, 2)
            atoms = graph.atoms_per_structure.tolist()
            labels[name] = rotate_rows(value, transposed, atoms)
        elif kind.rank:
            rows = graph.structure_index if kind.per_atom else slice(None)
            labels[name] = _rotate_components(value, rotations.to(value.dtype)[rows], kind.rank)
    return replace(batch, graph=rotate_graphs(graph, rotations), labels=labels)


def _rotate_components(values: Tensor, rotations: Tensor, rank: int) -> Tensor:
    """Turn vectors or tensors, several for each row maybe.

    Args:
        values: ``[m, 3, ...]`` for ``rank`` 1, ``[m, 3, 3, ...]`` for 2; what follows the Cartesian
            axes are subtargets.
        rotations: ``[m, 3, 3]``.
        rank: 1 for vectors, 2 for tensors.
    """
    if rank == 1:
        return torch.einsum("mij,mj...->mi...", rotations, values)
    return torch.einsum("mik,mjl,mkl...->mij...", rotations, rotations, values)


def distorted(
    structures: Sequence[Structure], copies: int, rattle: float, strain: float, seed: int
) -> list[Structure]:
    """Copies of each structure with every atom moved and, where periodic, the cell strained.

    Labels are left behind, since they are those of the original.

    Args:
        structures: the originals; they stay as they are.
        copies: how many of each.
        rattle: standard deviation of each Cartesian coordinate, Å.
        strain: standard deviation of each component of the symmetric strain of cells that are
            periodic in all three directions.
        seed: the same seed gives the same copies.
    """
    made = []
    for number, structure in enumerate(structures):
        for copy in range(copies):
            rng = np.random.default_rng([seed, Stream.PERTURBED_COPIES, number, copy])
            made.append(_distorted(structure, rattle, strain, rng))
    return made


def _distorted(
    structure: Structure, rattle: float, strain: float, rng: np.random.Generator
) -> Structure:
    positions, cell = structure.positions, structure.cell
    if bool(structure.pbc.all()):
        drawn = strain * rng.normal(size=(3, 3))
        deform = torch.from_numpy(np.eye(3) + (drawn + drawn.T) / 2)
        positions, cell = positions @ deform, cell @ deform
    moves = torch.from_numpy(rattle * rng.normal(size=tuple(positions.shape)))
    return replace(structure, positions=positions + moves, cell=cell, labels={})
