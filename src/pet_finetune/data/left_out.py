"""Frames that are left out of a set: failed calculations, and isolated atoms of reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

from .files import list_frames, read_frames
from .metatrain_sets import Folder

if TYPE_CHECKING:
    from ase import Atoms

    from pet_finetune.config import DatasetOptions

__all__ = ["isolated_frames", "log_isolated", "sets_of_isolated_atoms", "without_unconverged"]

_logger = get_logger(__name__)

#: An atom whose images are further away than this, in Angstrom, is alone.
_FAR = 8.0


def isolated_frames(frames: Sequence[Atoms]) -> list[int]:
    """Numbers of the frames that hold a single atom without neighbours.

    They are recognised by ``config_type=IsolatedAtom`` (the name that MACE reads), or because the
    atom is alone: not periodic, or in a cell larger than 8 Angstrom in every direction. Where no
    frame has more than one atom, the atoms are what the set is about, and none is recognised.
    """
    if isinstance(frames, Folder):
        sizes = frames.num_atoms
    else:
        sizes = np.array([len(atoms) for atoms in frames])
    if not (sizes > 1).any():
        return []
    return [k for k in np.flatnonzero(sizes == 1).tolist() if _is_alone(frames[k])]


def sets_of_isolated_atoms(datasets: Sequence[DatasetOptions]) -> list[int]:
    """Numbers of the data sets of nothing but isolated atoms, beside one of larger structures.

    Those that the options ask to train on do not count.
    """
    if len(datasets) < 2:
        return []
    systems = [dataset.systems for dataset in datasets]
    files = [read_frames(s.read_from, s.format, s.types) for s in systems]
    if not any(len(atoms) > 1 for frames in files for atoms in frames):
        return []
    return [
        number
        for number, (s, frames) in enumerate(zip(systems, files, strict=True))
        if s.isolated_atoms == "leave_out"
        and all(len(atoms) == 1 and _is_alone(atoms) for atoms in frames)
    ]


def _is_alone(atoms: Atoms) -> bool:
    name = str(atoms.info.get("config_type", "")).replace("_", "").casefold()
    if name == "isolatedatom":
        return True
    heights = np.linalg.inv(atoms.cell.array) if abs(atoms.cell.volume) > 1e-9 else np.zeros((3, 3))
    spacing = [1 / np.linalg.norm(h) if np.linalg.norm(h) > 0 else 0.0 for h in heights.T]
    return all(far > _FAR for far, periodic in zip(spacing, atoms.pbc, strict=True) if periodic)


def without_unconverged(
    chosen: Sequence[int], doubtful: Mapping[int, str], source: str, how: str
) -> list[int]:
    """The frames that are wanted, without those of failed calculations unless these are kept.

    Raises:
        DataError: there are some, and the options refuse them; or nothing else is left.
    """
    found = [index for index in chosen if index in doubtful]
    if not found:
        return list(chosen)
    reason = doubtful[found[0]]
    text = (
        f"{source}: the calculation of {list_frames(found)} did not converge ({len(found)} of "
        f"{len(chosen)} frames). Frame {found[0]}: {reason}."
    )
    if how == "keep":
        _logger.warning("%s They are kept, as `unconverged: keep` says.", text)
        return list(chosen)
    left = [index for index in chosen if index not in doubtful]
    if how == "error" or not left:
        none = "" if left else " No other frame is left."
        raise DataError(
            f"{text}{none} Energies and forces of such frames are no labels: compute them again. "
            "`unconverged: drop` beside `read_from` of the systems leaves them out, `keep` takes "
            "them as they are."
        )
    _logger.warning("%s They are left out.", text)
    return left


def log_isolated(
    source: str,
    isolated: Sequence[int],
    total: int,
    energies: Mapping[str, Mapping[int, float]] | None,
) -> None:
    """Say which frames of isolated atoms are left out, and offer their energies as baselines.

    Args:
        source: the file.
        isolated: the frames that are left out.
        total: how many were wanted.
        energies: by target and atomic number, eV. None where the run starts from a model: the
            network of a foundation has learned to add to the foundation's own baselines, and its
            sum with other ones is off by whole atomisation energies.
    """
    found = (
        f"{len(isolated)} of {total} frames are isolated atoms ({list_frames(list(isolated))})"
        if len(isolated) < total
        else f"all of {total} frames are isolated atoms, beside larger structures in other files,"
    )
    offer = (
        f" Their energies can be the baselines: `atomic_baseline: {energies}` in "
        "architecture.training."
        if energies
        else ""
    )
    _logger.info(
        "%s: %s and are left out.%s `isolated_atoms: train` beside `read_from` of the systems, in "
        "an options file, trains on them.",
        source,
        found,
        offer,
    )
