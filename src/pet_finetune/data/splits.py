"""Training, validation and test sets: cut from one file or read from several, and kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pet_finetune.config.dataset import DatasetOptions, IndexedSet
from pet_finetune.config.run_options import Options
from pet_finetune.errors import DataError
from pet_finetune.files import check_file, read_object, write_whole

from .dataset_files import frame_numbers, sets_of_isolated_atoms
from .frame_files import read_frames
from .readers import read_structures
from .structure import Structure, list_frames, structures_fingerprint
from .structure_sets import OnDisk, joined

_FORMAT = "pet-finetune splits"
_VERSION = 1
_SETS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitPart:
    """Frames of one file that belong to a set."""

    #: The option that names the file: ``training_set``, ``validation_set`` or ``test_set``.
    section: str
    #: Which data set of that option, from 0.
    number: int
    #: The file.
    file: str
    #: Frame numbers in the file, from 0, in the order of the set.
    frames: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Splits:
    """The three sets of structures; validation and test may be empty."""

    #: What is learned from.
    train: Sequence[Structure]
    #: What chooses the best model.
    validation: Sequence[Structure]
    #: What the final model is judged by.
    test: Sequence[Structure]
    #: Where the structures of each set (``train``, ``validation``, ``test``) come from.
    parts: Mapping[str, tuple[SplitPart, ...]]

    def save(self, path: str | Path) -> None:
        """Write files, frame numbers and fingerprints as JSON; the file appears whole or not.

        Raises:
            DataError: the file cannot be written.
        """
        sets = {
            name: {
                "structures": len(getattr(self, name)),
                "fingerprint": structures_fingerprint(getattr(self, name)),
                "parts": [asdict(part) for part in self.parts[name]],
            }
            for name in _SETS
        }
        content = json.dumps({"format": _FORMAT, "version": _VERSION, "sets": sets})
        file = Path(path)
        try:
            write_whole(file, content + "\n")
        except OSError as error:
            raise DataError(f"Cannot write the splits to '{file}': {error.strerror}.") from error


def make_splits(options: Options, seed: int) -> Splits:
    """Read the data and cut them into sets as the options say.

    Frames named by ``indices`` of the validation or test set leave the training set first; then
    the fractions are drawn from what is left, from every training file separately, or from small
    ones together. Drawn frames keep the order of the file.

    Raises:
        DataError: files that cannot be read (see :func:`~.readers.read_structures`), indices that
            do not exist or belong to two sets, or nothing left to train on.
    """
    chosen = {"validation": options.validation_set, "test": options.test_set}
    indexed = {name: _named_frames(options, name) for name in chosen}
    scratch = not options.is_finetuning
    # Isolated atoms in a file of their own are not trained on, so no forces are asked of them.
    isolated = sets_of_isolated_atoms(options.training_set)
    pools = {
        number: _read_pool(dataset, indexed, scratch)
        for number, dataset in enumerate(options.training_set)
        if number not in isolated
    }
    members: dict[str, list[_Members]] = {name: [] for name in _SETS}
    for name, frames in indexed.items():
        if frames:
            members[name].append(_Members("training_set", 0, pools[0].take(frames)))
    fractions = {name: choice for name, choice in chosen.items() if isinstance(choice, float)}
    for number in isolated:
        read_structures(options.training_set[number], offer_baselines=scratch, leave_out=True)
    for numbers in _drawn_together(options, pools, fractions):
        rng = np.random.default_rng([seed, numbers[0]])
        for name, drawn in _draw({k: pools[k] for k in numbers}, fractions, rng).items():
            for number, frames in drawn.items():
                members[name].append(_Members("training_set", number, pools[number].take(frames)))
    for number, pool in pools.items():
        if pool.left:
            members["train"].append(_Members("training_set", number, pool.take(pool.left)))
    for name, choice in chosen.items():
        datasets = choice if isinstance(choice, tuple) else ()
        isolated = sets_of_isolated_atoms(datasets)
        for number, dataset in enumerate(datasets):
            found = read_structures(dataset, leave_out=number in isolated)
            members[name].append(_Members(f"{name}_set", number, found))
    return _assemble(members)


def load_splits(path: str | Path, options: Options) -> Splits:
    """Read the data again and restore the sets that :meth:`Splits.save` wrote.

    Raises:
        DataError: the file is none of ours, or the data have changed since.
    """
    sets = _read_sets(Path(path))
    wanted: dict[tuple[str, int], list[int]] = {}
    for of_set in sets.values():
        for part in of_set.parts:
            wanted.setdefault((part.section, part.number), []).extend(part.frames)
    read: dict[tuple[str, int], _Pool] = {}
    for key, frames in wanted.items():
        dataset = _dataset(options, *key, path).model_copy(update={"indices": tuple(frames)})
        try:
            structures = read_structures(dataset)
            read[key] = _Pool(dataset.systems.read_from, structures, [])
            gone = sorted(set(frames) - set(_frames(structures)))
            if gone:
                raise DataError(
                    f"{list_frames(gone)} of {dataset.systems.read_from}, which were trained on, "
                    "are now left out, as not converged or as isolated atoms. Set "
                    "`unconverged: keep` or `isolated_atoms: train` as it was."
                )
        except DataError as error:
            raise DataError(f"The sets of {path} cannot be restored. {error}") from error
    members: dict[str, list[_Members]] = {name: [] for name in _SETS}
    for name, of_set in sets.items():
        for part in of_set.parts:
            key = (part.section, part.number)
            members[name].append(_Members(*key, read[key].take(part.frames)))
    splits = _assemble(members)
    for name, of_set in sets.items():
        if structures_fingerprint(getattr(splits, name)) != of_set.fingerprint:
            files = ", ".join(part.file for part in splits.parts[name])
            raise DataError(
                f"The {name} set is not the one that {path} was written for: the content of "
                f"{files}, or how the options read it, has changed since. Start a new run."
            )
    return splits


@dataclass(frozen=True, eq=False)
class _Members:
    """Structures of one data set that go into one of the three sets."""

    section: str
    number: int
    structures: Sequence[Structure]

    def part(self) -> SplitPart:
        """The part in its saved form."""
        frames = _frames(self.structures)
        return SplitPart(self.section, self.number, self.structures[0].source, frames)


@dataclass(eq=False)
class _Pool:
    """The structures of one training data set, and the frames no set has taken yet."""

    source: str
    structures: Sequence[Structure]
    left: list[int]

    def take(self, frames: Sequence[int]) -> Sequence[Structure]:
        """Remove frames from the pool and return their structures.

        Frames that reading left out (failed calculations) are in no set.
        """
        gone = set(frames)
        self.left = [frame for frame in self.left if frame not in gone]
        if isinstance(self.structures, OnDisk):
            return self.structures.with_frames(frames)
        by_frame = {structure.index: structure for structure in self.structures}
        return [by_frame[frame] for frame in frames if frame in by_frame]


def _frames(structures: Sequence[Structure]) -> tuple[int, ...]:
    """The numbers of frames of one data set."""
    if isinstance(structures, OnDisk):
        return structures.frames
    return tuple(structure.index for structure in structures)


def _named_frames(options: Options, name: str) -> list[int]:
    """The frames of the training file that a set names by ``indices``; empty if it does not."""
    choice = options.validation_set if name == "validation" else options.test_set
    if not isinstance(choice, IndexedSet):
        return []
    return frame_numbers(choice.indices, None, options.training_set[0].systems.read_from)


def _read_pool(
    dataset: DatasetOptions, indexed: Mapping[str, list[int]], offer_baselines: bool
) -> _Pool:
    """Read a training set and the frames other sets name, which must not be its own."""
    source = dataset.systems.read_from
    named = indexed["validation"] + indexed["test"]
    _refuse_overlap(source, "validation_set", indexed["validation"], "test_set", indexed["test"])
    if dataset.indices is None:
        structures = read_structures(dataset, offer_baselines=offer_baselines)
        systems = dataset.systems
        count = len(read_frames(source, systems.format, systems.types))
        frame_numbers(tuple(named) or (0,), count, source)
        left = list(_frames(structures))
    else:
        left = frame_numbers(dataset.indices, None, source)
        for name, frames in indexed.items():
            _refuse_overlap(source, "training_set", left, f"{name}_set", frames)
        everything = dataset.model_copy(update={"indices": (*left, *named)})
        structures = read_structures(everything, offer_baselines=offer_baselines)
        there = set(_frames(structures))
        left = [frame for frame in left if frame in there]
    return _Pool(source, structures, left)


def _refuse_overlap(
    source: str, first: str, frames: Sequence[int], second: str, others: Sequence[int]
) -> None:
    """Raise when two sets name the same frames."""
    common = sorted(set(frames) & set(others))
    if common:
        raise DataError(
            f"{first}.indices and {second}.indices both hold {list_frames(common)} of {source}. "
            "A frame can be in one set only."
        )


def _drawn_together(
    options: Options, pools: Mapping[int, _Pool], fractions: Mapping[str, float]
) -> list[list[int]]:
    """Numbers of the training sets that are drawn from at once.

    Each by itself, but those of the same targets together where the fraction of each would be less
    than a structure, as with one calculation a file.
    """
    least = min((fraction for fraction in fractions.values() if fraction > 0), default=1.0)
    groups: dict[object, list[int]] = {}
    for number, pool in pools.items():
        is_small = int(least * len(pool.left) + 0.5) < 1
        key = tuple(options.training_set[number].targets) if is_small else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _draw(
    pools: Mapping[int, _Pool], fractions: Mapping[str, float], rng: np.random.Generator
) -> dict[str, dict[int, list[int]]]:
    """Draw each fraction of what is left in the pools, at least one frame if it is above 0.

    Returns:
        by name of the set and number of the pool, the frames.
    """
    left = [(number, frame) for number, pool in pools.items() for frame in pool.left]
    total = len(left)
    sizes = {
        name: max(1, int(fraction * total + 0.5))
        for name, fraction in fractions.items()
        if fraction > 0
    }
    if total <= sum(sizes.values()):
        drawn = ", ".join(f"{size} for the {name} set" for name, size in sizes.items())
        more = f" and {len(pools) - 1} more" if len(pools) > 1 else ""
        source = next(iter(pools.values())).source
        raise DataError(
            f"{source}{more}: of {total} structures{f', {drawn},' if drawn else ''} none is left "
            "to train on. Give more structures or smaller fractions."
        )
    order = rng.permutation(total)
    result: dict[str, dict[int, list[int]]] = {name: {} for name in sizes}
    start = 0
    for name, size in sizes.items():
        for k in sorted(order[start : start + size].tolist()):
            result[name].setdefault(left[k][0], []).append(left[k][1])
        start += size
    return result


def _assemble(members: Mapping[str, list[_Members]]) -> Splits:
    """Join the data sets of each set."""
    sets = {name: joined([m.structures for m in members[name]]) for name in _SETS}
    parts = {name: tuple(m.part() for m in members[name] if m.structures) for name in _SETS}
    return Splits(**sets, parts=parts)


def _dataset(options: Options, section: str, number: int, path: str | Path) -> DatasetOptions:
    """The data set of an option that a saved part refers to."""
    datasets = getattr(options, section, None)
    if not isinstance(datasets, tuple) or not 0 <= number < len(datasets):
        raise DataError(
            f"{path} refers to data set {number} of {section}, which the options do not have. "
            "Use the options it was written with."
        )
    dataset: DatasetOptions = datasets[number]
    return dataset


@dataclass(frozen=True)
class _StoredSet:
    """One of the three sets, as :meth:`Splits.save` writes it."""

    fingerprint: str
    parts: tuple[SplitPart, ...]


def _read_sets(file: Path) -> dict[str, _StoredSet]:
    """The sets of a saved file, by name, checked to be of our making."""
    check_file(file, "file of splits")
    content = read_object(file)
    found = (content.get("format"), content.get("version"))
    if found != (_FORMAT, _VERSION):
        raise DataError(f"{file} is not a file of splits of version {_VERSION}; found {found}.")
    try:
        sets = TypeAdapter(dict[str, _StoredSet]).validate_python(content.get("sets"))
        return {name: sets[name] for name in _SETS}
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, ('sets', *first['loc'])))}: {first['msg']}"
    except KeyError as error:
        reason = f"the {error} set is missing"
    raise DataError(
        f"'{file}' is damaged ({reason}), so the sets of the run are not known. Put a whole copy "
        "of it in its place, or start a new run."
    )
