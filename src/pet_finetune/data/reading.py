"""The files of a data set: which frames are wanted, where its labels are and in what units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.config.target import GRADIENT_QUANTITIES, GradientOptions, TargetOptions
from pet_finetune.errors import DataError
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.units import length_to_angstrom, to_own_unit

from .files import frame_numbers, read_file
from .labels import Column, Shape, shape_of, to_forces, to_scalar, to_stress
from .left_out import isolated_frames, without_unconverged
from .stated_units import StatedUnits

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Gradient", "Reading", "energy_column", "gradient_of", "log_partial", "property_column"]

_logger = get_logger(__name__)


@dataclass
class Reading:
    """The files of one data set, each read once, and the frames that are wanted."""

    options: DatasetOptions
    files: dict[str, Sequence[Atoms]] = field(default_factory=dict)
    units: dict[str, StatedUnits] = field(default_factory=dict)
    source: str = ""
    frames: Sequence[Atoms] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    #: The frames of isolated atoms that are left out.
    isolated: list[int] = field(default_factory=list)
    #: Å per unit of length that the options name, and per unit of the positions in the file.
    declared_length: float = 1.0
    length: float = 1.0

    def __post_init__(self) -> None:
        systems = self.options.systems
        self.source = systems.read_from
        content = read_file(self.source, systems.format, systems.types)
        self.frames = self.files[self.source] = content.frames
        self.declared_length = length_to_angstrom(systems.length_unit)
        self.length = self.stated(self.source).factor(
            "length",
            "positions",
            self.declared_length,
            systems.length_unit,
            default=self.declared_length == 1.0,
        )
        count = len(self.frames)
        given = self.options.indices
        chosen = list(range(count)) if given is None else frame_numbers(given, count, self.source)
        chosen = without_unconverged(chosen, content.doubtful, self.source, systems.unconverged)
        # Without labels there is nothing that they could spoil: all frames are predicted.
        leave_out = systems.isolated_atoms == "leave_out" and bool(self.options.targets)
        alone = set(isolated_frames(self.frames) if leave_out else ())
        self.isolated = [index for index in chosen if index in alone]
        self.chosen = [index for index in chosen if index not in alone]
        if not self.chosen:  # a set of nothing else is meant as it is
            self.chosen, self.isolated = chosen, []

    def stated(self, source: str) -> StatedUnits:
        """The units that a file that was read states."""
        if source not in self.units:
            self.units[source] = StatedUnits.of(self.files[source], source)
        return self.units[source]

    def column(self, what: str, source: str, key: str, shape: Shape) -> Column:
        """The values of a name; ``source`` may be another file with the same frames."""
        source = source or self.source
        if source not in self.files:
            self.files[source] = read_file(source).frames
            if len(self.files[source]) != len(self.frames):
                raise DataError(
                    f"The {what} come from {source}, which has {len(self.files[source])} frames, "
                    f"but {self.source} with the structures has {len(self.frames)}. They must "
                    "hold the same frames in the same order."
                )
        return Column(what, source, key, self.files[source], self.chosen, shape)

    def volumes(self) -> list[float]:
        """Volumes of the chosen frames in Å³, 0 where not periodic in all three directions."""
        chosen = (self.frames[index] for index in self.chosen)
        return [
            float(abs(atoms.cell.volume)) * self.length**3 if atoms.pbc.all() else 0.0
            for atoms in chosen
        ]


def energy_column(reading: Reading, name: str, target: TargetOptions) -> tuple[Column, float]:
    """The energies of a target, and what makes them eV."""
    what = f"values of target {name!r}"
    column = reading.column(what, target.read_from, target.key or name, to_scalar)
    return column, reading.stated(column.source).factor(
        "energy", column.key, target.factor, target.unit, default=target.factor == 1.0
    )


def property_column(reading: Reading, spec: TargetSpec, target: TargetOptions) -> Column:
    """The values of a target that is no energy."""
    what = f"values of target {spec.name!r}"
    return reading.column(what, target.read_from, target.key or spec.name, shape_of(spec))


def log_partial(column: Column, found: int) -> None:
    """Say how many frames have a label."""
    _logger.info(
        "%s: %d of %d frames have the %s; it is left out of the loss for the others.",
        column.source,
        found,
        len(column.chosen),
        column.what,
    )


@dataclass(frozen=True)
class Gradient:
    """Forces, stress or virial of an energy."""

    reading: Reading
    kind: str
    target: str
    options: GradientOptions
    source: str
    shape: Shape

    def read(self, factor: float, usable: Sequence[bool] | None = None) -> list[Tensor | None]:
        """Values of the chosen frames; None where missing or not ``usable``.

        Args:
            factor: of the units of energy and length, for options without a unit.
            usable: for each frame whether its value counts; None for all.
        """
        if not self.options.wanted:
            return [None] * len(self.reading.chosen)
        column, factor = self.column(factor)
        values = column.read(factor, usable)
        count, found = len(values), sum(value is not None for value in values)
        if found == 0:
            self._none_found(column, usable)
        elif found < count:
            log_partial(column, found)
        return values

    def column(self, factor: float) -> tuple[Column, float]:
        """Where the values are, and what makes them eV and Å.

        Args:
            factor: of the units of energy and length, for options without a unit.
        """
        what = f"{self.kind} of target {self.target!r}"
        source = self.options.read_from or self.source
        column = self.reading.column(what, source, self.options.key or self.kind, self.shape)
        unit = self.options.unit
        if unit:
            factor = to_own_unit(GRADIENT_QUANTITIES[self.kind], unit)
        return column, self.reading.stated(column.source).factor(
            self.kind, column.key, factor, unit or "the units of energy and length", not unit
        )

    def _none_found(self, column: Column, usable: Sequence[bool] | None) -> None:
        """Raise when the label was asked for, warn when it seems to have another name."""
        first = self.reading.chosen[0]
        if self.options.required:
            if usable is not None and not any(usable):
                raise DataError(
                    f"The {column.what} is asked for, but no frame of {self.reading.source} is "
                    "periodic in all three directions (pbc and a cell). Set it to `off`."
                )
            raise column.missing(first, len(self.reading.chosen))
        suggestion = column.suggestion(first)
        if suggestion and (usable is None or any(usable)):
            _logger.warning(
                "%s has no %r, so the %s are left out.%s Then write `%s: {key: ...}` in the "
                "options; on the command line of eval: --forces-key, --stress-key, --virial-key.",
                column.source,
                column.key,
                column.what,
                suggestion,
                self.kind,
            )


_SHAPES: Mapping[str, Shape] = {"forces": to_forces, "stress": to_stress, "virial": to_stress}


def gradient_of(reading: Reading, kind: str, name: str, target: TargetOptions) -> Gradient:
    """Forces, stress or virial of a target."""
    options = getattr(target, kind)
    return Gradient(reading, kind, name, options, target.read_from, _SHAPES[kind])
