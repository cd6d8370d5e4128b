"""Status and settings in outputs of electronic-structure codes: did the SCF converge, with what?

ASE reads energies and forces and drops the status of the calculation. Here the text is searched
for what the codes write when they give up, and each such line is laid to its frame.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.units import Hartree

from pet_finetune.log import get_logger

from .formats import GAUSSIAN_ENERGY, VASP_STEP, format_of

_logger = get_logger(__name__)

#: What codes write when a self-consistent field did not converge.
_FAILED = re.compile(
    r"EDIFF was not reached \(unconverged\)"
    r"|>{5,} Convergence criterion not met|Convergence failure -- run terminated"  # Gaussian
    r"|SCF NOT CONVERGED AFTER|SCF not fully converged|wavefunction IS NOT (?:FULLY )?CONVERGED"
    r"|wavefunction not fully converged|SCF CONVERGENCE FAILURE"  # ORCA
    r"|SCF run NOT converged"  # CP2K
    r"|convergence NOT achieved"  # Quantum ESPRESSO
    r"|SELF-CONSISTENCY CYCLE DID NOT CONVERGE|Self-consistency cycle not converged"
    r"|SCF cycle not converged|s\.c\.f\. cycle (?:was )?not converged"  # FHI-aims
    r"|system has not reached the groundstate"
    r"|electronic minimisation did not converge"  # CASTEP
    r"|Calculation failed to converge"  # NWChem
    r"|Did not converge!"  # GPAW
    r"|SCF IS UNCONVERGED"  # GAMESS
    r"|was not enough SCF cycles to converge"  # ABINIT
    r"|SCC is NOT converged"  # DFTB+
)
#: Images of a nudged elastic band: the forces of VTST's OUTCAR are those of the band.
_BANDS = {"vasp-out": r"^ *NEB: Tangent", "vasp-xml": r'name="IMAGES"> *[1-9]'}
_OF_A_BAND = (
    "an image of a nudged elastic band, whose forces may be those of the band and not of the "
    "atoms: compute it once more by itself"
)
#: A piece without hydrogen and carbon that has more atoms is a crystal rather than a molecule.
_CLUSTER = 8
#: In a table of names and values (``info``, ``key_value_pairs``): false means the same.
_FLAGS = re.compile(r"(?i)(?:is_|scf_|electronic_)*converged(?:_scf|_electronic)?$")


#: Settings that change energies, by format: what a value of each looks like in the text.
_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "aims-output": {"functional": r"^ *xc +(\S+)"},
    "castep-castep": {
        "cutoff": r"plane wave basis set cut-off *: *(\S+)",
        "functional": r"using functional *: *(.*)",
    },
    "cp2k": {
        "cutoff": r"QS\| +Density cutoff \[a\.u\.\]: +(\S+)",
        "functional": r"^ FUNCTIONAL\| +([\w-]+):",
    },
    "espresso-out": {
        "cutoff": r"kinetic-energy cutoff *= *(\S+)",
        "functional": r"Exchange-correlation *= *([^(\n]*)",
    },
    "gaussian-out": {"method": r"^ *#[^\n]*?(?<!\S)([\w()+*,-]+/[\w()+*,-]+)"},
    "orca-output": {
        "basis": r"Your calculation utilizes the basis: *(\S+)",
        "functional": r"^ *Exchange Functional +Exchange +\.+ *(\S+)",
    },
    "vasp-out": {
        "ENCUT": r"^ *ENCUT *= *(\S+) eV",
        "GGA": r"^ *GGA *= *(\w+) +GGA type",
        "LDAU": r"^ *LDAU *= *(\S+)",
        "METAGGA": r"^ *METAGGA *= *(\w+)",
        "IVDW": r"^ *IVDW *= *(\d+)",
        "LHFCALC": r"^ *LHFCALC *= *(\S+)",
    },
    "vasp-xml": {
        "ENCUT": r'name="ENMAX"> *([^< ]+)',
        "GGA": r'name="GGA"> *(\w+)',
        "LDAU": r'name="LDAU"> *(\w)',
        "METAGGA": r'name="METAGGA"> *(\w+)',
        "IVDW": r'name="IVDW"> *(\d+)',
        "LHFCALC": r'name="LHFCALC"> *(\w)',
    },
}
#: Settings that VASP may print only where they are set.
_IF_SET = frozenset({"IVDW", "LDAU", "METAGGA"})
_POTENTIAL = re.compile(r"(?:TITEL *= *|<c>)((?:PAW|US)\w* +([A-Z][a-z]?)(?:_\w+)? +\w+)")
#: Characters of an output within which it says its settings.
_HEADER = 2_000_000


def settings_of(kind: str, text: str) -> dict[str, str]:
    """Settings of a calculation that change its energies, by name, as its output says them."""
    header, found = text[:_HEADER], {}
    for name, pattern in _SETTINGS.get(kind, {}).items():
        values = re.findall(pattern, header, re.M)
        if values or name in _IF_SET:
            value = values[-1].strip() if values else "F"
            found[name] = f"{float(value):g}" if re.fullmatch(r"\d+\.\d*", value) else value
    if kind.startswith("vasp"):
        found |= {f"potential of {element}": title for title, element in _POTENTIAL.findall(header)}
    return found


def is_cp2k(text: str) -> bool:
    """Whether a text is the output of CP2K, which ASE has no reader for."""
    return "CP2K|" in text[:20000]


def is_cp2k_comment(comment: str) -> bool:
    """Whether the comment of an XYZ frame is that of CP2K's trajectories."""
    return re.match(r"\s*i\s*=\s*\d+,\s*(?:time\s*=\s*[-\d.]+|E\s*=)", comment) is not None


