"""What outputs of electronic-structure codes say of their convergence: whole files, and lines.

The whole files have the words and the order of the codes' real outputs, and nothing that no reader
looks at.
"""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.units import Bohr, Hartree

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.corrections import clean_outcar
from pet_finetune.data.frame_files import read_file
from pet_finetune.data.outputs import doubtful_frames, settings_of
from pet_finetune.data.readers import read_structures
from pet_finetune.errors import DataError
from pet_finetune.inspection.inspection import declared_units

WATER = (("O", 0.0, 0.119), ("H", 0.763, -0.477), ("H", -0.763, -0.477))
RULE = " " + "-" * 69 + "\n"


def gaussian(converged):
    text = " Entering Gaussian System, Link 0=g16\n Gaussian 16:  ES64L-G16RevA.03\n"
    for step, fine in enumerate(converged):
        text += (
            f"{' ':26s}Input orientation:\n{RULE} Center     Atomic      Atomic\n Number\n{RULE}"
        )
        for n, (symbol, y, z) in enumerate(WATER, 1):
            number = {"O": 8, "H": 1}[symbol]
            text += f"{n:7d}{number:11d}           0    {step:12.6f}{y:12.6f}{z:12.6f}\n"
        text += RULE + ("" if fine else " >>>>>>>>>> Convergence criterion not met.\n")
        text += f" SCF Done:  E(RHF) =  -76.{step}     A.U. after   99 cycles\n"
    return text + " Normal termination of Gaussian 16.\n"


def orca(converged, words="SCF"):
    text = "  *****************\n  * O   R   C   A *\n  *****************\n"
    for step, fine in enumerate(converged):
        text += "          ORCA GEOMETRY RELAXATION STEP\n" if step else ""
        text += f"\nCARTESIAN COORDINATES (ANGSTROEM)\n{RULE}"
        text += "".join(f"  {s} {step:12.6f}{y:12.6f}{z:12.6f}\n" for s, y, z in WATER)
        text += "\nNumber of atoms                             ...      3\n"
        text += "" if fine else "    *           SCF NOT CONVERGED AFTER 125 CYCLES          *\n"
        note = "" if fine else f" ({words} not fully converged!)"
        text += f"ORCA SCF GRADIENT CALCULATION\nFINAL SINGLE POINT ENERGY    -76.{step}{note}\n"
    return text + "                             ****ORCA TERMINATED NORMALLY****\n"


def old_orca(converged):
    return orca(converged, words="Wavefunction")


def espresso(converged):
    text = (
        "     Program PWSCF v.6.4 starts on  1Jan2024\n"
        "     lattice parameter (alat)  =      10.0000  a.u.\n"
        "     number of atoms/cell      =            3\n"
        "     number of atomic types    =            2\n"
        "     celldm(1)=  10.000000  celldm(2)=   0.000000  celldm(3)=   0.000000\n\n"
        "     crystal axes: (cart. coord. in units of alat)\n"
        "               a(1) = (   1.000000   0.000000   0.000000 )\n"
        "               a(2) = (   0.000000   1.000000   0.000000 )\n"
        "               a(3) = (   0.000000   0.000000   1.000000 )\n\n"
        "     atomic species   valence    mass     pseudopotential\n"
        "        O              6.00    15.99900     O ( 1.00)\n"
        "        H              1.00     1.00800     H ( 1.00)\n\n"
        "     site n.     atom                  positions (alat units)\n"
    )
    for n, (s, y, z) in enumerate(WATER, 1):
        text += f"         {n}           {s}   tau({n:4d}) = (   0.0{y:12.7f}{z:12.7f}  )\n"
    for step, fine in enumerate(converged):
        if step:
            text += "ATOMIC_POSITIONS (angstrom)\n"
            text += "".join(f"{s} {step:12.7f}{y:12.7f}{z:12.7f}\n" for s, y, z in WATER) + "\n"
        done = "has been achieved in  12" if fine else "NOT achieved after 100"
        stops = "" if fine else ": stopping"
        text += f"     convergence {done} iterations{stops}\n"
        text += f"!    total energy              =      -76.{step} Ry\n"
    return text + "   JOB DONE.\n"


