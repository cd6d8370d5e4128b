"""Additional data of a structure, kept in the files of a simulation.

Masses, constraints, initial charges and magnetic moments, tags, custom arrays and ``info`` decide
the dynamics or tell the user what an atom is. ASE's two formats keep different parts of it:
``.traj`` loses custom arrays, extended XYZ all constraints but those of single coordinates, and
arrays and text that its grammar cannot hold. The functions here add what is missing.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable
from io import StringIO
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, dict2constraint
from ase.data import atomic_masses
from ase.io.jsonio import decode, encode

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

_logger = get_logger(__name__)

#: Key of ``info`` with the constraints that a column of extended XYZ cannot say.
CONSTRAINTS = "constraints"
#: Key of ``info`` in a ``.traj`` with what that format has no place for.
_BESIDE = "pet_finetune_beside"

#: Columns of masses, as programs call them.
_MASSES = ("masses", "mass", "atomic_masses", "atomic_mass")
#: Columns of velocities, in Å/fs, Å/ps or units of ASE, as the program has it.
_VELOCITIES = ("velo", "vel", "velocity", "velocities")
#: Times the mass of the element: hydrogens are made heavy, no atom is a hundred times heavier.
_HEAVIEST, _LIGHTEST = 100.0, 0.02

#: Names of what was computed for one geometry, and is wrong beside another.
_LABEL = re.compile(
    r"energ|force|stress|virial|gradient|hessian|dipole|quadrupole|polari[sz]ab|uncertaint"
    r"|pressure|band_?gap|^velo?(cit(y|ies))?$|^d?(e|f|u|e0|etot|e_tot|epot|toten|homo|lumo)$",
    re.IGNORECASE,
)
#: Arrays of ASE that are written anyway, and results that its reader takes out of columns.
_WRITTEN = frozenset({"numbers", "positions", "momenta"})
_RESULTS = frozenset({"charges", "magmoms", "energies", "stresses", "magmom", "free_energy"})
#: Of a frame of an earlier simulation; each frame has its own.
_OF_STEP = frozenset({"step", "time_fs", "temperature_K", CONSTRAINTS})


def carried(atoms: Atoms) -> tuple[Atoms, list[str]]:
    """A structure with all it carries that is true of every frame and that extended XYZ can hold.

    Returns:
        A copy without calculator; and the names of what was left out: results that were computed
        for this geometry, and what the format cannot hold.
    """
    out = Atoms(
        atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc,
        constraint=[constraint.copy() for constraint in atoms.constraints],
    )  # fmt: skip
    left = []
    for name, array in atoms.arrays.items():
        if name in _WRITTEN:
            continue
        if name in _RESULTS or _LABEL.search(name) or not _survives(atoms, name, array):
            left.append(name)
        else:
            out.set_array(name, array)
    for key, value in atoms.info.items():
        if key in _OF_STEP:
            continue
        result = not isinstance(key, str) or key in _RESULTS or _LABEL.search(key)
        kept = None if result else _as_text(key, value)
        if kept is None:
            left.append(str(key))
        else:
            out.info[key] = kept[0]
    others = [c for c in atoms.constraints if not isinstance(c, (FixAtoms, FixCartesian))]
    if others:
        out.info[CONSTRAINTS] = _as_json([constraint.todict() for constraint in others])
    return out, left


def _survives(atoms: Atoms, name: str, array: np.ndarray) -> bool:
    """Whether a column comes back from extended XYZ, to its eight decimals."""
    probe = Atoms(atoms.numbers, atoms.positions)
    try:
        probe.set_array(name, array)
        back = _through_xyz(probe).arrays[name]
    except Exception:  # noqa: BLE001 - ASE's reader and writer raise whatever they meet
        return False
    if back.shape != array.shape:
        return False
    if array.dtype.kind == "f":
        largest = float(np.abs(array).max(initial=0.0, where=np.isfinite(array)))
        return np.allclose(back, array, rtol=1e-8, atol=min(1e-8, 1e-4 * largest), equal_nan=True)
    return bool((back == array).all())


def _as_text(key: str, value: Any) -> tuple[Any] | None:
    """A value as extended XYZ gives it back, as JSON where need be; None where nothing does."""
    candidates = [value]
    with contextlib.suppress(TypeError, ValueError, RuntimeError, RecursionError):
        candidates.append(_as_json(value))
    for candidate in candidates:
        probe = Atoms("H", info={key: candidate})
        try:
            back = _through_xyz(probe).info
        except Exception:  # noqa: BLE001 - as above
            continue
        if list(back) == [key] and _same(back[key], value):
            return (candidate,)
    return None


def _as_json(value: Any) -> str:
    """Text that ASE's reader of extended XYZ takes for JSON; it reads one level of backslashes."""
    text: str = encode(value)
    return "_JSON " + text.replace("\\", "\\\\")


