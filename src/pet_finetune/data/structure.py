"""One atomic structure with its labels, in eV and Å, as plain tensors; the name of a set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from pet_finetune.errors import DataError
from pet_finetune.keys import LabelKind
from pet_finetune.log import get_logger

if TYPE_CHECKING:  # what only reads frames does without it
    from torch import Tensor

_logger = get_logger(__name__)
#: Where a total charge is looked for in ``atoms.info`` when the options name no key.
DEFAULT_CHARGE_KEYS = ("charge", "total_charge")
#: The same for the spin multiplicity 2S+1.
DEFAULT_SPIN_KEYS = ("spin", "spin_multiplicity", "multiplicity")


@dataclass(frozen=True, eq=False)
class Structure:
    """An immutable structure: atoms, cell, charge, spin and the reference labels it has.

    A label that is missing is absent from :attr:`labels`, never zero. NaN stands in one only where
    single numbers of a property, or forces on fixed atoms, are unknown.
    """

    #: Number of the frame within :attr:`source`, counted from 0.
    index: int
    #: The file (or other origin) the structure came from.
    source: str
    #: Atomic numbers, ``[n]`` int64.
    numbers: Tensor
    #: Positions in Å, ``[n, 3]`` float64.
    positions: Tensor
    #: Cell vectors as rows in Å, ``[3, 3]`` float64; a row is zero where not periodic.
    cell: Tensor
    #: Periodicity of the three cell vectors, ``[3]`` bool.
    pbc: Tensor
    #: Total charge in units of e.
    charge: int = 0
    #: Spin multiplicity 2S+1.
    spin: int = 1
    #: float64 labels: ``"<t>"`` (eV, no dimension), ``"<t>/forces"`` (eV/Å, ``[n, 3]``),
    #: ``"<t>/stress"`` (eV/Å³, ``[3, 3]``, ASE's sign: negative when compressed), and of other
    #: targets ``"<t>"`` with ``TargetSpec.shape``, behind ``[n]`` where it is one of atoms.
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    #: What the labels of targets that are no energies belong to, by name.
    kinds: Mapping[str, LabelKind] = field(default_factory=dict)
    #: What stands where the charge or the spin is looked for and is no whole number; else empty.
    odd: str = ""

    @property
    def num_atoms(self) -> int:
        """Number of atoms, at least 1."""
        return int(self.numbers.shape[0])

    @property
    def volume(self) -> float:
        """Cell volume in Å³; 0 where the structure is not periodic in all directions."""
        return abs(float(self.cell.det())) if bool(self.pbc.all()) else 0.0

    @property
    def where(self) -> str:
        """The structure's place as a user would look it up, e.g. ``frame 3 of train.xyz``."""
        return place(self.index, self.source)


#: What programs' rounding, and grids that are not quite symmetric, leave of :func:`asymmetry`.
ROUNDING = 0.02
#: What is said of more than that.
ASYMMETRIC = (
    "is no symmetric matrix, as a stress is: the symmetric part is taken. Look at the order of its "
    "numbers, and whether they are something else"
)


def asymmetry(values: Any) -> float:
    """Asymmetry of 9 numbers relative to the largest; 0 for other shapes."""
    if np.size(values) != 9:
        return 0.0
    matrix = np.reshape(values, (3, 3))
    return float(np.abs(matrix - matrix.T).max() / max(np.abs(matrix).max(), 1e-12))


def place(index: int, source: str = "") -> str:
    """Name of a structure in messages."""
    return f"frame {index} of {source}" if source else f"frame {index}"


