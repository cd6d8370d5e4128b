"""Structures with their labels from the files that the options name, in eV and Å."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from pet_finetune.config.dataset import DatasetOptions, ExtraName
from pet_finetune.config.target import TargetOptions
from pet_finetune.errors import DataError
from pet_finetune.keys import TargetSpec, forces_key, stress_key, weights_key
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .dataset_files import DatasetFiles, energy_column, gradient_of, log_partial, property_column
from .frame_files import read_frames
from .label_columns import Column, find_value, to_scalar, weights_of
from .metatrain_sets import Folder
from .stored import stored_set
from .structure import Structure, atoms_to_structure, list_frames, log_odd_charges
from .structure_sets import OnDisk, of_species

_logger = get_logger(__name__)
#: What files of forces alone lack, and options need not name.
_USUAL = "energy"
#: MACE's name of the weights of structures.
_USUAL_WEIGHT = "config_weight"


def read_structures(
    options: DatasetOptions, *, offer_baselines: bool = False, leave_out: bool = False
) -> Sequence[Structure]:
    """Read the structures of one data set; those of a large one stay on disk.

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
        leave_out: whether all of it are isolated atoms, beside larger structures in other files.

    Raises:
        DataError: see :mod:`.frame_files` and :class:`~.label_columns.Column`; also an energy or
            required label that is not in the file, and a target that no frame has.
        UnitError: an unknown unit.
    """
    reading = DatasetFiles(options)
    if leave_out:
        reading.chosen, reading.isolated = [], reading.chosen
    _log_isolated(reading, offer_baselines)
    if leave_out:
        return []
    if isinstance(reading.frames, Folder):
        stored = stored_set(reading, reading.frames, _in_memory)
        return OnDisk.of(stored, np.array(reading.chosen))
    return _in_memory(reading)


def _in_memory(reading: DatasetFiles) -> list[Structure]:
    """The chosen frames with their labels."""
    options = reading.options
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


def _read_target(
    reading: DatasetFiles, name: str, target: TargetOptions
) -> dict[str, Sequence[Tensor | None]]:
    """All labels of one target, by label name, one value or None for each chosen frame."""
    _check_name(name)
    if not target.is_energy:
        return {name: _read_property(reading, target.spec(name), target)}
    column, factor = energy_column(reading, name, target)
    values = column.read(factor, nan_is_missing=True)
    labels: dict[str, Sequence[Tensor | None]] = {name: values}
    length = reading.length
    forces = gradient_of(reading, "forces", name, target)
    labels[forces_key(name)] = forces.read(factor / length)
    volumes = reading.volumes()
    periodic = [volume > 0 for volume in volumes]
    stresses = gradient_of(reading, "stress", name, target).read(factor / length**3, periodic)
    virials = gradient_of(reading, "virial", name, target).read(factor, periodic)
    labels[stress_key(name)] = [
        -w / volume if s is None and w is not None else s
        for s, w, volume in zip(stresses, virials, volumes, strict=True)
    ]
    _check_energies(reading, column, labels)
    return labels


def _read_weights(
    reading: DatasetFiles,
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
    reading: DatasetFiles, column: Column, labels: Mapping[str, Sequence[Tensor | None]]
) -> None:
    """Accept frames without an energy that have forces or a stress, with a notice.

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
        "count.%s%s",
        column.source,
        "all" if len(absent) == count else len(absent),
        count,
        column.key,
        column.other_name(energies),
        " Where no file has energies, their offset stays that of the foundation; trained from "
        "scratch, only differences of energies mean something."
        if len(absent) == count
        else "",
    )


def _read_property(
    reading: DatasetFiles, spec: TargetSpec, target: TargetOptions
) -> list[Tensor | None]:
    """Values of a target that is no energy; None in frames that lack it."""
    column = property_column(reading, spec, target)
    what, key = column.what, column.key
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
            raise DataError(
                f"The {what} are asked for, but no frame of {reading.source} is periodic in all "
                "three directions (pbc and a cell), so that none has a volume. Leave the target "
                "out."
            )
        raise column.missing(reading.chosen[0], len(values))
    if found < len(values):
        log_partial(column, values)
    return values


def _log_isolated(reading: DatasetFiles, offer_baselines: bool) -> None:
    """Say which isolated atoms are left out, and offer their energies as baselines.

    Not to a run that starts from a model: the network of a foundation has learned to add to the
    foundation's own baselines, and its sum with other ones is off by whole atomisation energies.
    """
    isolated, total = reading.isolated, len(reading.isolated) + len(reading.chosen)
    if not isolated:
        return
    offers: dict[str, dict[int, float]] = {}
    for name, target in reading.options.targets.items() if offer_baselines else ():
        if target.is_energy:
            column, factor = energy_column(reading, name, target)
            found = replace(column, chosen=isolated).read(factor, nan_is_missing=True)
            numbers = [int(reading.frames[index].numbers[0]) for index in isolated]
            known = [(-float(e), z) for z, e in zip(numbers, found, strict=True) if e is not None]
            values = {z: round(-e, 6) for e, z in sorted(known)}  # of several, the ground state's
            offers |= {name: values} if values else {}
    _logger.info(
        "%s: %s and are left out.%s `isolated_atoms: train` next to `read_from` of the systems, in "
        "an options file, trains on them.",
        reading.source,
        f"{len(isolated)} of {total} frames are isolated atoms ({list_frames(isolated)})"
        if reading.chosen
        else f"all of {total} frames are isolated atoms, beside larger structures in other files,",
        f" Their energies can be the baselines: `atomic_baseline: {offers}` in "
        "architecture.training."
        if offers
        else "",
    )


def _read_integers(reading: DatasetFiles, name: ExtraName) -> Sequence[int | None]:
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


#: How options and messages call the set.
PROBE = "probe"
_FILE = Path(__file__).with_name("probe.xyz")


def probe_structures(species: Collection[int]) -> list[Structure]:
    """The structures of the probe set that hold no other elements than these; may be empty."""
    frames = read_frames(_FILE)
    structures = [atoms_to_structure(atoms, i, source=PROBE) for i, atoms in enumerate(frames)]
    return of_species(structures, species)