def aims(converged):
    text = (
        "          Invoking FHI-aims ...\n  | Number of atoms                   :        3\n"
        "  | Number of spin channels           :        1\n"
        "  The structure contains        3 atoms,  and a total of         10.000 electrons.\n"
        "  Molecular dynamics time step\n  Input geometry:\n  | No unit cell requested.\n"
        "  | Atomic structure:\n  |       Atom                x [A]            y [A]\n"
    )
    text += "".join(f"  | {n}: Species {s} 0.0 {y} {z}\n" for n, (s, y, z) in enumerate(WATER, 1))
    text += "  Structure-dependent array size parameters:\n"
    text += "  | Number of Kohn-Sham states (occupied + empty):       11\n"
    text += "          Begin self-consistency loop: Initialization.\n"
    failed = (
        "  * WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE\n"
        "  * USING YOUR PRESELECTED ACCURACY CRITERIA.\n"
    )
    for step, fine in enumerate(converged):
        text += "          Begin self-consistency loop: Re-initialization.\n" if step else ""
        text += "  Convergence:    q app. |  density  | eigen (eV) | Etot (eV) | forces (eV/A) |\n"
        text += "  Self-consistency cycle converged.\n" if fine else failed
        text += f"  | Total energy uncorrected      :    -76.{step} eV\n"
        text += f"  | Electronic free energy        :    -76.{step} eV\n"
        text += "  Atomic structure (and velocities) as used in the preceding time step:\n  x [A]\n"
        for symbol, y, z in WATER:
            text += f"     atom   {step}.0 {y} {z}  {symbol}\n"
    text += "" if converged[-1] else "  *** scf_solver: SCF cycle not converged.\n"
    return text + "          Have a nice day.\n"


def gpaw(converged):
    text = (
        "\n  ___ ___ ___ _ _ _\n |   |   |_  | | | |\n |__ |  _|___|_____|  21.1.0\n |___|_|\n\n"
        "Densities:\n  Coarse grid: 32*32*32 grid\n  Fine grid: 64*64*64 grid\n"
        "  Total Charge: 0.000000\n\nReference energy: -2000.0\n"
    )
    for step, fine in enumerate(converged):
        text += "\nPositions:\n"
        for n, (symbol, y, z) in enumerate(WATER):
            text += f"   {n} {symbol} {step}.0 {y} {z}    ( 0.0,  0.0,  0.0)\n"
        text += "\nUnit cell:\n           periodic     x           y           z      points\n"
        text += "  1. axis:    no     8.0    0.0    0.0    32     0.25\n"
        text += "  2. axis:    no     0.0    8.0    0.0    32     0.25\n"
        text += "  3. axis:    no     0.0    0.0    8.0    32     0.25\n\n"
        text += "Converged after 15 iterations.\n" if fine else "Did not converge!\n"
        text += "\nEnergy contributions relative to reference atoms: (reference = -2000.0)\n\n"
        text += "Kinetic:        +23.0\n--------------------------\n"
        text += f"Free energy:    -76.{step}\nExtrapolated:   -76.{step}\n"
    return text