def evenly_apart(count: int, most: int) -> np.ndarray:
    """At most so many of ``count`` positions, from the first to the last: ascending int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def atoms_to_structure(
    atoms: Atoms,
    index: int = 0,
    *,
    source: str = "",
    labels: Mapping[str, Tensor] | None = None,
    kinds: Mapping[str, LabelKind] | None = None,
    charge: int | None = None,
    spin: int | None = None,
    length_factor: float = 1.0,
) -> Structure:
    """Convert an ASE ``Atoms`` object; the tensors share no memory with it.

    Args:
        atoms: the ASE structure.
        index: number of the frame, kept for messages.
        source: the file it came from, kept for messages.
        labels: labels already in eV and Å.
        kinds: what the labels of targets that are no energies belong to.
        charge: total charge. Without it, what ``atoms.info`` has under one of
            ``DEFAULT_CHARGE_KEYS`` when that is an integer, else 0.
        spin: multiplicity 2S+1. Without it, the same for ``DEFAULT_SPIN_KEYS``, else 1.
        length_factor: Å per length unit of ``atoms``.

    Raises:
        DataError: no atoms, numbers that are not finite, an unknown element, or a periodic
            direction without a cell vector. Charge and multiplicity are what the file says:
            :func:`check_charges` judges them for a model that reads them.
    """
    import torch

    where = place(index, source)
    numbers = np.array(atoms.numbers, dtype=np.int64)
    positions = np.array(atoms.positions, dtype=np.float64) * length_factor
    pbc = np.array(atoms.pbc, dtype=bool)
    cell = np.where(pbc[:, None], np.asarray(atoms.cell, dtype=np.float64) * length_factor, 0.0)
    check_geometry(numbers, positions, cell, pbc, where)
    odd = []
    if charge is None:
        charge, unclear = usual_integer(atoms.info, DEFAULT_CHARGE_KEYS, 0)
        odd.append(unclear)
    if spin is None:
        spin, unclear = usual_integer(atoms.info, DEFAULT_SPIN_KEYS, 1)
        odd.append(unclear)
    return Structure(
        index=index,
        source=source,
        numbers=torch.from_numpy(numbers),
        positions=torch.from_numpy(positions),
        cell=torch.from_numpy(cell),
        pbc=torch.from_numpy(pbc),
        charge=charge,
        spin=spin,
        labels=dict(labels or {}),
        kinds=dict(kinds or {}),
        odd=", ".join(filter(None, odd)),
    )


def check_geometry(
    numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, where: str
) -> None:
    """Refuse geometries that no neighbour list can be computed for.

    Args:
        numbers: atomic numbers, ``[n]``.
        positions: ``[n, 3]`` in Å.
        cell: ``[3, 3]``, cell vectors as rows in Å.
        pbc: ``[3]`` bool.
        where: the structure, for messages.

    Raises:
        DataError: says what is wrong with it.
    """
    if numbers.size == 0:
        raise DataError(f"{where} has no atoms. Remove it from the file.")
    check_elements(numbers, where)
    if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        raise DataError(f"{where} has positions or a cell that are NaN or infinite.")
    if pbc.any() and np.linalg.matrix_rank(cell[pbc]) < int(pbc.sum()):
        axes = ", ".join(axis for axis, periodic in zip("abc", pbc, strict=True) if periodic)
        raise DataError(
            f"{where} is periodic along {axes}, but the cell vectors there are zero or linearly "
            f"dependent: {cell.tolist()}. Set the cell, or pbc to False."
        )


def check_elements(numbers: np.ndarray, where: str) -> None:
    """Refuse atomic numbers, ``[n]``, that no element has.

    Raises:
        DataError: says which.
    """
    last = len(chemical_symbols) - 1
    wrong = np.flatnonzero((numbers < 1) | (numbers > last))
    if len(wrong):
        raise DataError(
            f"{where}: atom {wrong[0]} has no chemical element (number {numbers[wrong[0]]}; "
            f"elements are 1 to {last})."
        )


def as_integer(value: Any) -> int | None:
    """Integer that a value of a file represents (``1``, ``1.0``, ``[1]``), or None."""
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError):
        return None
    return round(number) if np.isfinite(number) and abs(number - round(number)) < 1e-6 else None


def usual_integer(info: Mapping[str, Any], keys: tuple[str, ...], default: int) -> tuple[int, str]:
    """Integer under its usual names, and a description of an entry that is not an integer.

    An entry that only happens to have the name and holds something else is passed over here: it
    matters to a model that reads charge or spin, and to no other (:func:`.check_charges`).
    """
    odd = ""
    for key in keys:
        if key in info:
            value = as_integer(info[key])
            if value is not None:
                return value, ""
            odd = odd or f"{key!r} is {shown_value(info[key])}"
    return default, odd


def shown_value(value: Any) -> str:
    """A value of ``atoms.info`` for a message, on one line and not long."""
    text = " ".join(str(value).split())
    return repr(value) if isinstance(value, str) else text if len(text) <= 40 else f"{text[:37]}..."


def structures_fingerprint(structures: Iterable[Structure]) -> str:
    """SHA-256 over elements, geometry, charge, spin and labels, in order, as 64 hex digits.

    File names and frame numbers do not count: the same data under another name are the same. A set
    on disk has a way of its own.
    """
    own = getattr(structures, "fingerprint", None)
    if own is not None:
        found: str = own()
        return found
    digest = hashlib.sha256()
    for structure in structures:
        digest.update(
            f"structure {structure.num_atoms} {structure.charge} {structure.spin};".encode()
        )
        for tensor in (structure.numbers, structure.positions, structure.cell, structure.pbc):
            digest.update(_bytes(tensor))
        for name in sorted(structure.labels):
            digest.update(f"label {name};".encode())
            digest.update(_bytes(structure.labels[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Type, shape and content."""
    array = tensor.detach().cpu().contiguous().numpy()
    return f"{array.dtype.str}{array.shape};".encode() + array.tobytes()