def units_of_ipi(comment: str, atoms: Atoms) -> str:
    """Keep the unit that the comment of a frame of i-PI states, ``positions{atomic_unit}``.

    Returns:
        Why the frame is no structure: the columns hold something else; empty if it is one.
    """
    found = re.search(r"(?<![\w=])((?!cell\{)[a-z_]+)\{(\w[\w/^*-]*)\}", comment)
    if found is None:
        return ""
    if found[1] not in ("positions", "x_centroid"):
        return (
            f"this is a file of i-PI that holds {found[1]} in place of positions. Write them as "
            "labels beside the positions, in extended xyz"
        )
    atoms.info["positions-unit"] = found[2]
    return ""


def wrong_in_cp2k(source: str, atoms: Atoms) -> str:
    """Why a trajectory of CP2K is no set of molecules, with what to do; empty if it may be one.

    Its files of positions, velocities and forces look alike, and none of them says a cell.
    """
    from .calculator_input import molecules_in  # and torch, which reading does without

    moving = re.search(r"(?i)(?:^|[-_.])(frc|force|vel)", Path(source).name)
    solid = len(atoms) > _CLUSTER and not np.isin(atoms.numbers, (1, 6)).any()
    if moving is None and not solid and molecules_in(atoms) == 1:
        return ""
    what = (
        "forces or velocities stand in it in place of positions, as its name says"
        if moving
        else "it says no cell, and several molecules or a solid would be in vacuum"
    )
    return (
        f"this is a trajectory of CP2K: {what}. dpdata (cp2k/aimd_output) makes extended xyz of "
        'it, with Lattice (or write pbc="F F F" if there is no cell), energies (Hartree in these '
        "files) and forces"
    )


def hint_of(text: str, kind: str = "") -> str:
    """For a message about an output that cannot be read: its SCF failed, or it is cut off."""
    found = _FAILED.search(text)
    if found is None:
        last = format_of(kind).last_words
        if last in text:
            return ""
        return (
            f" It does not end with {last!r} as finished runs do: it is cut off. Remove what is "
            "behind its last whole step."
        )
    return f" It says on line {_line(text, found.start())}: {_whole_line(text, found)!r}."


