"""Checks of the labels, frame by frame: missing, constant, absurd, or against mechanics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .inspected import Finding, Frames, InspectedDataset, InspectedFrame, frames_of, rms

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
        yield from _constant_energies(file, own)
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


def _constant_energies(file: str, frames: Sequence[InspectedFrame]) -> Iterator[Finding]:
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
    forced = [e for e in dataset.frames if e.forces is not None and e.size > 1]
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
    """The same for the torque about the centre, eV/Å."""
    assert frame.forces is not None
    arms = frame.positions - frame.positions.mean(axis=0)
    torque = float(np.linalg.norm(np.cross(arms, frame.forces).sum(axis=0)))
    return torque / max(1e-9, float(np.sqrt(2.0 * (arms**2).sum())))
