"""Outputs of electronic-structure codes where ASE reads something else than they say.

A text is put right before ASE reads it, frames after it. Each function names what ASE makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree

from pet_finetune.errors import DataError
from pet_finetune.log import get_logger

from .formats import VASP_STEP
from .text import Content

_logger = get_logger(__name__)


def put_right(content: Content) -> str:
    """The text of a file as ASE has to see it.

    Raises:
        DataError: ASE would read another structure.
    """
    kind, text, source = content.kind, content.text, content.source
    if kind == "orca-output":  # ASE knows the older words, and takes the newer ones for a number
        return text.replace("(SCF not fully converged!)", "(Wavefunction not fully converged!)")
    if kind == "espresso-out":  # of hybrid functionals: the energy has two marks, and ASE wants one
        return _with_elements(text.replace("!!   total energy", "!    total energy"), source)
    if kind == "gaussian-out":
        return _OF_FORCES.sub(r" SCF Done:  E(\1) = \2 A.U.", text)
    if kind == "aims-output":
        return _with_cells(text)
    if kind == "abinit-out":
        return _with_acell(text, source)
    if kind == "nwchem-out" and "Output coordinates in a.u." in text and _GRADIENT not in text:
        raise DataError(
            f"{source} has its geometry in Bohr, which ASE takes for Å. Write it as extended xyz, "
            "or compute with `geometry units angstroms`."
        )
    return text


#: With it come the positions that they belong to, whose unit is known.
_GRADIENT = "ENERGY GRADIENTS"
#: Energies of excited states and of several layers, to which the forces belong that follow: ASE
#: reads that of the ground state, or of a layer.
_OF_FORCES = re.compile(
    r"^ *(?:Total Energy, E\(|(?=ONIOM: extrapolated))([^\n)=]+)\)? *= *(-?\d+\.\d+\S*)", re.M
)

_SPECIES = re.compile(r"^ +([\w-]+)(?: +\d+\.\d+){2} +([A-Z][a-z]?) *\( *1\.00\)$", re.M)


def _with_elements(text: str, source: str) -> str:
    """ASE takes the label ``Os`` of Quantum ESPRESSO for osmium, also with oxygen's potential."""
    for label, element in set(_SPECIES.findall(text)):
        if label[:2].capitalize() in set(chemical_symbols) - {element}:
            _logger.info("%s: atoms labelled %s are %s", source, label, element)
            row = rf"^( *(?:\d+ +)?){re.escape(label)}(?= +(?:tau\(|-?\d*\.\d))"
            text = re.sub(row, rf"\g<1>{element}", text, flags=re.M)
    return text


_AIMS_CELL = re.compile(r"^ *\| Unit cell: *\n((?: *\|(?: +\S+){3} *\n){3})", re.M)
_AIMS_STEP = re.compile(
    r"^ *Atomic structure \(and velocities\) as used in the preceding time step:[^\n]*\n", re.M
)


def _with_cells(text: str) -> str:
    """FHI-aims says the cell of MD once, and ASE makes molecules of the steps."""
    cell = _AIMS_CELL.search(text)
    if cell is None:
        return text
    vectors = "".join(f"  lattice_vector   {row.strip(' |')}\n" for row in cell[1].splitlines())
    return _AIMS_STEP.sub(lambda step: step[0] + vectors, text)


_ABINIT_CELL = re.compile(r"^ *R\([123]\)=((?: +[-+.\dEe]+){3})", re.M)


def _with_acell(text: str, source: str) -> str:
    """ASE takes ``rprim`` of ABINIT for vectors in Å: the vectors that are printed replace it.

    Raises:
        DataError: the cell was relaxed, and the vectors are not those of the labels.
    """
    if re.search(r"^ *optcell\d* +[1-9]", text, re.M):
        raise DataError(
            f"{source}: ABINIT relaxed the cell (optcell), and ASE reads the one it began with. "
            "Compute the last structure once more with a fixed cell, or write extended xyz."
        )
    rows = _ABINIT_CELL.findall(text)[:3]
    echo = re.search(r"echo values of preprocessed input variables[\s\S]*?^(?=.*={15})", text, re.M)
    if len(rows) < 3 or echo is None:
        return text
    numbers = " ".join(f"{float(number) * Bohr:.10f}" for row in rows for number in row.split())
    return f"{text[: echo.end()]}  rprim {numbers}\n{text[echo.end() :]}"


_LEARNED = re.compile(
    r"^[^\n]*(?:\bML FORCE on cell|TOTAL-FORCE \(eV/Angst\) \(ML\)).*?"
    r"^[^\n]*\bML energy +without entropy[^\n]*\n(?:\s*\n[^\n]*enthalpy is ML TOTEN[^\n]*\n)?",
    re.M | re.S,
)
_WITHOUT_VDW = re.compile(r"(?: eV)?\s+w/o vdW\s*=\s*\S+(?: eV)?")


