"""Structures with their labels from the files that the options name, in eV and Å."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from pet_finetune.config.dataset import DatasetOptions, ExtraName
from pet_finetune.config.target import GRADIENT_QUANTITIES, GradientOptions, TargetOptions
from pet_finetune.errors import DataError
from pet_finetune.keys import TargetSpec, forces_key, stress_key, weights_key
from pet_finetune.log import Watch, get_logger
from pet_finetune.units import length_to_angstrom, to_own_unit

from .computable import log_odd_charges
from .files import frame_numbers, read_file
from .labels import Column, Shape, find_value, shape_of, to_forces, to_scalar, to_stress, weights_of
from .left_out import isolated_frames, log_isolated, without_unconverged
from .stated_units import StatedUnits
from .structure import Structure, atoms_to_structure

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["read_structures"]

_logger = get_logger(__name__)
#: What files of forces alone lack, and options need not name.
_USUAL = "energy"
#: MACE's name of the weights of structures.
_USUAL_WEIGHT = "config_weight"


def read_structures(options: DatasetOptions, *, offer_baselines: bool = False) -> list[Structure]:
    """Read the structures of one data set.

    Energies are converted from the target's unit, positions from the systems' length unit, and
    forces, stress and virial from the units these two make; a unit that the file itself states for
    them wins, which the log says. Frames without forces or stress, or without a target that is no
    energy, are kept. A stress counts only where the structure is periodic in all three directions.
    Frames of calculations that did not converge are left out unless the options say otherwise; the
    others keep their numbers.

    Args:
        options: files, names and units.
        offer_baselines: whether the log offers the energies of isolated atoms as baselines, which
            a model that is trained from scratch can use.

    Raises:
        DataError: see :mod:`pet_finetune.data.files` and :class:`~.labels.Column`; also an energy
            or required label that is not in the file, and a target that no frame has.
        UnitError: an unknown unit.
    """
    reading = _Reading(options)
    _log_isolated(reading, offer_baselines)
    labels: list[dict[str, Tensor]] = [{} for _ in reading.chosen]
    for name, target in options.targets.items():
        read = _read_target(reading, name, target)
        for label, values in (read | _read_weights(reading, name, target, read)).items():
            for of_structure, value in zip(labels, values, strict=True):
                if value is not None:
                    of_structure[label] = value
    specs = {name: target.spec(name) for name, target in options.targets.items()}
    kinds = {name: spec.label_kind for name, spec in specs.items() if not spec.is_energy}
    charges, spins = _read_integers(reading, "charge"), _read_integers(reading, "spin_multiplicity")
    structures = []
    with Watch(f"converting {reading.source}", "frames", len(reading.chosen)) as watch:
        for position, index in enumerate(reading.chosen):
            structures.append(
                atoms_to_structure(
                    reading.frames[index],
                    index,
                    source=reading.source,
                    labels=labels[position],
                    kinds=kinds,
                    charge=charges[position],
                    spin=spins[position],
                    length_factor=reading.length,
                )
            )
            watch.step()
    log_odd_charges(structures)
    return structures


@dataclass
class _Reading:
    """The files of one data set, each read once, and the frames that are wanted."""

    options: DatasetOptions
    files: dict[str, list[Atoms]] = field(default_factory=dict)
    units: dict[str, StatedUnits] = field(default_factory=dict)
    source: str = ""
    frames: list[Atoms] = field(default_factory=list)
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


def _read_target(
    reading: _Reading, name: str, target: TargetOptions
) -> dict[str, Sequence[Tensor | None]]:
    """All labels of one target, by label name, one value or None for each chosen frame."""
    _check_name(name)
    if not target.is_energy:
        return {name: _read_property(reading, target.spec(name), target)}
    what = f"values of target {name!r}"
    column = reading.column(what, target.read_from, target.key or name, to_scalar)
    factor = reading.stated(column.source).factor(
        "energy", column.key, target.factor, target.unit, default=target.factor == 1.0
    )
    values = column.read(factor, nan_is_missing=True)
    labels: dict[str, Sequence[Tensor | None]] = {name: values}
    forces = _Gradient(reading, "forces", name, target.forces, target.read_from, to_forces)
    length = reading.length
    labels[forces_key(name)] = forces.read(factor / length)
    stress = _Gradient(reading, "stress", name, target.stress, target.read_from, to_stress)
    virial = _Gradient(reading, "virial", name, target.virial, target.read_from, to_stress)
    volumes = reading.volumes()
    periodic = [volume > 0 for volume in volumes]
    stresses = stress.read(factor / length**3, periodic)
    virials = virial.read(factor, periodic)
    labels[stress_key(name)] = [
        -w / volume if s is None and w is not None else s
        for s, w, volume in zip(stresses, virials, volumes, strict=True)
    ]
    _check_energies(reading, column, labels)
    return labels


def _read_weights(
    reading: _Reading,
    name: str,
    target: TargetOptions,
    labels: Mapping[str, Sequence[Tensor | None]],
) -> dict[str, Sequence[Tensor | None]]:
    """The weights that the options name for a target's labels, by the name of the weights.

    Those of a target are those of its structures, and so of their forces and stress too.
    """
    stress = target.stress if target.stress.wanted else target.virial
    own = {forces_key(name): target.forces, stress_key(name): stress}
    weights: dict[str, Sequence[Tensor | None]] = {}
    infos = (reading.frames[index].info for index in reading.chosen)
    if not target.weight_key and any(info.get(_USUAL_WEIGHT, 1.0) != 1.0 for info in infos):
        _logger.info(
            "%s: %r is not used; `weight_key: %s` in the target takes it for the weights of "
            "structures in the loss",
            reading.source,
            _USUAL_WEIGHT,
            _USUAL_WEIGHT,
        )
    for label, values in labels.items():
        options = own.get(label)
        named = [(target.weight_key, target.read_from)]
        if options is not None:
            named.append((options.weight_key, options.read_from or target.read_from))
        columns = [
            reading.column(f"weights of {label!r}", source, key, to_scalar)
            for key, source in named
            if key
        ]
        if columns:
            per_atom = target.per_atom or label == forces_key(name)
            weights[weights_key(label)] = weights_of(columns, values, per_atom)
    return weights


def _check_energies(
    reading: _Reading, column: Column, labels: Mapping[str, Sequence[Tensor | None]]
) -> None:
    """Let frames go without an energy that have forces or a stress, and say so.

    Raises:
        DataError: a frame has no label of the target at all, or no frame has an energy though there
            is one under another name.
    """
    energies, *others = labels.values()
    absent = [k for k, value in enumerate(energies) if value is None]
    if not absent:
        return
    bare = [reading.chosen[k] for k in absent if all(values[k] is None for values in others)]
    if bare:
        replace(column, chosen=bare).read()  # NaN is told from what is not there
        raise column.missing(bare[0], len(absent))
    count = len(reading.chosen)
    first = reading.chosen[absent[0]]
    # A name of one's own that no frame has is a slip of the pen, or a question to be answered.
    there = any(find_value(column.frames[index], column.key) is not None for index in column.chosen)
    if len(absent) == count and not there:
        if column.suggestion(first):
            raise column.missing(first, count)
        if column.key != _USUAL:
            advice = f"To train on forces alone, write `key: {_USUAL}`."
            raise DataError(f"{column.missing(first, count)} {advice}")
    _logger.warning(
        "%s: %s of %d frames have no energy (%r is absent or NaN): their forces and stress alone "
        "count.%s",
        column.source,
        "all" if len(absent) == count else len(absent),
        count,
        column.key,
        " Where no file has energies, their offset stays that of the foundation; trained from "
        "scratch, only differences of energies mean something."
        if len(absent) == count
        else "",
    )


def _read_property(
    reading: _Reading, spec: TargetSpec, target: TargetOptions
) -> list[Tensor | None]:
    """Values of a target that is no energy; None in frames that lack it."""
    what = f"values of target {spec.name!r}"
    key = target.key or spec.name
    column = reading.column(what, target.read_from, key, shape_of(spec))
    first = column.frames[reading.chosen[0]]
    if not spec.per_atom and key in first.arrays and key not in first.info:
        raise DataError(
            f"The {what} should be {spec.form}, but {key!r} in {column.source} holds values of "
            "atoms. Set `sample_kind: atom` if the target is one of atoms, or name another `key`."
        )
    usable = [volume > 0 for volume in reading.volumes()] if spec.per_volume else None
    values = column.read(target.factor, usable, nan_is_missing=True)
    found = sum(value is not None for value in values)
    if not found:
        if usable is not None and not any(usable):
            raise _not_periodic(reading, what)
        raise column.missing(reading.chosen[0], len(values))
    if found < len(values):
        _log_partial(column, found)
    return values


def _not_periodic(reading: _Reading, what: str) -> DataError:
    return DataError(
        f"The {what} are asked for, but no frame of {reading.source} is periodic in all three "
        "directions (pbc and a cell), so that none has a volume. Leave the target out."
    )


def _log_partial(column: Column, found: int) -> None:
    _logger.info(
        "%s: %d of %d frames have the %s; it is left out of the loss for the others.",
        column.source,
        found,
        len(column.chosen),
        column.what,
    )


@dataclass(frozen=True)
class _Gradient:
    """Forces, stress or virial of an energy."""

    reading: _Reading
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
        what = f"{self.kind} of target {self.target!r}"
        source = self.options.read_from or self.source
        column = self.reading.column(what, source, self.options.key or self.kind, self.shape)
        unit = self.options.unit
        if unit:
            factor = to_own_unit(GRADIENT_QUANTITIES[self.kind], unit)
        factor = self.reading.stated(column.source).factor(
            self.kind, column.key, factor, unit or "the units of energy and length", not unit
        )
        values = column.read(factor, usable)
        count, found = len(values), sum(value is not None for value in values)
        if found == 0:
            self._none_found(column, usable)
        elif found < count:
            _log_partial(column, found)
        return values

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
                "%s has no %r, so nothing is learned of the %s.%s Then write `%s: {key: ...}`.",
                column.source,
                column.key,
                column.what,
                suggestion,
                self.kind,
            )


def _log_isolated(reading: _Reading, offer_baselines: bool) -> None:
    """Name the isolated atoms that are left out, and their energies where these are offered."""
    if not reading.isolated:
        return
    offers: dict[str, dict[int, float]] = {}
    for name, target in reading.options.targets.items() if offer_baselines else ():
        if target.is_energy:
            column = reading.column("energy", target.read_from, target.key or name, to_scalar)
            found = replace(column, chosen=reading.isolated).read(
                target.factor, nan_is_missing=True
            )
            numbers = [int(reading.frames[index].numbers[0]) for index in reading.isolated]
            values = {
                z: round(float(e), 6) for z, e in zip(numbers, found, strict=True) if e is not None
            }
            offers |= {name: values} if values else {}
    total = len(reading.isolated) + len(reading.chosen)
    log_isolated(reading.source, reading.isolated, total, offers)


def _read_integers(reading: _Reading, name: ExtraName) -> Sequence[int | None]:
    """Charges or multiplicities from a named place; None lets the usual names decide."""
    options = reading.options.extra_data.get(name)
    if options is None:
        return [None] * len(reading.chosen)
    what = name.replace("_", " ")
    return reading.column(what, options.read_from, options.key or name, to_scalar).integers()


def _check_name(name: str) -> None:
    """Refuse names that are kept for the labels of an energy, and for weights."""
    if name.endswith((forces_key(""), stress_key(""), weights_key(""))):
        raise DataError(
            f"Target {name!r}: the endings '/forces', '/stress' and '/weights' are kept for the "
            "labels of an energy and their weights. Choose another name."
        )
