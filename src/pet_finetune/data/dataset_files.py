"""The files of a data set: which frames are wanted, where its labels are and in what units."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase import Atoms
from torch import Tensor

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.config.target import GRADIENT_QUANTITIES, GradientOptions, TargetOptions
from pet_finetune.errors import DataError
from pet_finetune.files import check_file
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.units import StatedUnits, length_to_angstrom, to_own_unit

from .frame_files import read_file, read_frames
from .label_columns import LABEL_SHAPES, Column, Shape, shape_of, to_scalar, without_fixed
from .metatrain_sets import Folder
from .structure import list_frames

_logger = get_logger(__name__)


class DatasetFiles:
    """The files of one data set, each read once, and the frames that are wanted.

    Attributes:
        source, frames: the file with the structures, and all frames in it.
        chosen: numbers of the frames that are wanted.
        isolated: those of isolated atoms that are left out.
        declared_length: Å per unit of length that the options name.
        length: Å per unit of the positions in the file.
    """

    def __init__(self, options: DatasetOptions) -> None:
        systems = options.systems
        self.options, self.source = options, systems.read_from
        content = read_file(self.source, systems.format, systems.types)
        self.frames = content.frames
        self._files, self._units = {self.source: content}, dict[str, StatedUnits]()
        self.declared_length = length_to_angstrom(systems.length_unit)
        self.length = self.stated(self.source).factor(
            "length",
            "positions",
            self.declared_length,
            systems.length_unit,
            default=self.declared_length == 1.0,
        )
        chosen = frame_numbers(options.indices, len(self.frames), self.source)
        chosen = without_unconverged(chosen, content.doubtful, self.source, systems.unconverged)
        # Without labels there is nothing that they could spoil: all frames are predicted.
        leave_out = systems.isolated_atoms == "leave_out" and bool(options.targets)
        alone = set(isolated_frames(self.frames) if leave_out else ())
        self.isolated = [index for index in chosen if index in alone]
        self.chosen = [index for index in chosen if index not in alone]
        if not self.chosen:  # a set of nothing else is meant as it is
            self.chosen, self.isolated = chosen, []

    def stated(self, source: str) -> StatedUnits:
        """The units that a file that was read states."""
        if source not in self._units:
            content = self._files[source]
            # The texts of a folder are those of all its frames.
            some = content.frames[:1] if isinstance(content.frames, Folder) else content.frames
            self._units[source] = StatedUnits.of(some, source, content.converted)
        return self._units[source]

    def column(self, what: str, source: str, key: str, shape: Shape) -> Column:
        """The values of a name; ``source`` may be another file with the same frames."""
        source = source or self.source
        if source not in self._files:
            self._files[source] = read_file(source)
            count = len(self._files[source].frames)
            if count != len(self.frames):
                raise DataError(
                    f"The {what} come from {source}, which has {count} frames, but "
                    f"{self.source} with the structures has {len(self.frames)}. They must "
                    "hold the same frames in the same order."
                )
        return Column(what, source, key, self._files[source].frames, self.chosen, shape)

    def volumes(self) -> list[float]:
        """Volumes of the chosen frames in Å³, 0 where not periodic in all three directions."""
        chosen = (self.frames[index] for index in self.chosen)
        return [
            float(abs(atoms.cell.volume)) * self.length**3 if atoms.pbc.all() else 0.0
            for atoms in chosen
        ]


def energy_column(reading: DatasetFiles, name: str, target: TargetOptions) -> tuple[Column, float]:
    """The energies of a target, and what makes them eV."""
    what = f"values of target {name!r}"
    column = reading.column(what, target.read_from, target.key or name, to_scalar)
    return column, reading.stated(column.source).factor(
        "energy", column.key, target.factor, target.unit, default=target.factor == 1.0
    )


def property_column(reading: DatasetFiles, spec: TargetSpec, target: TargetOptions) -> Column:
    """The values of a target that is no energy."""
    what = f"values of target {spec.name!r}"
    return reading.column(what, target.read_from, target.key or spec.name, shape_of(spec))


def log_partial(column: Column, values: Sequence[Tensor | None]) -> None:
    """Log how many frames have a label, with a warning if others have a similar name."""
    other = column.other_name(values)
    _logger.log(
        logging.WARNING if other else logging.INFO,
        "%s: %d of %d frames have the %s; it is left out of the loss for the others.%s",
        column.source,
        sum(value is not None for value in values),
        len(values),
        column.what,
        other,
    )


@dataclass(frozen=True)
class Gradient:
    """Forces, stress or virial of an energy."""

    reading: DatasetFiles
    kind: str
    target: str
    options: GradientOptions
    source: str
    shape: Shape

    def read(self, factor: float, usable: Sequence[bool] | None = None) -> list[Tensor | None]:
        """Values of the chosen frames; None where missing or not ``usable``.

        ``factor`` is of the units of energy and length, for options without a unit.
        """
        if not self.options.wanted:
            return [None] * len(self.reading.chosen)
        column, factor = self.column(factor)
        values = column.read(factor, usable)
        if self.kind == "forces":
            values = [None if value is None else without_fixed(value) for value in values]
            self._log_fixed(column, values)
        count, found = len(values), sum(value is not None for value in values)
        if found == 0:
            self._none_found(column, usable)
        elif found < count:
            log_partial(column, values)
        return values

    def column(self, factor: float) -> tuple[Column, float]:
        """Column of the values and their conversion to eV and Å; ``factor`` as for :meth:`read`."""
        what = f"{self.kind} of target {self.target!r}"
        source = self.options.read_from or self.source
        column = self.reading.column(what, source, self.options.key or self.kind, self.shape)
        unit = self.options.unit
        if unit:
            factor = to_own_unit(GRADIENT_QUANTITIES[self.kind], unit)
        return column, self.reading.stated(column.source).factor(
            self.kind, column.key, factor, unit or "the units of energy and length", not unit
        )

    def _log_fixed(self, column: Column, values: Sequence[Tensor | None]) -> None:
        unknown = [0 if value is None else int(value.isnan().any(1).sum()) for value in values]
        frames = [column.chosen[k] for k, number in enumerate(unknown) if number]
        if frames:
            _logger.warning(
                "%s: %s on %d atoms in %s are exactly zero, and those on the others do not add up "
                "to zero: constraints have set them to zero. They are left out. In ASE, "
                "get_forces(apply_constraint=False) gives the forces on fixed atoms",
                column.source, column.what, sum(unknown), list_frames(frames),
            )  # fmt: skip

    def _none_found(self, column: Column, usable: Sequence[bool] | None) -> None:
        """Raise if a required label is missing, warn if a similar name exists."""
        first = self.reading.chosen[0]
        if self.options.required:
            if usable is not None and not any(usable):
                raise DataError(
                    f"The {column.what} is asked for, but no frame of {self.reading.source} is "
                    "periodic in all three directions (pbc and a cell). Set it to `off`."
                )
            raise column.missing(first, len(self.reading.chosen))
        suggestion, kind = column.suggestion(first), self.kind
        if not suggestion and kind == "stress":
            suggestion, kind = replace(column, key="virial").suggestion(first), "virial"
        if suggestion and (usable is None or any(usable)):
            _logger.warning(
                "%s has no %r, so the %s are left out.%s Then write `%s: {key: ...}` in the "
                "options; on the command line of eval: --forces-key, --stress-key, --virial-key.",
                column.source,
                column.key,
                column.what,
                suggestion,
                kind,
            )


def gradient_of(reading: DatasetFiles, kind: str, name: str, target: TargetOptions) -> Gradient:
    """Forces, stress or virial of a target."""
    options = getattr(target, kind)
    return Gradient(reading, kind, name, options, target.read_from, LABEL_SHAPES[kind])


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
    """Numbers of data sets that contain only isolated atoms, if others have larger structures.

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
    """The selected frames without failed calculations, unless these are kept.

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
            "`unconverged: drop` next to `read_from` of the systems leaves them out, `keep` takes "
            "them as they are."
        )
    _logger.warning("%s They are left out.", text)
    return left


def frame_numbers(given: tuple[int, ...] | str | None, count: int | None, source: str) -> list[int]:
    """Frame numbers from the options: a list, a text file with one a line, or all of them.

    Args:
        given: the numbers, counted from 0, or the path of a file (``#`` starts a comment);
            None for all.
        count: how many frames there are, or None when that is checked later.
        source: the file the numbers belong to, for messages.

    Raises:
        DataError: missing or unreadable file, no numbers, repeated numbers, or numbers that are not
            below ``count``.
    """
    if given is None:
        return list(range(count or 0))
    origin = f"the indices of {source}"
    if isinstance(given, str):
        check_file(Path(given), "index file")
        origin = f"{given}, the indices of {source}"
        numbers = _read_numbers(Path(given))
    else:
        numbers = list(given)
    if not numbers:
        raise DataError(f"{origin}: there are none.")
    last = max(numbers) if count is None else count - 1
    outside = [number for number in numbers if not 0 <= number <= last]
    if outside:
        raise DataError(
            f"{origin}: the file does not have {list_frames(outside)}. "
            + ("Frames count from 0." if count is None else f"It has frames 0 to {last}.")
        )
    repeated = sorted(number for number, times in Counter(numbers).items() if times > 1)
    if repeated:
        raise DataError(f"{origin}: given more than once: {list_frames(repeated)}.")
    return numbers


def _read_numbers(file: Path) -> list[int]:
    """Whitespace-separated integers of a text file."""
    numbers = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for line_number, line in enumerate(text.splitlines(), start=1):
        for word in line.partition("#")[0].split():
            try:
                numbers.append(int(word))
            except ValueError:
                raise DataError(
                    f"{file}, line {line_number}: {word!r} is not a frame number. Expected whole "
                    "numbers from 0, one a line."
                ) from None
    return numbers