def check_charges(structures: Sequence[Structure], max_charge: int, max_spin: int) -> None:
    """Refuse structures whose total charge or multiplicity the model has no embedding for.

    Args:
        structures: what is to be predicted or trained on.
        max_charge: largest absolute charge the model knows.
        max_spin: largest multiplicity 2S+1 the model knows.

    Raises:
        DataError: names the first such structure and how many there are; also of structures with
            something else than a whole number in the place of one of the two.
    """
    odd = [structure for structure in structures if structure.odd]
    if odd:
        raise DataError(
            f"{odd[0].where}: {odd[0].odd}, where the model reads a whole number, as the total "
            f"charge or the spin multiplicity 2S+1 ({len(odd)} of {len(structures)} structures "
            "have such values). Correct them, or name other places in `extra_data`."
        )
    for name, values, low, high in (
        ("total charge", [s.charge for s in structures], -max_charge, max_charge),
        ("spin multiplicity (2S+1)", [s.spin for s in structures], 1, max_spin),
    ):
        wrong = [index for index, value in enumerate(values) if not low <= value <= high]
        if wrong:
            raise DataError(
                f"{structures[wrong[0]].where}: the {name} is {values[wrong[0]]}, and the model "
                f"knows those from {low} to {high} ({len(wrong)} of {len(structures)} structures "
                "are outside). Remove these structures; a model trained from scratch takes its "
                "limits from max_charge and max_spin_multiplicity in architecture.model."
            )


def log_odd_charges(structures: Sequence[Structure]) -> None:
    """Say once which frames hold something else than an integer as charge or spin."""
    odd = [structure for structure in structures if structure.odd]
    if odd:
        _logger.info(
            "%s: charge or spin of %d of %d frames is not an integer (%s: %s), and not taken as "
            "the one of the structure",
            odd[0].source,
            len(odd),
            len(structures),
            place(odd[0].index),
            odd[0].odd,
        )


_SHOWN = 8


def list_frames(numbers: Iterable[int]) -> str:
    """Frame numbers as text, three or more neighbouring ones as ranges, the first few of them."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    shown = ranges[:_SHOWN]
    texts = [f"{own[0]}-{own[-1]}" if own[2:] else ", ".join(map(str, own)) for own in shown]
    hidden = sum(map(len, ranges[_SHOWN:]))
    more = f" and {hidden} more" if hidden else ""
    several = len(ranges) > 1 or len(ranges[0]) > 1
    return f"frame{'s' if several else ''} {', '.join(texts)}{more}"