CODES = (gaussian, orca, old_orca, espresso, aims, gpaw)
NUMBERS = {
    "gaussian": "Convergence criterion not met",
    "espresso": "convergence NOT achieved after 100 iterations: stopping",
    "aims": "SELF-CONSISTENCY CYCLE DID NOT CONVERGE",
    "gpaw": "Did not converge!",
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_step_that_did_not_converge_is_left_out_and_named(tmp_path, package_log, code, failed):
    text = code([step != failed for step in range(3)])
    (tmp_path / "x.out").write_text(text)
    systems = {"read_from": str(tmp_path / "x.out")}
    options = DatasetOptions.model_validate({"systems": systems, "targets": {"energy": {}}})
    structures = read_structures(options)
    assert [s.index for s in structures] == [step for step in range(3) if step != failed]
    assert [float(s.positions[0, 0]) % 4 for s in structures] == [s.index for s in structures]
    assert f"the calculation of frame {failed} did not converge (1 of 3 frames)" in package_log.text
    words = NUMBERS.get(code.__name__, "SCF NOT CONVERGED AFTER 125 CYCLES")
    line = next(n for n, row in enumerate(text.split("\n"), 1) if words in row)
    assert f"Frame {failed}: line {line}: " in package_log.text


@pytest.mark.parametrize("code", CODES)
def test_steps_that_converged_are_all_there(tmp_path, package_log, code):
    (tmp_path / "x.out").write_text(code([True] * 3))
    systems = {"read_from": str(tmp_path / "x.out"), "unconverged": "error"}
    options = DatasetOptions.model_validate({"systems": systems, "targets": {"energy": {}}})
    energies = [s.labels["energy"].item() for s in read_structures(options)]
    assert len(set(energies)) == 3
    assert "converge" not in package_log.text


def vasp(*, cycles=(3, 3), limit=3, converged=(True, True)) -> str:
    """The lines of an OUTCAR that say whether its steps converged."""
    text = f"   NELM   =    {limit};   NELMIN=  2\n"
    for step, (count, fine) in enumerate(zip(cycles, converged, strict=True), start=1):
        text += "".join(f"---- Iteration {step:6d}({k:4d})  ----\n" for k in range(1, count + 1))
        text += "---- aborting loop because EDIFF is reached ----\n" if fine else ""
        text += "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n"
    return text


def frames_of(*energies: float):
    frames = []
    for energy in energies:
        atoms = molecule("H2O")
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    return frames


GAUSSIAN = " SCF Done:  E(RHF) =  -1.0     A.U. after   10 cycles\n"
FAILED_GAUSSIAN = " >>>>>>>>>> Convergence criterion not met.\n" + GAUSSIAN.replace("-1.0", "-2.0")


@pytest.mark.parametrize(
    ("kind", "text", "doubtful"),
    [
        ("vasp-out", vasp(), []),
        ("vasp-out", vasp(converged=(True, False)), [1]),
        ("vasp-out", vasp(cycles=(2, 3), converged=(False, False)), [1]),
        (
            "vasp-out",
            vasp().replace("because EDIFF is reached", "EDIFF was not reached (unconverged)", 1),
            [0],
        ),
        ("gaussian-out", GAUSSIAN + GAUSSIAN, []),
        ("gaussian-out", GAUSSIAN + FAILED_GAUSSIAN, [1]),
        ("gaussian-out", FAILED_GAUSSIAN + " Convergence failure -- run terminated.\n", [1]),
        (
            "orca-output",
            "ORCA GEOMETRY RELAXATION STEP\nFINAL SINGLE POINT ENERGY (SCF not fully converged!)\n"
            "ORCA TERMINATED NORMALLY\n",
            [1],
        ),
        (
            "espresso-out",
            "Program PWSCF\nEnd of self-consistent calculation\n"
            "     convergence NOT achieved after 100 iterations: stopping\n"
            "ATOMIC_POSITIONS\n!    total energy = -1 Ry\n",
            [0],
        ),
        (
            "aims-output",
            "Self-consistency cycle not yet converged - restarting mixer\n"
            "Self-consistency cycle converged.\nSelf-consistency cycle not converged\n",
            [1],
        ),
        ("castep-castep", " Final energy = -1 eV\n *Warning* max. SCF cycles performed"
         " but system has not reached the groundstate.\n Final energy = -1 eV\n", [1]),
        ("vasp-out", vasp() + " NEB: Tangent\n", [0, 1]),  # images of a band
        ("vasp-xml", '<i type="int" name="IMAGES">     5</i>', [0, 1]),
        ("vasp-xml", '<i type="int" name="IMAGES">     0</i>', []),
        ("gpaw-out", "Did not converge!\n", [0, 1]),  # which one is not known
        (
            "vasp-xml",
            '<i type="int" name="NELM">     2</i><calculation><scstep></scstep></calculation>'
            "<calculation><scstep></scstep><scstep></scstep></calculation>",
            [1],
        ),
        (  # all iterations were used; the last one of the first step met EDIFF
            "vasp-xml",
            '<i name="EDIFF"> 0.001</i><i type="int" name="NELM">     2</i>'
            + "".join(
                f'<calculation><scstep><i name="e_0_energy"> -1.0 </i></scstep><scstep>'
                f'<i name="e_0_energy"> {last} </i></scstep></calculation>'
                for last in (-1.0001, -1.1)
            ),
            [1],
        ),
        (
            "vasp-xml",
            '<i type="logical" name="ML_LMLFF"> T  </i>'
            "<calculation><scstep></scstep></calculation><calculation></calculation>",
            [1],
        ),
    ],
)  # fmt: skip
def test_frames_that_did_not_converge(kind, text, doubtful):
    frames = frames_of(-1.0 * 27.211386024367243, -2.0 * 27.211386024367243)
    assert sorted(doubtful_frames(kind, text, frames)) == doubtful


def test_a_frame_that_says_itself_that_it_did_not_converge():
    frames = frames_of(-1.0, -2.0, -3.0)
    frames[0].info["converged"] = True
    frames[1].info["scf_converged"] = False
    assert list(doubtful_frames("extxyz", "", frames)) == [1]


def test_steps_of_a_learned_force_field_are_no_dft(package_log):
    learned = (
        "  ML FORCE on cell =-STRESS\n  in kB 0 0 0 0 0 0\n"
        "  POSITION  TOTAL-FORCE (eV/Angst) (ML)\n"
        "  ML FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n  free  energy ML TOTEN  = 1 eV\n\n"
        "  ML energy  without entropy= 1  ML energy(sigma->0) = 1\n"
    )
    computed = "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n  free  energy   TOTEN  = 2 eV\n"
    text = clean_outcar(learned + computed + learned + learned + computed, "OUTCAR")
    assert text == computed + computed
    assert "3 steps are predictions" in package_log.text
    with pytest.raises(DataError, match="all 2 steps are predictions"):
        clean_outcar(learned + learned, "OUTCAR")


def test_settings_that_an_output_says():
    said = "  ENCUT  =  520.0 eV  38.2 Ry\n   GGA     =    PE    GGA type\n   LDAU   =  T\n"
    said += " IVDW = 12\n   TITEL  = PAW_PBE Fe_pv 02Aug2007\n   LHFCALC =     F    Hartree Fock\n"
    xml = '<i name="ENMAX"> 520.00</i><i type="string" name="GGA">PE</i><i name="LDAU"> T </i>'
    xml += '<i name="IVDW">    12</i><i name="LHFCALC"> F </i><c>PAW_PBE Fe_pv 02Aug2007  </c>'
    known = {"ENCUT": "520", "GGA": "PE", "LDAU": "T", "IVDW": "12", "LHFCALC": "F"}
    known |= {"METAGGA": "F", "potential of Fe": "PAW_PBE Fe_pv 02Aug2007"}
    assert settings_of("vasp-out", said) == known
    assert settings_of("vasp-xml", xml) == known
    assert settings_of("gaussian-out", " #p b3lyp/6-31g* opt\n") == {"method": "b3lyp/6-31g*"}
    assert settings_of("extxyz", said) == {}


def test_energies_without_van_der_waals_terms_go():
    line = "  energy  without entropy=  -3.0 eV    w/o vdW =  -1.0  energy(sigma->0) =  -3.1 eV"
    line += "    w/o vdW =   -1.1"
    assert clean_outcar(line, "OUTCAR").split()[-1] == "-3.1"
    assert clean_outcar(line, "OUTCAR").split()[6] == "-3.1"


def test_the_energy_of_a_hybrid_functional_in_quantum_espresso(tmp_path):
    path = tmp_path / "pw.out"
    path.write_text(espresso([True]).replace("!    total", "!!   total"))
    (atoms,) = read_file(path).frames
    assert atoms.calc.results["energy"] == pytest.approx(-76.0 * Hartree / 2)


def test_a_label_of_quantum_espresso_is_its_pseudopotential_s_element(tmp_path):
    text = espresso([True, True])
    for row in ("   O   tau", "        O     ", "\nO  "):
        assert row in text
        text = text.replace(row, row.replace("O", "Os1"))
    (tmp_path / "pw.out").write_text(text)
    for atoms in read_file(tmp_path / "pw.out").frames:
        assert atoms.get_chemical_formula() == "H2O"


def test_a_structure_without_an_energy_at_the_end_of_a_run_is_doubtful():
    frames = [molecule("H2O") for _ in range(3)]
    for atoms in frames[:2]:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    assert list(doubtful_frames("gaussian-out", "x", frames)) == [2]
    assert doubtful_frames("extxyz", "x", frames) == {}
    assert doubtful_frames("gaussian-out", "x", frames[2:]) == {}
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((3, 3)))
    assert doubtful_frames("gaussian-out", "x", frames) == {}
    frames[2].calc = SinglePointCalculator(frames[2], energy=-1.0)
    assert list(doubtful_frames("gaussian-out", "x", frames)) == [2]
    frames[0].calc = SinglePointCalculator(frames[0], energy=-1.0)  # a mixed workflow
    assert doubtful_frames("gaussian-out", "x", frames) == {}


