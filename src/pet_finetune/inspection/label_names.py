"""Names of labels in a file: which are taken for which label, and which may be meant instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.label_columns import LABEL_SHAPES, find_value, fits, names_in, to_stress
from pet_finetune.data.structure_sets import evenly_spread

from .inspected import Finding, Frames

#: Words in a name, without that of the label itself, which say that it is another quantity.
_OTHER = re.compile(
    r"per_?a|_pa(_|$)|/|norm|form|hull|above|decomp|band|gap|bind|bond|free|atomi[sz]|cohes|coh(_|$)"
    r"|interact|adsor|ads(_|$)|disp|d3|vdw|zero|zpe|zpve|kin|therm|corr|xc|exch|coul|hartree_|elec"
    r"|nuc|ewald|fermi|homo|lumo|ioni[sz]|affin|strain|defect|surf|migrat|barrier|activ|react|relat"
    r"|shift|offset|ref_?atom|isolated|baseline|std|var|unc|err|resid|diff|delta|weight|mask|unit"
    r"|sigma|cutoff|toler|thresh|conver|pred|mean|_id(_|$)|internal|enthal|entrop|gibbs|pot_?ham|solv|embed|vib|rot|trans"
)
#: eV an atom by which energy and free energy may differ without a word.
_FREE_GAP = 1e-3
#: Columns of three numbers an atom that are known and no forces.
_NO_FORCES = frozenset({"positions", "momenta", "velocities", "velo", "vel", "dipoles", "magmoms"})


def target_of_file(
    path: str | Path, format: str = "", types: Mapping[int, str] | None = None
) -> tuple[dict[str, Any], list[Finding]]:
    """The section of an energy target that fits the names in a file.

    Raises:
        DataError: the file cannot be read.
    """
    frames = evenly_spread(read_frames(path, format, types))
    keys: dict[str, str | None] = {}
    findings: list[Finding] = []
    passed: list[str] = []
    for kind in LABEL_SHAPES:
        own, others = _find_keys(frames, kind, keys.get("energy") or "")
        keys[kind] = own[0] if own else None
        if kind == "energy":
            passed = others
        if len(own) > 1:
            findings.append(_several(str(path), kind, own))
    if keys["energy"] is None:
        names = ", ".join(names_in(frames[0])) or "nothing but the structure"
        if passed:
            names += f" (of which {', '.join(passed)} is no total energy by its name)"
        findings.append(
            Finding(
                "warning" if keys["forces"] else "error",
                "no-energy",
                f"no frame has an energy; there is: {names}",
                (Frames(str(path)),),
                "Forces alone can be learned; the energy offset stays the foundation's."
                if keys["forces"]
                else "Training needs an energy.",
                "If there is one, name it with targets.energy.key in an options file.",
            )
        )
    for kind, key in keys.items():
        if key is not None and key != kind and not any(_asks(f, kind) for f in findings):
            but = (
                f" ({', '.join(passed)} is no total energy)" if kind == "energy" and passed else ""
            )
            findings.append(
                Finding(
                    "note",
                    "other-key",
                    f"there is no '{kind}', but '{key}', which is taken for it{but}",
                    (Frames(str(path)),),
                    "Options that do not name it would not find it.",
                    f"Set {'key' if kind == 'energy' else kind + '.key'}: {key} for the target.",
                    {"kind": kind, "key": key},
                )
            )
    findings += _beside(frames, str(path), keys)
    section: dict[str, Any] = {"key": keys["energy"] or "energy", "unit": "eV"}
    for kind in ("forces", "stress", "virial"):
        if keys[kind] is not None and not (kind == "virial" and keys["stress"] is not None):
            section[kind] = {"key": keys[kind], "mode": "auto"}
        else:
            section[kind] = "off"
    return section, findings


def _beside(
    frames: Sequence[Atoms], file: str, keys: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Notes on unused values that may be labels: other totals, columns like forces."""
    for kind, key in keys.items():
        others = [
            name
            for name in _candidates(frames, kind)[0]
            if key == kind and name != kind and not _same_values(frames, kind, name)
        ]
        if others:
            yield Finding(
                "warning" if kind == "energy" else "note",
                "other-labels",
                f"beside '{kind}' there are {', '.join(map(repr, others))} with other values; "
                f"'{kind}' is taken",
                (Frames(file),),
                "If one of them is the reference, the model would learn something else.",
                f"If so, name it as {_option(kind)} of the target in an options file.",
                {"kind": kind, "keys": others},
            )
    gap = max((_free_gap(atoms) for atoms in (frames[0], frames[-1])), default=0.0)
    if keys["energy"] == "energy" and gap > _FREE_GAP:
        yield Finding(
            "note",
            "free-energy",
            f"'free_energy' differs from 'energy' by up to {1000 * gap:.3g} meV an atom",
            (Frames(file),),
            "The forces are derivatives of the free energy of the smeared electrons; 'energy' is "
            "extrapolated to no smearing.",
            "For MD, key: free_energy of the target is consistent with the forces.",
            {"gap": gap},
        )
    if keys["stress"] and keys["virial"] and not _agree(frames, keys["stress"], keys["virial"]):
        yield Finding(
            "warning",
            "other-labels",
            f"'{keys['stress']}' and '{keys['virial']}' contradict each other: a virial is the "
            f"negative of stress times volume; '{keys['stress']}' is taken",
            (Frames(file),),
            "One of them has another unit or another sign.",
            "Find out which is right; `stress: off` and `virial: {key: ...}` use the other one.",
            {"kind": "stress", "keys": [keys["virial"]]},
        )
    if keys["forces"] is None and keys["energy"] is not None:
        columns = [name for name in frames[0].arrays if _like_forces(frames[0], name)]
        if columns:
            yield Finding(
                "note",
                "other-columns",
                f"no column is called forces; of atoms there is: {', '.join(columns)}",
                (Frames(file),),
                "They are not read. A gradient is the negative of the forces, and three columns of "
                "one number each are no forces yet.",
                "If they hold forces, write them as one column 'forces' of three numbers (of a "
                "gradient, with the sign changed), or name it: targets.energy.forces.key.",
                {"columns": columns},
            )


