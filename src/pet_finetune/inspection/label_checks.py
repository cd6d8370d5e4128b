"""Data that may be wrong: what can be read of them, and checks of labels frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ase import Atoms

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.dataset_files import frame_numbers, isolated_frames, sets_of_isolated_atoms
from pet_finetune.data.frame_files import read_file, read_frames
from pet_finetune.data.label_columns import LABEL_SHAPES, find_value, fits
from pet_finetune.data.readers import read_structures
from pet_finetune.data.structure import Structure
from pet_finetune.data.structure_sets import evenly_spread, sampled
from pet_finetune.errors import DataError

from .energy_checks import constant_energies
from .inspected import Finding, Frames, InspectedDataset, InspectedFrame, frames_of, rms


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
    """Findings on files that contain only isolated atoms, by the index of the set."""
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
        "`isolated_atoms: train` next to `read_from` of the systems trains on them.",
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
        "Compute them again. `unconverged: error` next to `read_from` of the systems stops.",
        {"count": len(failed)},
    )
    return dataset.model_copy(update={"indices": tuple(left)}), [finding]


def _broken(atoms: Atoms, dataset: DatasetOptions) -> str:
    """Code of a frame's problem, or None."""
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


#: eV/Å: an atom in a thermal structure feels 1 to 5, in a violent collision up to 30.
_ABSURD = 50.0

#: Forces and sums of directions that count as zero.
_ZERO, _BALANCED = 1e-9, 0.05

#: eV/Å: below, a set of forces is that of relaxed structures.
_RELAXED = 0.05

#: Noise, in eV/Å and as a part of the root mean square force, that a net force stands for.
_NOISE, _NOISE_PART = 1e-3, 5e-3


def check_completeness(dataset: InspectedDataset) -> Iterator[Finding]:
    """Frames without forces, energies that never change, sets of one composition."""
    frames = dataset.frames
    without = [e for e in frames if e.forces is None and e.size > 1]
    several = [e for e in frames if e.size > 1]
    if several and len(without) == len(several):
        yield Finding(
            "note",
            "energies-only",
            "no frame has forces",
            (),
            "Each frame then has one label instead of 3 N + 1: many more frames are needed, and"
            " MD with the result is unreliable.",
            "If the forces exist under another name, give it as targets.<name>.forces.key.",
        )
    elif without:
        yield Finding(
            "note",
            "partial-forces",
            f"{len(without)} of {len(frames)} frames have no forces",
            frames_of(e.structure for e in without),
            "They count for the energy only.",
            "Nothing, if the reference data have no forces there.",
            {"count": len(without)},
        )
    for file, own in dataset.files.items():
        yield from constant_energies(file, own)
    compositions = {e.formula for e in frames}
    elements = {int(z) for e in frames for z in e.elements[0]}
    energies = [e for e in frames if e.energy is not None]
    if len(compositions) == 1 and len(energies) > 1 and len(elements) > 1:
        yield Finding(
            "note",
            "single-composition",
            "all frames have the same composition",
            (),
            "The energies of the elements cannot be separated, so only the sum of the baselines"
            " is determined: correct for this composition, arbitrary for others.",
            "Add frames of other compositions if the model will be used for them.",
        )


