"""Means over a few orientations, for a model that learned its symmetry and is not built with it.

How far predictions depend on the orientation: Langer, Pozdnyakov and Ceriotti, arXiv:2406.17747.
The orientations are a group of symmetries of the cube. As a function of the rotation, a mean over a
group has no part of the lowest orders l: half turns about the axes remove l = 1, the group of the
tetrahedron l = 2 as well, that of the cube l = 3. A structure and its image in a point, whose edges
are all reversed, have a mean without what is odd in the edges. So much less is left than of as many
at random. They are the same for every structure: the mean energy is as smooth as the energy, and
the mean forces are its derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import Any, TypeVar

import torch
from torch import Tensor

from pet_finetune.errors import ConfigError
from pet_finetune.graph import Batch, repeat_batch

from .prediction import Prediction

__all__ = ["ORIENTATIONS", "copies", "orientations", "predict_mean"]

#: How many: the structure's own; with its image in a point; half turns; tetrahedron; cube.
ORIENTATIONS = (1, 2, 4, 12, 24)

#: Copies with so many atoms together are predicted at once; memory grows no further.
_MOST_ATOMS = 2000

#: Where each quantity has its structures or atoms, from the end.
_AXES = {
    "energy": -1, "atom_energies": -1, "forces": -2, "stress": -3, "features": -2, "sums": -2,
}  # fmt: skip

AnyPrediction = TypeVar("AnyPrediction", bound=Prediction)


def orientations(count: int) -> Tensor:
    """The matrices of a group, ``[count, 3, 3]`` float64, the first of them the identity.

    All are rotations but the inversion, the second of two. Their elements are
    0, 1 and -1, so turning loses no digit.

    Args:
        count: one of :data:`ORIENTATIONS`.

    Raises:
        ConfigError: it is another number.
    """
    if count not in ORIENTATIONS:
        raise ConfigError(
            f"orientations: {count} is not one of {', '.join(map(str, ORIENTATIONS))}. They are "
            "groups of symmetries; of other sets less of the errors would cancel."
        )
    signed = torch.stack(
        [
            torch.diag(torch.tensor(signs, dtype=torch.float64))[:, list(axes)]
            for axes in permutations(range(3))
            for signs in product((1.0, -1.0), repeat=3)
        ]
    )
    cube = signed[torch.linalg.det(signed) > 0]
    # Of the tetrahedron are those that exchange no two axes, half turns those that leave all.
    tetrahedron = cube[torch.linalg.det(cube.abs()) > 0]
    half_turns = cube[cube.abs().diagonal(dim1=1, dim2=2).sum(1) == 3]
    identity = half_turns[:1]
    inversion = torch.cat([identity, -identity])
    return {1: identity, 2: inversion, 4: half_turns, 12: tetrahedron, 24: cube}[count]


def copies(batch: Batch, rotations: Tensor) -> Batch:
    """A batch in ``k`` orientations: all structures in the first, and so on.

    Args:
        batch: the structures.
        rotations: ``[k, 3, 3]``; vectors become ``R v``.
    """
    matrices = rotations.to(batch.edge_vectors)
    return repeat_batch(batch, len(rotations))._replace(
        positions=torch.einsum("kij,nj->kni", matrices, batch.positions).flatten(0, 1),
        edge_vectors=torch.einsum("kij,ej->kei", matrices, batch.edge_vectors).flatten(0, 1),
        cells=torch.einsum("kij,baj->kbai", matrices, batch.cells).flatten(0, 1),
    )


def predict_mean(
    batch: Batch, rotations: Tensor, predict: Callable[[Batch], AnyPrediction]
) -> AnyPrediction:
    """What is predicted in several orientations, rotated back, as a mean.

    Args:
        batch: the structures.
        rotations: ``[k, 3, 3]``.
        predict: of a batch; quantities may have axes in front, as those of a committee's members.
    """
    most = max(1, _MOST_ATOMS // max(1, batch.num_atoms))
    chunks = rotations.split(most)
    return _mean([predict(copies(batch, some)) for some in chunks], chunks)


def _mean(parts: Sequence[AnyPrediction], chunks: Sequence[Tensor]) -> AnyPrediction:
    """One prediction of those of copies; ``chunks`` are the rotations of each."""
    values: dict[str, Any] = {}
    for name, first in vars(parts[0]).items():
        each = [getattr(part, name) for part in parts]
        if isinstance(first, Prediction):
            values[name] = _mean(each, chunks)
        elif isinstance(first, Tensor):
            rotated = zip(each, chunks, strict=True)
            back = [_turned_back(name, value, some) for value, some in rotated]
            axis = _AXES[name] - 1
            values[name] = torch.cat(back, axis).mean(axis)
    return replace(parts[0], **values)


def _turned_back(name: str, values: Tensor, rotations: Tensor) -> Tensor:
    """A quantity in the structures' own frame, with an axis of the orientations before its own."""
    matrices = rotations.to(values)
    values = values.detach().unflatten(_AXES[name], (len(rotations), -1))
    if name == "forces":
        return torch.einsum("...kni,kij->...knj", values, matrices)
    if name == "stress":
        return torch.einsum("...kbxy,kxi,kyj->...kbij", values, matrices, matrices)
    return values