def doubtful_frames(kind: str, text: str, frames: Sequence[Atoms]) -> dict[int, str]:
    """Frames whose labels are no converged results, with the reason.

    Args:
        kind: ASE's name of the format.
        text: of the file; empty where it is none.
        frames: as ASE read them.
    """
    found = {}
    for number, atoms in enumerate(frames):
        for key, value in atoms.info.items():
            if _FLAGS.match(str(key)) and _is_false(value):
                found[number] = f"{key} is false"
    if re.search(_BANDS.get(kind, r"(?!)"), text, re.M):
        found |= dict.fromkeys(range(len(frames)), _OF_A_BAND)
    if kind == "vasp-xml":
        found |= _vasprun(text, len(frames))
    elif kind not in ("extxyz", "xyz") and text:
        if kind == "vasp-out":
            found |= dict(_full_cycles(text))
        found |= _failures(kind, text, frames)
    if format_of(kind).frame is not None:
        found |= dict(_unfinished(frames))
    if kind == "gaussian-out" and "Input orientation:" not in text:
        found |= dict(_turned(frames))
    return found


def _turned(frames: Sequence[Atoms]) -> Iterator[tuple[int, str]]:
    """Frames of Gaussian whose forces belong to the input's axes, and positions to others."""
    for number, atoms in enumerate(frames):
        forces = {} if atoms.calc is None else atoms.calc.results
        if "forces" not in forces or atoms.pbc.any():
            continue
        arms = atoms.positions - atoms.positions.mean(axis=0)
        torques = np.cross(arms, forces["forces"])
        if np.linalg.norm(torques.sum(axis=0)) > 0.02 * np.linalg.norm(torques, axis=1).sum():
            yield (
                number,
                (
                    "its forces are along other axes than its positions (Standard orientation): "
                    "compute with NoSymm, or #P, which prints the input orientation"
                ),
            )


def _unfinished(frames: Sequence[Atoms]) -> Iterator[tuple[int, str]]:
    """Structures that lack what others have: the run ended before it came."""
    known = [set() if atoms.calc is None else set(atoms.calc.results) for atoms in frames]
    for number, results in enumerate(known):
        if "energy" not in results and any("energy" in others for others in known):
            yield number, "there is no energy for this structure, as where a run was stopped"
    *before, last = known or [set()]
    if before and "forces" not in last and all("forces" in results for results in before):
        yield len(before), "there are no forces for the last structure, as where a run was stopped"


def _failures(kind: str, text: str, frames: Sequence[Atoms]) -> dict[int, str]:
    """Lines that say that a cycle failed, by the frame they belong to."""
    lines = list(_FAILED.finditer(text))
    if not lines:
        return {}
    part_of = _parts(kind, text, frames)
    found: dict[int, str] = {}
    for line in lines:
        reason = f"line {_line(text, line.start())}: {_whole_line(text, line)!r}"
        place = line.start()
        if line[0].startswith("Convergence failure"):  # behind the energy that it is about
            energies = list(GAUSSIAN_ENERGY.finditer(text, 0, place))
            place = energies[-1].start() if energies else place
        for number in part_of(place):
            found.setdefault(number, reason)
    return found


def _parts(kind: str, text: str, frames: Sequence[Atoms]) -> Callable[[int], Sequence[int]]:
    """Which frames a place in the text belongs to; all of them where that is not clear."""
    everything = range(len(frames))
    code = format_of(kind)
    if code.frame is None or len(frames) == 1:
        return lambda place: everything
    marks = list(code.frame.finditer(text))
    if kind == "gaussian-out" and len(marks) != len(frames):
        return _by_energy(marks, frames)
    if not code.frame_ends:
        starts = [mark.start() for mark in marks]
        kept = [
            begin
            for begin, end in pairwise([*starts, len(text)])
            if code.holds is None or code.holds.search(text, begin, end)
        ]
        if len(kept) != len(frames):
            return lambda place: everything
        number = {begin: index for index, begin in enumerate(kept)}

        def begun(place: int) -> Sequence[int]:
            before = bisect.bisect_right(starts, place) - 1
            own = number.get(starts[max(before, 0)])
            return () if own is None else (own,)

        return begun
    ends_at = [mark.end() for mark in marks]
    # A run that was stopped has a part that no frame comes of.
    if not len(frames) <= len(ends_at) <= len(frames) + 1:
        return lambda place: everything

    def ended(place: int) -> Sequence[int]:
        own = bisect.bisect_left(ends_at, place + 1)
        return (own,) if own < len(frames) else ()

    return ended


