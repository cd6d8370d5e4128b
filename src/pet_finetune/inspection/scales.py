"""Evidence of units from the data alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from pet_finetune.data.neighbors import find_pairs
from pet_finetune.units import energy_to_ev

from .evidence import Evidence, digits, log_ratio
from .inspected import InspectedFrame, compositions, element_fit, rms
from .near_frames import FrameStep
from .pair_model import PairModel, displaced

#: Force constants of bonds of hydrogen, eV/Å²: slopes of the force along the bond against its
#: length in molecules and liquids (rMD17 ethanol, 3BPA, water, PBE0 molecules: 30 to 34, 42 to 46,
#: 38 to 50), which agree with those of vibrational spectra (3000, 3400 and 3600 per cm).
_BONDS = {6: ("C-H", 32.0), 7: ("N-H", 44.0), 8: ("O-H", 42.0)}
_BOND_REACH = 1.45
_FEWEST_BONDS = 20

#: Root mean square force, eV/Å, beyond which a set is not thermal: hot and compressed crystals
#: (MatterSim's high-pressure structures) stay below 4.
_LARGEST_FORCE = 8.0

#: The same of the stress times the volume of an atom, eV: the same crystals stay below 15.
_LARGEST_VIRIAL = 30.0

#: A usual bulk modulus, eV/Å³: 100 GPa; caesium has 2 GPa and diamond 440.
_BULK_MODULUS = 0.6

#: Forces of disordered atoms pull at the cell too: the deviatoric stress times the volume of an
#: atom times the root of their number, over root mean square force times nearest distance. The
#: medians of 17 published sets lie between 0.15 and 2.7, half of them between 0.25 and 0.7.
_DISORDER, _DISORDER_SIGMA = 0.45, 0.9
#: The tension that crystals withstand, times the volume of an atom, eV: in 17 published sets 95 of
#: 100 frames stay below 1.8.
_TENSION = 2.5

_STEPS, _FEWEST_STEPS = 120, 8


def evidence_of(
    frames: Sequence[InspectedFrame],
    steps: Sequence[FrameStep],
    pairs: PairModel | None = None,
    about: Collection[str] = ("energy", "force", "stress"),
) -> list[Evidence]:
    """Collect the evidence of a file on its units.

    Args:
        frames: of one file.
        steps: between neighbouring frames of it.
        pairs: the pair potential that was fitted to its forces.
        about: quantities that are asked about, of ``energy``, ``force``, ``stress``; evidence that
            speaks of none of them is left out.
    """
    found: list[Evidence | None] = []
    modelled = [] if pairs is None else pairs.evidence(frames)
    if "force" in about:
        found += [*_bonds(frames), _largest_forces(frames)]
    if {"force", "energy"} & set(about):
        found.append(_work(steps))
    if "energy" in about:
        found += [_all_electron(frames), _sizes(frames)]
    if {"energy", "stress"} & set(about):
        found.append(_pressing(steps))
    if "stress" in about:
        found += [_bulk_modulus(steps), _largest_stresses(frames), _tension(frames)]
    if {"stress", "force"} & set(about) and not any("stress" in e.powers for e in modelled):
        found.append(_disorder(frames))
    found += [piece for piece in modelled if set(about) & set(piece.powers)]
    return [piece for piece in found if piece is not None]


def _compare(energies: np.ndarray, works: np.ndarray, quantity: str, of: str) -> Evidence | None:
    """Energy differences against their expected values."""
    if len(works) < _FEWEST_STEPS or not works.any() or not energies.any():
        return None
    log, sigma, sign = log_ratio(energies, works, 0.12)
    text = (
        f"between {len(works)} pairs of neighbouring frames the energy changes by "
        f"{digits(np.exp(log) * (sign or 1))} times the work of the {of} (1 expected)"
    )
    return Evidence({"energy": -1.0, quantity: 1.0}, log, sigma, text, sign)


def _work(steps: Sequence[FrameStep]) -> Evidence | None:
    """Energies against the work of the forces, where the cell hardly changes."""
    usable = [s for s in steps if s.displacement > 1e-4 and s.strain < 2e-3]
    chosen = sorted(usable, key=lambda step: step.displacement)[:_STEPS]
    energies = np.array([s.energy / s.atoms for s in chosen])
    works = np.array([s.work / s.atoms for s in chosen])
    return _compare(energies, works, "force", "forces")


def _pressing(steps: Sequence[FrameStep]) -> Evidence | None:
    """Energies against the work of the stress, where the atoms hardly move within the cell."""
    usable = [
        s
        for s in steps
        if s.strain > 2e-3 and s.pressing == s.pressing and s.displacement < 0.25 * s.strain
    ]
    energies = np.array([(s.energy - s.work) / s.atoms for s in usable])
    works = np.array([s.pressing / s.atoms for s in usable])
    if not works.any():
        return None
    # Copies of a frame that are turned by a symmetry of the crystal differ by no energy.
    told = np.abs(works) > 0.05 * np.quantile(np.abs(works), 0.9)
    return _compare(energies[told], works[told], "stress", "stress")


def _all_electron(frames: Sequence[InspectedFrame]) -> Evidence | None:
    """Energies against those of all electrons of the atoms, for molecules without a cell.

    The sum over atoms of the Thomas-Fermi energy with the corrections of Scott and Schwinger,
    -0.768745 Z^(7/3) + Z^2/2 - 0.269900 Z^(5/3) Hartree (Englert and Schwinger, Phys. Rev. A 32
    (1985) 26), is within 2 % of the total energy of molecules. Energies that are near it in one of
    the units are taken to be total energies of all electrons; others say nothing.
    """
    ratios = []
    for frame in frames:
        if frame.energy is None or frame.pbc.any() or frame.numbers.max() < 3:
            continue
        z = frame.numbers.astype(float)
        hartree = -0.768745 * z ** (7 / 3) + z**2 / 2 - 0.269900 * z ** (5 / 3)
        ratios.append(frame.energy / (float(hartree.sum()) * energy_to_ev("Hartree")))
    if len(ratios) < 3:
        return None
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    if middle <= 0.0 or high - low > 0.03 * middle:
        return None
    log = float(np.log(middle))
    # Not in Ry: the energies of valence electrons alone happen to be near that in eV.
    units = ("eV", "kcal/mol", "kJ/mol", "Hartree")
    if all(abs(log + np.log(energy_to_ev(unit))) > 0.03 for unit in units):
        return None
    text = (
        f"the energies are {digits(middle)} times the total energies in eV that atoms with all "
        "their electrons have (1 expected)"
    )
    return Evidence({"energy": -1.0}, log, 0.03, text, absolute=True)


def _sizes(frames: Sequence[InspectedFrame]) -> Evidence | None:
    """Evidence on total or per-atom energies from their growth with the number of atoms.

    A sum over elements is fitted to the energies of atoms and, as if these were per atom already,
    to the energies as they stand: one of the two leaves much less over.
    """
    known = [e for e in frames if e.energy is not None and e.size > 1]
    sizes = np.array([float(e.size) for e in known])
    if len(known) < _FEWEST_STEPS or np.log(sizes).std() < 0.15:
        return None
    elements = sorted({int(z) for e in known for z in e.elements[0]})
    if len(known) < 2 * np.linalg.matrix_rank(compositions(known, elements)) + 4:
        return None
    energies = np.array([e.energy or 0.0 for e in known])
    left = []
    for values in (energies / sizes, energies):
        rest = np.median(np.abs(element_fit(known, values)[2]))
        left.append(max(1e-9, float(rest)) / max(1e-9, float(np.median(np.abs(values)))))
    text = (
        "as energies of whole structures they are explained by a sum over the elements "
        f"{digits(left[0] / left[1])} times as badly as if they were per atom (below 1 expected)"
    )
    return Evidence({"energy": 0.0}, float(np.log(left[0] / left[1])), 0.5, text, one_sided=True)


def _bonds(frames: Sequence[InspectedFrame]) -> Iterator[Evidence]:
    """Force constants of bonds of hydrogen, from the forces along them."""
    lengths: dict[int, list[np.ndarray]] = {element: [] for element in _BONDS}
    pulls: dict[int, list[np.ndarray]] = {element: [] for element in _BONDS}
    for frame in frames[:: max(1, len(frames) // 300)]:
        if frame.forces is None or not (frame.numbers == 1).any():
            continue
        atom, other, vector, distance = find_pairs(
            frame.positions, frame.cell, frame.pbc, _BOND_REACH, "ijDd", full=True,
            where=frame.structure.where,
        )  # fmt: skip
        alone = np.bincount(atom, minlength=frame.size)[atom] == 1
        for element in _BONDS:
            bonds = alone & (frame.numbers[atom] == 1) & (frame.numbers[other] == element)
            along = (frame.forces[atom[bonds]] * vector[bonds]).sum(axis=1) / distance[bonds]
            lengths[element].append(distance[bonds])
            pulls[element].append(along)
    for element, (name, usual) in _BONDS.items():
        length = np.concatenate([*lengths[element], np.zeros(0)])
        pull = np.concatenate([*pulls[element], np.zeros(0)])
        if len(length) < _FEWEST_BONDS or length.std() < 5e-3 or pull.std() == 0.0:
            continue
        correlation = abs(float(np.corrcoef(length, pull)[0, 1]))
        if correlation < 0.8:
            continue  # bonds of many kinds, or hardly any vibration
        constant = float(np.polyfit(length, pull, 1)[0])
        log = float(np.log(abs(constant) / usual))
        text = (
            f"the force constant of {name} bonds is {digits(constant)} eV/A^2 (about "
            f"{usual:.0f} expected)"
        )
        sigma = 0.3 if correlation > 0.9 else 0.5
        yield Evidence({"force": -1.0}, log, sigma, text, 1 if constant > 0 else -1)


def _largest_forces(frames: Sequence[InspectedFrame]) -> Evidence | None:
    """Forces far larger than any thermal ones."""
    squares = [(e.forces**2).mean() for e in frames if e.forces is not None]
    return _too_large("force", squares, _LARGEST_FORCE, "force", "eV/A")


def _too_large(
    kind: str, squares: Sequence[float], most: float, what: str, unit: str
) -> Evidence | None:
    size = float(np.sqrt(np.mean(squares))) if squares else 0.0
    if size <= most:
        return None
    text = f"the root mean square {what} is {digits(size)} {unit} (below {most:g} expected)"
    return Evidence({kind: -1.0}, float(np.log(size / most)), 0.3, text, one_sided=True)


def _bulk_modulus(steps: Sequence[FrameStep]) -> Evidence | None:
    """Evidence from the bulk modulus, which cannot be negative."""
    usable = [s for s in steps if abs(s.swelling) > 2e-3 and s.pressure == s.pressure]
    usable = [s for s in usable if s.displacement < 0.1]
    if len(usable) < _FEWEST_STEPS:
        return None
    moduli = np.array([s.pressure / s.swelling for s in usable])
    middle = float(np.median(moduli))
    if middle == 0.0:
        return None
    positive = float((moduli > 0).mean())
    sign = 1 if positive > 0.75 else -1 if positive < 0.25 else 0
    text = (
        f"the stress changes with the logarithm of the volume by {digits(middle)} eV/A^3 (a bulk "
        "modulus, 0.01 to 3 expected)"
    )
    return Evidence({"stress": -1.0}, float(np.log(abs(middle) / _BULK_MODULUS)), 1.2, text, sign)


def _largest_stresses(frames: Sequence[InspectedFrame]) -> Evidence | None:
    """Stresses far larger than any that crystals withstand."""
    squares = [
        (e.stress**2).mean() * (e.volume / e.size) ** 2 for e in frames if e.stress is not None
    ]
    what = "stress times the volume of an atom"
    return _too_large("stress", squares, _LARGEST_VIRIAL, what, "eV")


def _disorder(frames: Sequence[InspectedFrame]) -> Evidence | None:
    """Stresses against estimates from forces and distances.

    The shear of a cell of displaced atoms is a sum of random pulls, each a force times a distance.
    """
    ratios = []
    for frame in frames:
        if frame.forces is None or frame.stress is None or frame.size < 2 or not displaced(frame):
            continue
        force, near = rms(frame.forces), float(np.median(frame.nearest))
        shear = frame.stress - np.trace(frame.stress) / 3.0 * np.eye(3)
        virial = float(np.sqrt((shear**2).sum() / 5.0)) * frame.volume
        ratios.append(virial / np.sqrt(frame.size) / (force * near))
    if len(ratios) < _FEWEST_STEPS:
        return None
    middle = float(np.median(ratios))
    if middle < 1e-12:
        return None
    text = (
        f"the shear stress is {digits(middle)} times what forces and distances make of it (0.1 to "
        "4 expected)"
    )
    log = float(np.log(middle / _DISORDER))
    return Evidence({"stress": -1.0, "force": 1.0}, log, _DISORDER_SIGMA, text)


def _tension(frames: Sequence[InspectedFrame]) -> Evidence | None:
    """Crystals torn apart by more than any withstands, if the sign is right, and if it is not."""
    pulls = np.array(
        [
            np.linalg.eigvalsh(e.stress)[[0, -1]] * e.volume / e.size
            for e in frames
            if e.stress is not None
        ]
    )
    if len(pulls) < 3:
        return None
    most = float(np.quantile(pulls[:, 1], 0.95))
    pressed = float(np.quantile(-pulls[:, 0], 0.95))
    if most <= _TENSION:
        return None
    text = (
        f"tension times the volume of an atom reaches {digits(most)} eV (below {_TENSION:g} "
        "expected)"
    )
    log, turned = (float(np.log(max(v, 1e-6) / _TENSION)) for v in (most, pressed))
    return Evidence({"stress": -1.0}, log, 0.3, text, one_sided=True, turned=turned)
