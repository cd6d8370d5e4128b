"""Values of one name in the frames of a file: found, shaped, converted and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor

from pet_finetune.errors import DataError, did_you_mean
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger

from .structure import ASYMMETRIC, ROUNDING, as_integer, asymmetry, evenly_apart, list_frames, place

#: Makes an array of the expected shape of the raw one, given the number of atoms; raises
#: ValueError with the shapes that are allowed.
Shape = Callable[[np.ndarray, int], np.ndarray]

_logger = get_logger(__name__)

# Arrays that describe the structure itself and are no labels.
_STRUCTURE_ARRAYS = frozenset({"numbers", "positions"})
#: Frames without a value in which another name is looked for, at most.
_LOOKED_AT = 100


def to_scalar(raw: np.ndarray, num_atoms: int) -> np.ndarray:
    """Convert a number or an array of length 1 to a scalar."""
    if raw.size != 1:
        of_atoms = raw.shape[:1] == (num_atoms,)
        hint = ". This looks like values of atoms, which are `sample_kind: atom`"
        raise ValueError("one number for each structure" + (hint if of_atoms else ""))
    return raw.reshape(())


def to_forces(raw: np.ndarray, num_atoms: int) -> np.ndarray:
    """Three numbers for each atom, as ``[n, 3]`` or flattened."""
    if raw.shape not in ((num_atoms, 3), (3 * num_atoms,)):
        raise ValueError(f"one row of 3 for each atom, that is ({num_atoms}, 3)")
    return raw.reshape(num_atoms, 3)


def to_stress(raw: np.ndarray, num_atoms: int) -> np.ndarray:
    """A symmetric 3x3 matrix from 3x3, 9 or (in Voigt order xx yy zz yz xz xy) 6 numbers.

    Only the symmetric part of a matrix is kept: a strain turns nothing.
    """
    if raw.shape == (6,):
        return np.asarray(voigt_6_to_full_3x3_stress(raw))
    if raw.shape not in ((3, 3), (9,)):
        raise ValueError("(3, 3), (9,) or in Voigt order xx yy zz yz xz xy (6,)")
    matrix = raw.reshape(3, 3)
    return (matrix + matrix.T) / 2


#: From here on forces do not add up to zero: eV/Å, and a part of the sum of their sizes.
_NET, _NET_PART = 5e-3, 0.01


def without_fixed(forces: Tensor) -> Tensor:
    """Forces with NaN, which is unknown, in place of zeros that only constraints can have made.

    ASE's ``get_forces`` sets forces on fixed atoms to zero, as some codes do. Those on the others
    then do not add up to zero, and no symmetry explains the exact zeros in their direction.

    Args:
        forces: ``[n, 3]``, eV/Å.
    """
    net, sizes, zero = forces.sum(dim=0).abs(), forces.abs().sum(dim=0), forces == 0
    apart = net > (_NET_PART * sizes).clamp_min(_NET)
    several = apart & (zero.sum(dim=0) > 1)  # one zero in a direction may be chance
    fixed = zero & (several | (zero.all(dim=1, keepdim=True) & apart.any()))
    return forces.masked_fill(fixed, torch.nan) if bool(fixed.any()) else forces


def _to_weights(raw: np.ndarray, num_atoms: int) -> np.ndarray:
    """Weights in the loss: one number for the structure, or one for each atom."""
    if raw.shape not in ((), (1,), (num_atoms,), (num_atoms, 1)):
        raise ValueError(f"one number for the structure, or one for each atom, ({num_atoms},)")
    return raw.reshape(num_atoms if raw.size == num_atoms else ())


def shape_of(spec: TargetSpec) -> Shape:
    """The shape of a target's values, for a structure or for all of its atoms.

    Values may be flattened: a row of 9 for a tensor, a column for scalars of atoms.
    """
    if spec.per_volume:
        return to_stress

    def to_values(raw: np.ndarray, num_atoms: int) -> np.ndarray:
        rows = (num_atoms,) if spec.per_atom else ()
        whole = (*rows, *spec.shape)
        flat = (*rows, spec.num_outputs)
        if raw.shape in (whole, flat):
            return raw.reshape(whole)
        several = f"{spec.num_outputs} numbers" if spec.num_outputs > 1 else "one number"
        unit = "atom" if spec.per_atom else "structure"
        allowed = f"{several} for each {unit}, that is {whole or 'a plain number'}"
        if not spec.per_atom and raw.shape[:1] == (num_atoms,):
            allowed += ". This looks like values of atoms, which are `sample_kind: atom`"
        elif spec.per_atom and raw.shape in (spec.shape, (spec.num_outputs,)):
            allowed += ". This looks like one value of a structure, which is `sample_kind: system`"
        raise ValueError(allowed)

    return to_values


#: The shapes of an energy and its derivatives.
LABEL_SHAPES: Mapping[str, Shape] = {
    "energy": to_scalar,
    "forces": to_forces,
    "stress": to_stress,
    "virial": to_stress,
}


def find_value(atoms: Atoms, key: str) -> Any:
    """A value by its name in the file, or None.

    ASE keeps what it knows (``energy``, ``forces``, ``stress``...) as results of a calculator and
    everything else in ``info`` (of the structure) or ``arrays`` (of its atoms). Calculator results
    are taken as they stand, without applying constraints.
    """
    for place_in_atoms in (atoms.info, atoms.arrays, _results(atoms)):
        if place_in_atoms.get(key) is not None:
            return place_in_atoms[key]
    return None


@dataclass(frozen=True)
class Column:
    """The values of one name in chosen frames of a file."""

    #: What the values are, for messages, e.g. ``forces of target 'energy'``.
    what: str
    #: The file.
    source: str
    #: The name in the file.
    key: str
    #: All frames of the file.
    frames: Sequence[Atoms]
    #: The frames wanted.
    chosen: Sequence[int]
    #: Expected shape.
    shape: Shape

    def read(
        self,
        factor: float = 1.0,
        usable: Sequence[bool] | None = None,
        *,
        nan_is_missing: bool = False,
    ) -> list[Tensor | None]:
        """The values of the chosen frames as float64, None where a frame has none.

        Args:
            factor: multiplies the values, to convert their unit.
            usable: for each chosen frame, whether its value counts; others give None.
            nan_is_missing: whether single numbers may be NaN, which stands for unknown.

        Raises:
            DataError: wrong shapes, values that are no numbers, NaN or infinity.
        """
        values: list[Tensor | None] = []
        broken, lopsided, differing = [], [], []
        for position, index in enumerate(self.chosen):
            raw = find_value(self.frames[index], self.key)
            if raw is None or (usable is not None and not usable[position]):
                values.append(None)
                continue
            array = self._shaped(raw, index)
            other = _results(self.frames[index]).get(self.key)
            if not (
                other is None
                or other is raw
                or np.allclose(array, self._shaped(other, index), rtol=1e-6, equal_nan=True)
            ):
                differing.append(index)
            if (
                self.shape is to_stress
                and np.size(raw) == 9
                and asymmetry(np.reshape(raw, (3, 3))) > ROUNDING
            ):
                lopsided.append(index)
            known = ~np.isnan(array) if nan_is_missing else np.ones_like(array, dtype=bool)
            if not known.any():
                values.append(None)
                continue
            if not np.isfinite(array[known]).all():
                broken.append(index)
            values.append(torch.as_tensor(array * factor, dtype=torch.float64))
        if broken:
            raise DataError(
                f"The {self.what} ({self.key!r}) are NaN or infinite in {list_frames(broken)} of "
                f"{self.source} ({len(broken)} of {len(self.chosen)} frames). Remove these frames "
                "or compute them again."
            )
        if differing:
            _logger.warning(
                "%s: %d of %d frames have two different %s named %r, in info or arrays and among "
                "the results of a calculator (first %s). The former are taken; remove what is "
                "out of date",
                self.source, len(differing), len(values), self.what, self.key, place(differing[0]),
            )  # fmt: skip
        if lopsided:
            _logger.warning(
                "%s: the %s (%r) of %d of %d frames %s (first %s)",
                self.source, self.what, self.key, len(lopsided), len(values), ASYMMETRIC,
                place(lopsided[0]),
            )  # fmt: skip
        return values

    def integers(self) -> list[int]:
        """Integers, such as charges, of the chosen frames.

        Raises:
            DataError: a frame has none, or something else.
        """
        integers = []
        absent = []
        for index in self.chosen:
            raw = find_value(self.frames[index], self.key)
            integer = None if raw is None else as_integer(raw)
            if raw is None:
                absent.append(index)
            elif integer is None:
                raise DataError(
                    f"{place(index, self.source)}: the {self.what} ({self.key!r}) must be an "
                    f"integer, found {raw!r}."
                )
            else:
                integers.append(integer)
        if absent:
            raise self.missing(absent[0], len(absent))
        return integers

    def missing(self, index: int, count: int) -> DataError:
        """The error for ``count`` frames that lack the value, the first of which is ``index``."""
        atoms = self.frames[index]
        names = ", ".join(map(repr, names_in(atoms))) or "nothing but the structure"
        return DataError(
            f"The {self.what} should be under {self.key!r} in {self.source}, but "
            f"{place(index)} has no such value ({count} of {len(self.chosen)} frames lack it). "
            f"It has: {names}.{self.suggestion(index)} Name the right one with `key` in "
            "the options (in Python `targets`, or labels=pf.LabelNames(key=...)); on the command "
            "line of eval: --energy-key, --forces-key, --stress-key."
        )

    def suggestion(self, index: int) -> str:
        """Which other name of a frame may be meant, as a sentence with a leading space, or ""."""
        atoms = self.frames[index]
        fitting = [name for name in names_in(atoms) if fits(atoms, name, self.shape)]
        near = did_you_mean(self.key, fitting)
        if near:
            return near
        inside = [name for name in fitting if self.key.casefold().rstrip("s") in name.casefold()]
        return f" Did you mean {inside[0]!r}?" if inside else ""

    def other_name(self, values: Sequence[Tensor | None]) -> str:
        """A sentence, with a leading space, if frames without a value have it by another name."""
        without = [k for k, value in zip(self.chosen, values, strict=True) if value is None]
        for index in [without[k] for k in evenly_apart(len(without), _LOOKED_AT)]:
            if find_value(self.frames[index], self.key) is None:
                other = self.suggestion(index)
                if other:
                    return f" In {place(index)}:{other} Give it the same name in all frames."
        return ""

    def _shaped(self, raw: Any, index: int) -> np.ndarray:
        """A raw value as an array of the right shape."""
        where = f"{place(index, self.source)}: the {self.what} ({self.key!r})"
        try:
            if np.asarray(raw).dtype == bool:  # a word of a comment stands for true in ASE
                raise TypeError
            array = np.asarray(raw, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{where} must be numbers, found {raw!r}.") from None
        try:
            return self.shape(array, len(self.frames[index]))
        except ValueError as allowed:
            raise DataError(f"{where} have the shape {array.shape}; expected {allowed}.") from None


def _results(atoms: Atoms) -> dict[str, Any]:
    """Stored results of the structure's calculator; nothing is computed."""
    return getattr(atoms.calc, "results", {})