def clean_outcar(text: str, source: str) -> str:
    """An OUTCAR without what ASE takes for something else.

    Steps that VASP's machine-learned force field predicted are no DFT: they are left out, which
    the log says. Of energies with and without van der Waals terms the ones without go.

    Raises:
        DataError: no step was computed by DFT.
    """
    text, learned = _LEARNED.subn("", text) if "ML TOTEN" in text else (text, 0)
    if learned:
        computed = len(VASP_STEP.findall(text))
        if not computed:
            raise DataError(
                f"{source}: all {learned} steps are predictions of VASP's machine-learned force "
                "field (ML_LMLFF); none was computed by DFT, so there is nothing to learn from. "
                "Recompute some of these structures, or use the ML_AB file's data."
            )
        _logger.warning(
            "%s: %d steps are predictions of VASP's machine-learned force field and are left out; "
            "the %d steps computed by DFT are read",
            source,
            learned,
            computed,
        )
    if "w/o vdW" in text:
        text = _WITHOUT_VDW.sub("", text)
    return text


_AENET = re.compile(r"(?i)^ *# *total energy *= *([-+.\dEe]+) *eV", re.M)
#: GPa, from which on an enthalpy is no energy: 6 meV for 10 Å³.
_PRESSURE = 0.1
#: Charge and, where it is printed, multiplicity.
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "aims-output": (r"^ *Charge += +(\S+): Charged system",),
    "castep-castep": (r"^ *net charge +of system *: *(\S+)",),
    "cp2k": (r"^ DFT\| Charge +(-?\d+)", r"^ DFT\| Multiplicity +(\d+)"),
    "gamess-us-out": (r"CHARGE OF MOLECULE *= *(\S+)", r"SPIN MULTIPLICITY *= *(\d+)"),
    "gaussian-out": (r"^ *Charge = *(\S+) Mult", r"^ *Charge = *\S+ Multiplicity = *(\d+)"),
    "gpaw-out": (r"^ *Total [Cc]harge: *(\S+)",),
    "nwchem-out": (r"^ *Charge *: *(-?\d+)", r"^ *Spin multiplicity *: *(\d+)"),
    "orca-output": (r"Total Charge +Charge +\.+ +(\S+)", r"Multiplicity +Mult +\.+ +(\d+)"),
}


def put_frames_right(content: Content, frames: Sequence[Atoms]) -> None:
    """Correct frames as ASE read them: units, and the charge and multiplicity, which it leaves out.

    Raises:
        DataError: frames of a crystal have no cell.
    """
    kind, text, source = content.kind, content.text, content.source
    if kind == "aims-output" and _AIMS_CELL.search(text) and not all(a.pbc.all() for a in frames):
        raise DataError(
            f"{source} is of a crystal, and its steps do not say their cell: they would be "
            "molecules in vacuum. Write them as extended xyz with a Lattice."
        )
    if kind == "nwchem-out":  # plane waves, whose cell is periodic
        for atoms in (a for a in frames if a.cell.rank == 3):
            atoms.pbc = True
    pressure = (
        max((float(a.info.get("pressure") or 0) for a in frames), key=abs) if kind == "res" else 0
    )
    if abs(pressure) > _PRESSURE:
        _logger.warning(
            "%s: the energies in files of AIRSS are enthalpies, here with pressures up to %g GPa. "
            "Take pressure times volume off them before they are labels of an energy",
            source,
            pressure,
        )
    if kind == "qbox":
        _from_atomic_units(frames, source)
    energies = _AENET.findall(text) if kind == "xsf" else ()
    if len(energies) == len(frames):  # as aenet writes it, with forces in eV/Å; else in Hartree/Å
        for atoms, energy in zip(frames, energies, strict=True):
            forces = {} if atoms.calc is None else atoms.calc.results
            atoms.arrays |= {name: forces[name] / Hartree for name in forces}
            atoms.calc = None
            atoms.info["energy"] = float(energy)
    for key, pattern in zip(("charge", "multiplicity"), _NUMBERS.get(kind, ()), strict=False):
        found = {float(number) for number in re.findall(pattern, text, re.M)}
        if len(found) == 1 and found != {0.0 if key == "charge" else 1.0}:
            for atoms in frames:
                atoms.info.setdefault(key, *found)


def _from_atomic_units(frames: Sequence[Atoms], source: str) -> None:
    """ASE takes the numbers of Qbox, in Hartree, Bohr and GPa, as they stand."""
    stress = False
    for atoms in frames:
        atoms.set_cell(atoms.cell * Bohr, scale_atoms=True)
        results = atoms.calc.results
        results["energy"] *= Hartree
        results["forces"] = np.array(results["forces"]) * Hartree / Bohr
        stress |= results.pop("stress", None) is not None
    if stress:
        _logger.warning(
            "%s: the stress of Qbox has a part of moving atoms, and is left out", source
        )