def _by_energy(
    marks: Sequence[re.Match[str]], frames: Sequence[Atoms]
) -> Callable[[int], Sequence[int]]:
    """Frames by their energy: Gaussian repeats geometries, which ASE puts together."""
    ends = [mark.end() for mark in marks]
    energies = [float(m[0].split("=")[1].split()[0].replace("D", "e")) * Hartree for m in marks]
    own = [atoms.calc.results.get("energy") if atoms.calc else None for atoms in frames]

    def same(place: int) -> Sequence[int]:
        mark = bisect.bisect_left(ends, place + 1)
        if mark >= len(marks):
            return ()
        near = [k for k, e in enumerate(own) if e is not None and abs(e - energies[mark]) < 1e-6]
        return near or range(len(frames))

    return same


def _full_cycles(text: str) -> Iterator[tuple[int, str]]:
    """Steps of an OUTCAR that used all NELM iterations without a sign of convergence."""
    limit = re.search(r"\bNELM\s*=\s*(\d+);", text)
    if limit is None:
        return
    begin = 0
    for number, mark in enumerate(VASP_STEP.finditer(text)):
        part = text[begin : mark.start()]
        begin = mark.end()
        cycles = [int(k) for k in re.findall(r"Iteration +\d+\( *(\d+)\)", part)]
        if cycles and max(cycles) >= int(limit[1]) and "EDIFF is reached" not in part:
            yield number, f"all {limit[1]} iterations (NELM) were used"


def _vasprun(text: str, count: int) -> dict[int, str]:
    """Status in vasprun.xml, and steps predicted by a machine-learned force field."""
    limit = re.search(r'name="NELM">\s*(\d+)\s*<', text)
    ediff = re.search(r'name="EDIFF">\s*(\S+?)\s*<', text)
    threshold = float(ediff[1]) if ediff and re.fullmatch(r"[-+.\dEe]+", ediff[1]) else 0.0
    learned = re.search(r'name="ML_LMLFF">\s*T', text) is not None
    found = {}
    parts = text.split("<calculation>")[1:]
    for number, part in enumerate(parts[:count]):
        cycles = part.count("<scstep>")
        if limit and cycles >= int(limit[1]) and not _settled(part, threshold):
            found[number] = f"all {limit[1]} iterations (NELM) were used"
        elif learned and not cycles:
            found[number] = "predicted by VASP's machine-learned force field"
    return found


def _settled(calculation: str, threshold: float) -> bool:
    """Whether the last iteration of a step changed the energy by less than EDIFF."""
    steps = calculation.split("<scstep>")[-2:]
    pattern = re.compile(r'name="e_0_energy">\s*(-?\d+\.\d+(?:[Ee][-+]?\d+)?)\s*<')
    energies = [pattern.search(step) for step in steps]
    if len(energies) < 2 or energies[0] is None or energies[1] is None:
        return False
    return abs(float(energies[1][1]) - float(energies[0][1])) < threshold


def _is_false(value: object) -> bool:
    if isinstance(value, str):
        return value.casefold() in ("f", "false", "no")
    return isinstance(value, (bool, np.bool_, int, np.integer)) and not value


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _whole_line(text: str, found: re.Match[str]) -> str:
    begin = text.rfind("\n", 0, found.start()) + 1
    end = text.find("\n", found.end())
    line = " ".join(text[begin : end if end >= 0 else None].split())
    return line if len(line) <= 90 else " ".join(found[0].split())