def _agree(frames: Sequence[Atoms], stress: str, virial: str) -> bool:
    """Whether virial and stress agree, in the first and the last frame with both."""
    for atoms in (frames[0], frames[-1]):
        values = [find_value(atoms, name) for name in (stress, virial)]
        if any(value is None for value in values) or atoms.cell.rank != 3:
            continue
        one, two = (to_stress(np.asarray(v, dtype=np.float64), len(atoms)) for v in values)
        if not np.allclose(-one * atoms.cell.volume, two, rtol=0.01, atol=1e-3 * np.abs(two).max()):
            return False
    return True


def _free_gap(atoms: Atoms) -> float:
    """Difference of free energy and energy, eV per atom; 0 if one is missing."""
    energy, free = find_value(atoms, "energy"), find_value(atoms, "free_energy")
    if not isinstance(energy, int | float) or not isinstance(free, int | float):
        return 0.0
    return abs(free - energy) / max(len(atoms), 1)


def _like_forces(atoms: Atoms, name: str) -> bool:
    """Whether a column of numbers has the shape of forces, or of a component of them."""
    values = atoms.arrays[name]
    if name in _NO_FORCES or values.dtype.kind != "f":
        return False
    component = (
        re.fullmatch(r"(?i)(?:d[ft]t_|ref_)?(?:f|force|grad)\w?[_-]?[xyz]", name) is not None
    )
    return values.shape == (len(atoms), 3) or component


def _option(kind: str) -> str:
    return "key" if kind == "energy" else f"{kind}.key"


def _asks(finding: Finding, kind: str) -> bool:
    return finding.code == "several-labels" and (finding.data or {}).get("kind") == kind


def _several(file: str, kind: str, keys: Sequence[str]) -> Finding:
    """The question which of several names is meant."""
    return Finding(
        "error",
        "several-labels",
        f"there is no '{kind}', but {', '.join(repr(key) for key in keys)}, whose values differ; "
        f"'{keys[0]}' is looked at here",
        (Frames(file),),
        "Only you can know which one is the label.",
        f"Choose one as {_option(kind)} of the target in an options file.",
        {"kind": kind, "keys": list(keys)},
    )


def _find_keys(frames: Sequence[Atoms], kind: str, energy: str = "") -> tuple[list[str], list[str]]:
    """Names that a label may have: its own one, else all that contain it and fit.

    Of several that go with the name of the energy (``REF_forces`` with ``REF_energy``) that one,
    and of names with the same values the first.

    Returns:
        The candidates, and names that were passed over because they say something else.
    """
    if any(find_value(atoms, kind) is not None for atoms in frames):
        return [kind], []
    stem = kind.rstrip("s")
    found, passed = _candidates(frames, kind)
    partner = [
        name
        for name in found
        if energy
        and name.rstrip("s")
        == energy.replace("energy", stem)
        .replace("Energy", stem.capitalize())
        .replace("ENERGY", stem.upper())
    ]
    if partner:
        return partner[:1], passed
    distinct: list[str] = []
    for name in found:
        if not any(_same_values(frames, name, other) for other in distinct):
            distinct.append(name)
    return distinct, passed


def _candidates(frames: Sequence[Atoms], kind: str) -> tuple[list[str], list[str]]:
    """Names that contain that of a label: suitable ones, and others.

    The first and the last frame are looked at.
    """
    stem = kind.rstrip("s")
    found: list[str] = []
    passed: list[str] = []
    for atoms in (frames[0], frames[-1]):
        for name in names_in(atoms):
            if stem not in name.casefold() or not fits(atoms, name, LABEL_SHAPES[kind]):
                continue
            words = name.casefold().replace(stem, " ").replace("-", "_")
            (passed if _OTHER.search(words) else found).append(name)
    return list(dict.fromkeys(found)), list(dict.fromkeys(passed))


def _same_values(frames: Sequence[Atoms], one: str, two: str) -> bool:
    """Whether two names hold the same numbers, in the first and the last frame."""
    for atoms in (frames[0], frames[-1]):
        values = [find_value(atoms, name) for name in (one, two)]
        if any(value is None for value in values):
            return False
        if not np.array_equal(np.asarray(values[0]), np.asarray(values[1])):
            return False
    return True
