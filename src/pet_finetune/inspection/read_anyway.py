"""Reading data that may be wrong: what can be used, and findings about the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.calculator_input import MISSING_CELL, misses_a_cell
from pet_finetune.data.dataset_files import frame_numbers, isolated_frames, sets_of_isolated_atoms
from pet_finetune.data.frame_files import read_file, read_frames
from pet_finetune.data.label_columns import LABEL_SHAPES, find_value, fits
from pet_finetune.data.readers import read_structures
from pet_finetune.data.structure import Structure
from pet_finetune.data.structure_sets import evenly_spread, sampled
from pet_finetune.errors import DataError

from .inspected import Finding, Frames

_SAMPLE = 100


def read_anyway(dataset: DatasetOptions) -> tuple[Sequence[Structure], list[Finding]]:
    """The structures of a data set that can be read, and findings about the others.

    Of a large set on disk a part stands for all.
    """
    dataset, told = _without_failed(dataset)
    try:
        structures = read_structures(dataset)
        part = sampled(structures, f"the look at {dataset.systems.read_from}")
        return part, [*told, *_isolated(dataset)]
    except DataError as error:
        reason = str(error)
    source = dataset.systems.read_from
    try:
        frames = read_frames(source, dataset.systems.format, dataset.systems.types)
        numbers: Sequence[int] = frame_numbers(dataset.indices, len(frames), source)
        if dataset.indices is None:  # of a large set on disk a part
            numbers = numbers if isinstance(frames, list) else evenly_spread(range(len(frames)))
        broken = {number: why for number in numbers if (why := _broken(frames[number], dataset))}
        sound = tuple(number for number in numbers if number not in broken)
        if broken and sound:
            structures = read_structures(dataset.model_copy(update={"indices": sound}))
            return structures, [*told, *_tell(source, broken)]
    except DataError:
        pass  # what was wrong at first is all there is to say
    return [], [Finding("error", "unreadable", reason, (Frames(source),))]


def _isolated(dataset: DatasetOptions) -> list[Finding]:
    """A note on the frames of isolated atoms in a file of larger structures."""
    systems = dataset.systems
    frames = read_frames(systems.read_from, systems.format, systems.types)
    alone = isolated_frames(frames) if systems.isolated_atoms == "leave_out" else []
    return [_isolated_atoms(systems.read_from, alone, len(frames))] if alone else []


def sets_left_out(datasets: Sequence[DatasetOptions]) -> dict[int, Finding]:
    """Notes on files of nothing but isolated atoms beside others, by the number of the set."""
    try:
        numbers = sets_of_isolated_atoms(datasets)
    except DataError:  # reading that file says why
        return {}
    notes = {}
    for number in numbers:
        systems = datasets[number].systems
        count = len(read_frames(systems.read_from, systems.format, systems.types))
        notes[number] = _isolated_atoms(systems.read_from, list(range(count)), count)
    return notes


def _isolated_atoms(source: str, alone: list[int], count: int) -> Finding:
    return Finding(
        "note",
        "isolated-atoms",
        f"{len(alone)} of {count} frames are isolated atoms",
        (Frames(source, tuple(alone)),),
        "They are left out of the sets; their energies can be the baselines of a model "
        "trained from scratch.",
        "`isolated_atoms: train` beside `read_from` of the systems trains on them.",
        {"count": len(alone)},
    )


def _without_failed(dataset: DatasetOptions) -> tuple[DatasetOptions, list[Finding]]:
    """The data set without frames of failed calculations, and a finding that names them."""
    systems = dataset.systems
    try:
        content = read_file(systems.read_from, systems.format, systems.types)
        numbers = frame_numbers(dataset.indices, len(content.frames), systems.read_from)
    except DataError:
        return dataset, []  # reading it says why
    failed = [number for number in numbers if number in content.doubtful]
    left = [number for number in numbers if number not in content.doubtful]
    if systems.unconverged != "drop" or not failed or not left:
        return dataset, []
    several = f"{len(failed)} of {len(numbers)} frames"
    finding = Finding(
        "warning",
        "unconverged",
        f"the calculation of {several} did not converge; the first is frame {failed[0]} "
        f"({content.doubtful[failed[0]]})",
        (Frames(systems.read_from, tuple(failed)),),
        (
            "Their energies and forces are not usable as labels. They are left out, here and in "
            "training."
        ),
        "Compute them again. `unconverged: error` beside `read_from` of the systems stops instead.",
        {"count": len(failed)},
    )
    return dataset.model_copy(update={"indices": tuple(left)}), [finding]


def _broken(atoms: Atoms, dataset: DatasetOptions) -> str:
    """What is wrong with a frame: a code, or nothing."""
    if not len(atoms) or not np.isfinite(atoms.positions).all():
        return "bad-geometry"
    for name, target in dataset.targets.items():
        if not target.is_energy:
            continue
        wanted = {"energy": target.key or name}
        for kind, options in (("forces", target.forces), ("stress", target.stress)):
            if options.wanted:
                wanted[kind] = options.key or kind
        for kind, key in wanted.items():
            raw = find_value(atoms, key)
            if raw is None:
                others = [key for other, key in wanted.items() if other != "energy"]
                if kind == "energy" and all(find_value(atoms, key) is None for key in others):
                    return "missing-energy"
                continue
            if isinstance(raw, str):
                return "no-number"
            if not fits(atoms, key, LABEL_SHAPES[kind]):
                return "wrong-shape"
            if not np.isfinite(np.asarray(raw, dtype=float)).all():
                return f"not-finite-{kind}"
    return ""


_WORDS = {
    "bad-geometry": ("have no atoms, or positions that are NaN or infinite", "Remove them."),
    "missing-energy": (
        "have no energy, forces or stress",
        "Remove them, or write the energy under the same name as in the others.",
    ),
    "no-number": (
        "have text where a label should be a number",
        "Write numbers; stars are a number too long for its columns in Fortran.",
    ),
    "wrong-shape": (
        "have labels of another shape than their atoms ask for",
        "Write one energy, 3 numbers for each atom, and 3x3, 9 or 6 of the stress.",
    ),
    "not-finite-energy": ("have an energy that is NaN or infinite", "Compute them again."),
    "not-finite-forces": ("have forces that are NaN or infinite", "Compute them again."),
    "not-finite-stress": (
        "have a stress that is NaN or infinite",
        "Compute them again, or set `stress: off`.",
    ),
}


def _tell(source: str, broken: Mapping[int, str]) -> Iterator[Finding]:
    for code in dict.fromkeys(broken.values()):
        frames = tuple(number for number, why in broken.items() if why == code)
        what, advice = _WORDS[code]
        yield Finding(
            "error",
            code,
            f"{len(frames)} frame{'s' if len(frames) > 1 else ''} {what}",
            (Frames(source, frames),),
            "Training refuses such data.",
            advice,
            {"count": len(frames)},
        )


def check_cells(
    path: str | Path, format: str = "", types: Mapping[int, str] | None = None
) -> Iterator[Finding]:
    """Cells that are there but not used, in the first frames of a file."""
    try:
        frames = read_frames(path, format, types)[:_SAMPLE]
    except DataError:
        return  # whoever reads the labels says what is wrong with it
    odd = [
        k for k, atoms in enumerate(frames) if abs(atoms.cell.volume) > 1e-6 and not atoms.pbc.any()
    ]
    if odd:
        yield Finding(
            "warning",
            "cell-without-pbc",
            f"{len(odd)} of the first {len(frames)} frames have a cell, but pbc is False",
            (Frames(str(path), tuple(odd)),),
            "They are computed as molecules: atoms at the border of the cell lack neighbours, and "
            "a stress is not used.",
            'Write pbc="T T T" into the file if they are periodic; else remove the cell.',
            {"count": len(odd)},
        )
    count = misses_a_cell(frames[0]) if frames else 0
    if count:
        yield Finding(
            "warning",
            "cell-missing",
            f"{count} {MISSING_CELL}",
            (Frames(str(path), (0,)),),
            "A droplet in vacuum is another system than a liquid or crystal.",
            'Write Lattice="ax ay az bx by bz cx cy cz" into the comments if they are periodic.',
            {"molecules": count},
        )