def gaussian_forces(turned: bool) -> str:
    """A molecule in its standard orientation with forces along other axes, or the same."""
    rows = {8: (0.0, 0.0, 0.12), 1: (0.0, 0.76, -0.48), 2: (0.0, -0.76, -0.48)}
    text = (
        " Entering Gaussian System, Link 0=g16\n                         Standard orientation:\n"
        " ----\n Center     Atomic      Atomic             Coordinates (Angstroms)\n"
        " Number     Number       Type             X           Y           Z\n ----\n"
    )
    for n, (key, place) in enumerate(rows.items(), 1):
        x, y, z = place
        text += f"{n:7d}{8 if key == 8 else 1:11d}{0:12d}{x:16.6f}{y:12.6f}{z:12.6f}\n"
    text += " ----\n SCF Done:  E(RB3LYP) =  -76.40     A.U. after    9 cycles\n"
    text += " Center     Atomic                   Forces (Hartrees/Bohr)\n"
    text += " Number     Number              X              Y              Z\n ----\n"
    forces = ((0.0, 0.0, 0.02), (0.0, 0.005, -0.01), (0.0, -0.005, -0.01))
    for n, (x, y, z) in enumerate(forces, 1):
        x, y, z = (z, x, y) if turned else (x, y, z)
        text += f"{n:7d}{8 if n == 1 else 1:9d}{x:23.9f}{y:15.9f}{z:15.9f}\n"
    return text + " ----\n Normal termination of Gaussian 16\n"


