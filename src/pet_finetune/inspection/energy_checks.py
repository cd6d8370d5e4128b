"""Checks of the energies: levels of theory, energies that never change, outliers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .inspected import (
    Finding,
    Frames,
    InspectedDataset,
    InspectedFrame,
    compositions,
    element_fit,
    frames_of,
    rms,
    robust_spread,
)
from .near_frames import FrameStep

#: A shift of a whole file by more, eV an atom, is none of temperature or phase; and how many times
#: the spread within the files it must be.
_SHIFT, _SPREADS = 0.3, 6.0
#: Å: as far as the work between two frames is trusted to judge a single one.
_SAME, _NEARBY = 0.01, 0.25
#: Energies and work that belong together correlate by more, whatever the set; and differ by less of
#: either (0.02 to 0.9 and 0.53 to 0.999 in 20 public sets, 0.03 to 0.23 where they do not).
_TOGETHER, _APART, _FEWEST = 0.45, 0.5, 20
#: Files that a finding names, at most.
_NAMED = 8


def check_levels(dataset: InspectedDataset) -> Iterator[Finding]:
    """Files, or parts of one, whose energies lie on different levels."""
    files = {
        file: [e for e in frames if e.energy is not None and e.size > 1]
        for file, frames in dataset.files.items()
    }
    files = {file: frames for file, frames in files.items() if frames}
    first = max(files, key=lambda name: len(files[name]), default="")
    if len(files) > 1:
        levels = _levels_of(first, files[first])  # once: there may be thousands of files
        for name in files:
            if name != first:
                yield from _compare_files(levels, name, files[name])
    for file, frames in files.items():
        yield from _split_levels(file, frames)


def check_settings(files: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Outputs of one program that were computed with different settings.

    Args:
        files: settings by name, by file.
    """
    differing: dict[str, dict[str, list[str]]] = {}
    for name in dict.fromkeys(name for settings in files.values() for name in settings):
        values: dict[str, list[str]] = {}
        for file, settings in files.items():
            if name in settings:
                values.setdefault(settings[name], []).append(file)
        if len(values) > 1:
            differing[name] = dict(sorted(values.items(), key=lambda item: -len(item[1])))
    if not differing:
        return
    others = (
        file for values in differing.values() for own in [*values.values()][1:] for file in own
    )
    shown = (
        f"{name}: "
        + ", ".join(
            f"{value} ({len(own)} file{'s' * (len(own) > 1)})" for value, own in values.items()
        )
        for name, values in differing.items()
    )
    yield Finding(
        "warning",
        "mixed-settings",
        f"the calculations have different settings: {'; '.join(shown)}",
        tuple(Frames(file) for file in dict.fromkeys(others))[:_NAMED],
        "Energies of different settings differ by more than a model's error, and cannot be learned "
        "together.",
        "Recompute the fewer ones with the settings of the others, remove them, or give each level "
        "of theory a target of its own (docs/targets.md).",
        {
            name: {value: len(own) for value, own in values.items()}
            for name, values in differing.items()
        },
    )


_Levels = tuple[str, Sequence[int], np.ndarray, np.ndarray, np.ndarray]


def _levels_of(file: str, frames: Sequence[InspectedFrame]) -> _Levels:
    """Name, fit of the elements, and an orthonormal basis of the compositions of a file."""
    elements, weights, rest = element_fit(frames)
    basis = np.linalg.svd(compositions(frames, elements), full_matrices=False)
    return file, elements, weights, rest, basis[2][basis[1] > 1e-6 * basis[1][0]]