def _through_xyz(atoms: Atoms) -> Atoms:
    stream = StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that it skips, which is what is asked here
        ase.io.write(stream, atoms, format="extxyz")
    stream.seek(0)
    back = ase.io.read(stream, format="extxyz")
    assert isinstance(back, Atoms)
    return back


def _same(one: Any, other: Any) -> bool:
    """Equal; a list and an array of the same numbers are."""
    if isinstance(one, np.ndarray | np.generic) or isinstance(other, np.ndarray | np.generic):
        first, second = np.asarray(one), np.asarray(other)
        return first.dtype.kind == second.dtype.kind and np.array_equal(first, second)
    return type(one) is type(other) and bool(one == other)


def to_traj(atoms: Atoms) -> Atoms:
    """A copy that ``.traj`` keeps whole; :func:`from_ase` is the way back."""
    out = atoms.copy()
    out.calc = None
    of_format = {*_WRITTEN, "masses", "tags", "initial_charges", "initial_magmoms"}
    beside: dict[str, Any] = {
        "arrays": {name: a for name, a in atoms.arrays.items() if name not in of_format},
        "celldisp": np.array(atoms.get_celldisp()),
    }
    if beside["arrays"] or beside["celldisp"].any():
        out.info[_BESIDE] = beside
    return out


def from_ase(atoms: Atoms, where: str) -> Atoms:
    """A structure as it was, from what a reader of ASE makes of a file.

    Puts back what :func:`to_traj` and :func:`carried` took apart, and reads a column of masses
    under its usual names, in atomic mass units.

    Raises:
        DataError: masses that no atoms have, or constraints that cannot be made.
    """
    beside = atoms.info.pop(_BESIDE, None)
    if beside is not None:
        for name, array in beside["arrays"].items():
            atoms.set_array(name, np.asarray(array))
        atoms.set_celldisp(beside["celldisp"])
    _read_masses(atoms, where)
    moving = [n for n in atoms.arrays if n.lower() in _VELOCITIES and "momenta" not in atoms.arrays]
    if moving:
        _logger.warning(
            "%s: the column '%s' does not say its unit and is not read. Write velocities as "
            "momenta (in ASE: atoms.set_velocities), or let them be drawn",
            where,
            moving[0],
        )
    if CONSTRAINTS in atoms.info:
        stored = atoms.info.pop(CONSTRAINTS)
        try:
            found = [dict2constraint(one) for one in decode(json.dumps(stored))]
        except Exception as error:  # ASE's constraints raise whatever they meet
            raise DataError(
                f"{where}: the constraints in it ('{CONSTRAINTS}' of the comment line) cannot be "
                f"made ({error}). Take the key out, and give the constraints in an ASE .traj file."
            ) from error
        atoms.set_constraint([*atoms.constraints, *found])
    atoms.set_constraint(_gathered(atoms.constraints))
    return atoms


def _read_masses(atoms: Atoms, where: str) -> None:
    name = next((name for name in _MASSES if name in atoms.arrays), None)
    if name is None:
        return
    masses = atoms.arrays.pop(name)
    try:
        values = np.asarray(masses, dtype=np.float64)
        ratio = values / atomic_masses[atoms.numbers]
        wrong = ~((ratio > _LIGHTEST) & (ratio < _HEAVIEST))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: the column '{name}' holds no masses ({error}).") from error
    if values.shape != (len(atoms),):
        raise DataError(f"{where}: the column '{name}' has {values.shape[1:]} numbers an atom.")
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{where}: atom {first} ({atoms[first].symbol}) has the mass {values[first]:g} in the "
            f"column '{name}', and {atomic_masses[atoms.numbers[first]]:.3f} is usual. Masses are "
            "in atomic mass units (g/mol): convert them, or take the column out."
        )
    atoms.set_masses(values)


def _gathered(constraints: Iterable[Any]) -> list[Any]:
    """Constraints with one per mask instead of ASE's one per atom."""
    given, others = list(constraints), []
    masks = [tuple(map(bool, c.mask)) for c in given if isinstance(c, FixCartesian)]
    if len(set(masks)) == len(masks):
        return given
    indices: dict[tuple[bool, ...], list[int]] = {}
    for constraint in given:
        if isinstance(constraint, FixCartesian):
            key = tuple(map(bool, constraint.mask))
            if any(key):
                indices.setdefault(key, []).extend(int(i) for i in constraint.index)
        else:
            others.append(constraint)
    whole = indices.pop((True, True, True), None)
    gathered: list[Any] = [FixAtoms(sorted(set(whole)))] if whole else []
    gathered += [FixCartesian(sorted(set(found)), mask) for mask, found in indices.items()]
    return [*gathered, *others]