def check_forces(dataset: InspectedDataset) -> Iterator[Finding]:
    """Forces that are absurdly large, exactly zero without a reason, or all but zero."""
    forced = [e for e in dataset.frames if e.forces is not None]
    absurd = [e for e in forced if _largest(e) > _ABSURD]
    if absurd:
        largest = max(map(_largest, absurd))
        yield Finding(
            "warning",
            "absurd-forces",
            f"{len(absurd)} of {len(forced)} frames have a force above {_ABSURD:g} eV/A, up to "
            f"{largest:.4g}",
            frames_of(e.structure for e in absurd),
            "A few of them dominate a squared loss, and the errors of all others grow.",
            "A calculation that has not converged, overlapping atoms, or a wrong unit: remove or "
            "repeat these frames.",
            {"count": len(absurd), "largest": largest},
        )
    empty = [e for e in forced if e.size > 1 and _largest(e) < _ZERO]
    unexplained = [e for e in empty if float(e.lopsided.max()) > _BALANCED]
    if unexplained:
        yield Finding(
            "warning",
            "zero-forces",
            f"all forces are exactly zero in {len(unexplained)} frames in which no symmetry makes "
            "them so",
            frames_of(e.structure for e in unexplained),
            "Zeros in place of missing values teach the model that these structures are relaxed.",
            "Take the forces out of these frames: frames without forces are fine.",
            {"count": len(unexplained)},
        )
    held = [e for e in forced if e.fixed]
    if held:
        yield Finding(
            "warning",
            "fixed-atoms",
            f"forces on atoms of {len(held)} frames are exactly zero, and those on the others do "
            "not add up to zero: constraints have set them to zero",
            frames_of(e.structure for e in held),
            "A model that learns such zeros is wrong at the fixed atoms and near them.",
            "Nothing: they are left out. In ASE, get_forces(apply_constraint=False) gives the "
            "forces on fixed atoms.",
            {"count": len(held), "atoms": sum(e.fixed for e in held)},
        )
    size = rms(*[e.forces for e in forced if e.forces is not None])
    if forced and 0.0 < size < _RELAXED and len(forced) > 2:
        yield Finding(
            "note",
            "relaxed-structures",
            f"the root mean square force is {size:.3g} eV/A: the structures are relaxed",
            (),
            "Near minima, a model learns little about structures far from them.",
            "Add displaced or heated frames if the model will run MD.",
            {"size": size},
        )
    blank = [
        e
        for e in dataset.frames
        if e.stress is not None and not e.stress.any() and _largest(e) > 0.0
    ]
    if blank:
        yield Finding(
            "warning",
            "zero-stress",
            f"the stress is exactly zero in {len(blank)} frames that have forces",
            frames_of(e.structure for e in blank),
            "Zeros in place of missing values teach the model that the cells are relaxed.",
            "Set `stress: off` for the target, or take it out of these frames.",
            {"count": len(blank)},
        )


def check_mechanics(dataset: InspectedDataset) -> Iterator[Finding]:
    """Net forces, and for molecules net torques, which no potential has."""
    forced = [e for e in dataset.frames if e.forces is not None and e.size > 1 and not e.fixed]
    size = rms(*[e.forces for e in forced if e.forces is not None])
    limit = max(_NOISE, _NOISE_PART * size)
    pushed = {id(e): _net_force(e) for e in forced}
    moving = [e for e in forced if pushed[id(e)] > limit]
    if moving:
        worst = max(moving, key=lambda e: pushed[id(e)])
        assert worst.forces is not None
        whole = float(np.linalg.norm(worst.forces.sum(axis=0)))
        typical = float(np.median([pushed[id(e)] for e in moving]))
        yield Finding(
            "warning",
            "net-force",
            f"the forces do not add up to zero in {len(moving)} of {len(forced)} frames: up to "
            f"{whole:.3g} eV/A in a frame, as noise of {typical * 1e3:.3g} meV/A on each component "
            "would make it",
            frames_of(e.structure for e in moving)
            if 2 * len(moving) < len(forced)
            else tuple(dict.fromkeys(Frames(e.file) for e in moving)),
            "A potential has no net force, so this part of the error cannot be learned.",
            "Nothing, where it is far below the errors you aim for. Else use a tighter grid or "
            "convergence in the reference calculations, or subtract the mean force.",
            {"count": len(moving), "largest": whole, "noise": typical},
        )
    still = {id(e) for e in moving}
    free = [e for e in forced if not e.pbc.any() and id(e) not in still]
    turning = [(noise, e) for e in free if (noise := _net_torque(e)) > 2.0 * limit]
    if turning:
        typical = float(np.median([noise for noise, _ in turning]))
        yield Finding(
            "warning",
            "net-torque",
            f"the forces turn the whole molecule in {len(turning)} of {len(free)} frames, as noise "
            f"of {typical * 1e3:.3g} meV/A on each component would",
            frames_of(e.structure for _, e in turning),
            (
                "The energy of a molecule does not depend on its orientation, so a potential has no"
                " net torque."
            ),
            "Check that positions and forces use the same axes: programs that reorient the "
            "molecule may print one of them rotated.",
            {"count": len(turning), "noise": typical},
        )


def _largest(frame: InspectedFrame) -> float:
    """The longest force, eV/Å."""
    if frame.forces is None:
        return 0.0
    return float(np.linalg.norm(frame.forces, axis=1).max())


def _net_force(frame: InspectedFrame) -> float:
    """Size of independent noise on the components that makes as large a sum, eV/Å."""
    assert frame.forces is not None
    return float(np.linalg.norm(frame.forces.sum(axis=0))) / float(np.sqrt(3 * frame.size))


def _net_torque(frame: InspectedFrame) -> float:
    """Net torque about the centre, as for the force, eV/Å."""
    assert frame.forces is not None
    arms = frame.positions - frame.positions.mean(axis=0)
    torque = float(np.linalg.norm(np.cross(arms, frame.forces).sum(axis=0)))
    return torque / max(1e-9, float(np.sqrt(2.0 * (arms**2).sum())))