def names_in(atoms: Atoms) -> list[str]:
    """Names of all values that come with a structure."""
    arrays = [name for name in atoms.arrays if name not in _STRUCTURE_ARRAYS]
    results = [name for name, value in _results(atoms).items() if value is not None]
    return list(dict.fromkeys([*map(str, atoms.info), *arrays, *results]))


def fits(atoms: Atoms, name: str, shape: Shape) -> bool:
    """Whether a value of a frame has numbers of the right shape."""
    value = np.asarray(find_value(atoms, name))
    try:
        shape(value.astype(np.float64), len(atoms))
    except (TypeError, ValueError, OverflowError):
        return False
    return value.dtype != bool  # a word of a comment stands for true in ASE


def weights_of(
    columns: Sequence[Column], values: Sequence[Tensor | None], per_atom: bool
) -> list[Tensor | None]:
    """Weights in the loss of the values of one label, float64.

    Args:
        columns: whose numbers are multiplied; a frame that lacks one counts 1.
        values: of the chosen frames, None where a frame lacks the label.
        per_atom: whether a value has a row for each atom: then so have the weights.

    Returns:
        For each frame with a value, weights of its rows, ``[n]``, or of the structure, ``[]``.

    Raises:
        DataError: no frame has the weights, or one is negative, or one for each atom where the
            label has none.
    """
    weights: list[Tensor | None] = [
        None if v is None else torch.ones(len(v) if per_atom else (), dtype=torch.float64)
        for v in values
    ]
    for column in columns:
        column = replace(column, shape=_to_weights)
        found = column.read()
        if all(weight is None for weight in found):
            raise column.missing(column.chosen[0], len(column.chosen))
        for k, (index, weight) in enumerate(zip(column.chosen, found, strict=True)):
            own = weights[k]
            if own is None or weight is None:
                continue
            where = f"{place(index, column.source)}: the {column.what} ({column.key!r})"
            if (weight < 0).any():
                raise DataError(f"{where} must not be negative, found {float(weight.min()):g}.")
            if not per_atom and weight.numel() > 1:
                raise DataError(f"{where} must be one number for the structure, not for each atom.")
            weights[k] = own * (weight if per_atom else weight.reshape(()))
    return weights