@pytest.mark.parametrize("turned", [False, True])
def test_forces_of_gaussian_along_other_axes_are_no_labels(tmp_path, turned):
    (tmp_path / "a.log").write_text(gaussian_forces(turned))
    content = read_file(tmp_path / "a.log")
    assert "forces" in content.frames[0].calc.results
    assert [("NoSymm" in reason) for reason in content.doubtful.values()] == [True] * turned


def test_units_of_a_program_s_output_are_known(tmp_path):
    for name, text in (("a.out", orca([True])), ("a.xyz", "1\nenergy=-1.0\nAr 0 0 0\n")):
        (tmp_path / name).write_text(text)
        systems = {"read_from": str(tmp_path / name)}
        dataset = DatasetOptions.model_validate({"systems": systems, "targets": {"energy": {}}})
        (units,) = declared_units([dataset], "energy").values()
        assert units.converted == (name == "a.out")


DUMP = (
    "ITEM: UNITS\nreal\nITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n1\nITEM: BOX BOUNDS pp pp pp\n"
    "0 9\n0 9\n0 9\nITEM: ATOMS id element x y z fx fy fz\n1 O 0 0 0 1 0 0\n"
)


@pytest.mark.parametrize(
    ("name", "text", "systems", "energy"),
    [
        ("a.out", orca([True]), {}, {"unit": "Hartree"}),
        ("a.out", orca([True]), {"length_unit": "bohr"}, {}),
        ("a.log", gaussian_forces(False), {}, {"forces": {"unit": "Hartree/Bohr"}}),
        ("a.dump", DUMP, {}, {"unit": "kcal/mol"}),
        ("coord", "$coord\n0 0 0 h\n0 0 1.4 h\n$end\n", {"length_unit": "bohr"}, {}),
    ],
)
def test_numbers_that_ase_converts_are_not_converted_again(tmp_path, name, text, systems, energy):
    (tmp_path / name).write_text(text)
    options = {
        "systems": {"read_from": str(tmp_path / name), **systems},
        "targets": {"energy": energy},
    }
    with pytest.raises(DataError, match="they would be converted twice"):
        read_structures(DatasetOptions.model_validate(options))


def test_labels_of_an_output_beside_positions_in_bohr_are_in_ev(tmp_path):
    (tmp_path / "a.log").write_text(gaussian_forces(False))
    write(
        tmp_path / "a.xyz",
        read_file(tmp_path / "a.log").frames[0],
        columns=["symbols", "positions"],
    )
    systems = {"read_from": str(tmp_path / "a.xyz"), "length_unit": "bohr"}
    targets = {"energy": {"read_from": str(tmp_path / "a.log")}}
    (found,) = read_structures(
        DatasetOptions.model_validate({"systems": systems, "targets": targets})
    )
    assert found.labels["energy"].item() == pytest.approx(-76.4 * Hartree, rel=1e-5)
    assert float(found.labels["energy/forces"][0, 2]) == pytest.approx(0.02 * Hartree / Bohr)