def _compare_files(
    levels: _Levels, second: str, others: Sequence[InspectedFrame]
) -> Iterator[Finding]:
    """Distance of a file's energies from those by another file's elements."""
    first, elements, weights, rest, rows = levels
    known = [e for e in others if np.isin(e.elements[0], elements).all()]
    if not known:
        return
    fractions = compositions(known, elements)
    # Only compositions that the first file holds, or mixtures of them, can be compared.
    inside = np.abs(fractions - fractions @ rows.T @ rows).max(axis=1) < 1e-6
    if inside.sum() < max(1, len(known) // 2):
        return
    energies = np.array([(e.energy or 0.0) / e.size for e in known])
    left = (energies - fractions @ weights)[inside]
    shift = float(np.median(left) - np.median(rest))
    spread = max(robust_spread(rest), robust_spread(left))
    if abs(shift) < max(_SHIFT, _SPREADS * spread):
        return
    yield Finding(
        "warning",
        "mixed-levels",
        f"the energies of {second} are {shift:+.3g} eV an atom away from those of {first} at "
        f"the same composition; within the files they spread by {spread:.2g}",
        (Frames(second),),
        "Two levels of theory, programs or references in one target: the model learns an "
        "average, and validation against the other one means nothing.",
        "Train on one of them, or shift one to the references of the other.",
        {"shift": shift, "spread": spread, "beside": first},
    )


def _split_levels(file: str, frames: Sequence[InspectedFrame]) -> Iterator[Finding]:
    """Frames of one composition whose energies fall into two groups with a wide gap between."""
    groups: dict[bytes, list[InspectedFrame]] = {}
    for frame in frames:
        groups.setdefault(frame.formula, []).append(frame)
    found: list[InspectedFrame] = []
    widest = 0.0
    for own in groups.values():
        if len(own) < 8:
            continue
        energies = np.array([(e.energy or 0.0) / e.size for e in own])
        order = np.argsort(energies)
        steps = np.diff(energies[order])
        cut = int(steps.argmax())
        low, high = energies[order[: cut + 1]], energies[order[cut + 1 :]]
        fewest = max(3, len(own) // 20)
        width = max(robust_spread(low), robust_spread(high), 1e-6)
        if min(len(low), len(high)) >= fewest and steps[cut] > max(
            2 * _SHIFT, 2 * _SPREADS * width
        ):
            rare = order[: cut + 1] if len(low) < len(high) else order[cut + 1 :]
            found += [own[k] for k in rare]
            widest = max(widest, float(steps[cut]))
    if found:
        yield Finding(
            "warning",
            "mixed-levels",
            f"frames of the same composition fall into two groups, {widest:.3g} eV an atom apart",
            frames_of(e.structure for e in found),
            "Two levels of theory, programs or references in one target: the model learns an "
            "average.",
            "Train on one of them, or shift one to the references of the other.",
            {"gap": widest, "count": len(found)},
        )


def constant_energies(file: str, frames: Sequence[InspectedFrame]) -> Iterator[Finding]:
    """Energies of a file that never change, though the frames do."""
    energies = [(e.energy, e.size) for e in frames if e.energy is not None]
    moved = len({e.positions.tobytes() for e in frames}) > 1
    if len(energies) > 2 and moved and len({energy for energy, _ in energies}) == 1:
        yield Finding(
            "warning",
            "constant-energy",
            f"all {len(energies)} energies are {energies[0][0]:.6g} eV",
            (Frames(file),),
            "The frames differ, so this is a default value and not an energy.",
            "Find the real ones; if there are none, set the weight of the energy in the loss to 0.",
        )


def check_belonging(
    dataset: InspectedDataset, steps: Mapping[str, Sequence[FrameStep]]
) -> Iterator[Finding]:
    """Files whose energies have nothing to do with their forces."""
    for file, taken in steps.items():
        near = (s for s in taken if _SAME < s.displacement <= _NEARBY)  # no copies
        known = [(s.energy, _said(s)) for s in near]
        pairs = np.array([(seen, said) for seen, said in known if said is not None])
        if len(pairs) < _FEWEST:
            continue
        seen, said = pairs.T
        apart, *sizes = np.median(np.abs([seen - said, seen, said]), axis=1)
        together = float(np.corrcoef(seen, said)[0, 1])
        if not abs(together) < _TOGETHER or apart < _APART * max(sizes):
            continue
        yield Finding(
            "warning",
            "energies-apart",
            f"between {len(pairs)} pairs of neighbouring frames the energies change by "
            f"{sizes[0]:.2g} eV, and the forces say {sizes[1]:.2g} eV, without any likeness "
            f"(correlation {together:.2f})",
            frames_of(frame.structure for frame in dataset.files[file]),
            "Energies of other frames, forces in another order of atoms, or two levels of "
            "theory: the labels contradict each other.",
            "Compare one frame with the output of its calculation.",
            {"correlation": together, "pairs": len(pairs)},
        )


def _said(step: FrameStep) -> float | None:
    """Energy change of a step by forces and stress; None if one is unknown."""
    if step.pressing == step.pressing:
        return step.work + step.pressing
    return step.work if step.strain <= 1e-6 else None


def check_outliers(
    dataset: InspectedDataset, steps: Mapping[str, Sequence[FrameStep]]
) -> Iterator[Finding]:
    """Frames whose energy their neighbours, or all of the same composition, do not believe."""
    found: dict[int, tuple[float, InspectedFrame]] = {}
    for file, frames in dataset.files.items():
        for position, off in _against_neighbours(frames, steps.get(file, ())).items():
            found[id(frames[position])] = (off, frames[position])
        for frame, off in _against_composition(frames):
            found.setdefault(id(frame), (off, frame))
    if not found:
        return
    largest = max((off for off, _ in found.values()), key=abs)
    yield Finding(
        "warning",
        "energy-outliers",
        f"{len(found)} of {len(dataset.frames)} frames have an energy that neither their forces "
        f"nor similar frames explain, off by up to {largest:+.3g} eV an atom",
        frames_of(frame.structure for _, frame in found.values()),
        "A calculation that ended in a wrong state or did not converge: a few such frames shift"
        " the baselines and dominate a squared loss.",
        "Repeat these calculations or remove the frames; a huber loss limits the damage.",
        {"frames": {f"{frame.file}:{frame.structure.index}": off for off, frame in found.values()}},
    )


def _against_neighbours(
    frames: Sequence[InspectedFrame], steps: Sequence[FrameStep]
) -> dict[int, float]:
    """Deviation of energies from those expected from neighbouring frames and work, eV/atom.

    Only what is beyond the spread of all frames, and beyond what the work itself is unsure of.
    """
    near: dict[int, list[tuple[float, float]]] = {}
    for step in steps:
        said = _said(step)
        if step.displacement > _NEARBY or said is None:
            continue
        rest = (step.energy - said) / step.atoms
        unsure = step.bend / step.atoms
        near.setdefault(step.two, []).append((rest, unsure))
        near.setdefault(step.one, []).append((-rest, unsure))
    offs = {
        k: (float(np.median([r for r, _ in own])), float(np.median([u for _, u in own])))
        for k, own in near.items()
        if len(own) >= 2
    }
    if len(offs) < 10:
        return {}
    limit = max(0.03, 20.0 * robust_spread(np.array([off for off, _ in offs.values()])))
    return {k: off for k, (off, unsure) in offs.items() if abs(off) > max(limit, 2.0 * unsure)}


def _against_composition(
    frames: Sequence[InspectedFrame],
) -> Iterator[tuple[InspectedFrame, float]]:
    """Energies far outside those of all frames with the same atoms, eV an atom."""
    groups: dict[bytes, list[InspectedFrame]] = {}
    for frame in frames:
        if frame.energy is not None and frame.size > 1:
            groups.setdefault(frame.formula, []).append(frame)
    for own in groups.values():
        if len(own) < 10:
            continue
        energies = np.array([(e.energy or 0.0) / e.size for e in own])
        off = energies - np.median(energies)
        low, high = np.quantile(energies, [0.05, 0.95])
        limit = max(0.05, 4.0 * float(high - low), 15.0 * robust_spread(energies))
        forces = [0.0 if e.forces is None else rms(e.forces) for e in own]
        hot = 1.3 * float(np.quantile(forces, 0.9))
        for frame, value, force in zip(own, off.tolist(), forces, strict=True):
            explained = value > 0 and 0.0 < hot < force  # of high energy, as its forces are
            if abs(value) > limit and not explained:
                yield frame, value
