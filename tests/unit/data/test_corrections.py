"""Outputs of which ASE reads something else than they say: cells, energies, units, charges.

The files have the words and the order of real outputs, and nothing that no reader looks at.
"""

from __future__ import annotations

import numpy as np
import pytest
from ase.units import Bohr, Hartree

from pet_finetune.data.frame_files import read_file
from pet_finetune.errors import DataError

RULE = " " + "-" * 69 + "\n"


def aims_md(step: str) -> str:
    """Two steps of FHI-aims in a cell of 4 x 5 x 6 Å, as the header alone says."""
    text = (
        "          Invoking FHI-aims ...\n  | Number of atoms                   :        1\n"
        "  | Number of spin channels           :        1\n"
        "  The structure contains        1 atoms,  and a total of         10.000 electrons.\n"
        "  Charge =   1.000000E+00: Charged system requested explicitly.\n"
        "  Complete information for previous time-step:\n  Input geometry:\n  | Unit cell:\n"
        "  |  4.0 0.0 0.0\n  |  0.0 5.0 0.0\n  |  0.0 0.0 6.0\n  | Atomic structure:\n"
        "  |       Atom                x [A]            y [A]            z [A]\n"
        "  |    1: Species Ne            0.0        0.0        0.0\n"
        "  Structure-dependent array size parameters:\n"
        "  | Number of Kohn-Sham states (occupied + empty):       11\n"
        "          Begin self-consistency loop: Initialization.\n"
    )
    for number in range(2):
        text += "          Begin self-consistency loop: Re-initialization.\n" if number else ""
        text += (
            "  Convergence:    q app. |  density  | eigen (eV) | Etot (eV) | forces (eV/A) |\n"
            "  Self-consistency cycle converged.\n"
            f"  | Total energy uncorrected      :    -76.{number} eV\n"
            f"  | Electronic free energy        :    -76.{number} eV\n"
            f"  {step}\n                      x [A]    y [A]    z [A]    Atom\n"
            f"     atom   {number}.0 0.0 0.0  Ne\n"
        )
    return text + "          Have a nice day.\n"


def test_steps_of_md_in_a_crystal_keep_its_cell(tmp_path):
    path = tmp_path / "aims.out"
    path.write_text(
        aims_md("Atomic structure (and velocities) as used in the preceding time step:")
    )
    _, second = read_file(path).frames
    assert second.pbc.all()
    assert second.cell.lengths().tolist() == [4.0, 5.0, 6.0]
    assert second.positions[0, 0] == 1.0
    assert second.calc.results["energy"] == -76.1
    assert second.info["charge"] == 1.0
    step = "Atomic structure that was used in the preceding time step of the wrapper"
    path.write_text(aims_md(step))
    with pytest.raises(DataError, match="would be molecules in vacuum"):
        read_file(path)


@pytest.mark.parametrize(
    "line",
    [" Total Energy, E(TD-HF/TD-DFT) =  -75.9", " ONIOM: extrapolated energy =     -75.9", ""],
)
def test_the_energy_of_gaussian_is_that_of_its_forces(tmp_path, line):
    path = tmp_path / "excited.log"
    path.write_text(
        " Entering Gaussian System, Link 0=g16\n Charge = -1 Multiplicity = 2\n"
        f"{' ':26s}Input orientation:\n{RULE} Center     Atomic      Atomic\n Number\n{RULE}"
        f"      1          1           0        0.000000    0.000000    0.000000\n{RULE}"
        f" SCF Done:  E(RB3LYP) =  -76.1     A.U. after   10 cycles\n{line}\n"
        " Normal termination of Gaussian 16.\n"
    )
    (atoms,) = read_file(path).frames
    assert atoms.calc.results["energy"] == pytest.approx((-75.9 if line else -76.1) * Hartree)
    assert (atoms.info["charge"], atoms.info["multiplicity"]) == (-1, 2)


def test_numbers_of_qbox_are_converted(tmp_path, package_log):
    cell = "".join(
        f' {k}="{row}"' for k, row in zip("abc", ("8 0 0", "0 8 0", "0 0 8"), strict=True)
    )
    stress = "".join(f"<sigma_{k}>1.0</sigma_{k}>\n" for k in ("xx", "yy", "zz", "yz", "xz", "xy"))
    path = tmp_path / "si.xml"
    path.write_text(
        '<?xml version="1.0"?>\n<fpmd:simulation xmlns:fpmd="http://www.quantum-simulation.org/">\n'
        '<release> 1.6 </release>\n<species name="si">\n<symbol>Si</symbol>\n'
        "<atomic_number>14</atomic_number>\n<mass>28.0</mass>\n</species>\n<cmd>run</cmd>\n"
        f'<iteration count="1">\n<etotal> -2.0 </etotal>\n<atomset>\n<unit_cell{cell}/>\n'
        '<atom name="s1" species="si">\n<position> 1.0 0.0 0.0 </position>\n'
        "<velocity> 0 0 0 </velocity>\n<force> 0.1 0.0 0.0 </force>\n</atom>\n</atomset>\n"
        f'<stress_tensor unit="GPa">\n{stress}</stress_tensor>\n</iteration>\n</fpmd:simulation>\n'
    )
    (atoms,) = read_file(path).frames
    assert atoms.cell.lengths() == pytest.approx([8 * Bohr] * 3)
    assert atoms.positions[0] == pytest.approx([Bohr, 0, 0])
    assert atoms.calc.results["energy"] == pytest.approx(-2 * Hartree)
    assert atoms.calc.results["forces"][0, 0] == pytest.approx(0.1 * Hartree / Bohr)
    assert "stress" not in atoms.calc.results
    assert "is left out" in package_log.text


def test_an_xsf_of_aenet_has_an_energy_and_forces_in_ev(tmp_path):
    path = tmp_path / "structure0001.xsf"
    atom = "Ti 0.0 0.0 0.0 0.1 0.0 -0.2\n"
    body = f"\nCRYSTAL\nPRIMVEC\n4 0 0\n0 4 0\n0 0 4\nPRIMCOORD\n1 1\n{atom}"
    path.write_text(f"# total energy = -4989.44 eV\n{body}")
    (atoms,) = read_file(path).frames
    assert atoms.info["energy"] == -4989.44
    assert atoms.arrays["forces"] == pytest.approx(np.array([[0.1, 0.0, -0.2]]))
    path.write_text(f"# of XCrySDen\n{body}")
    (atoms,) = read_file(path).frames
    assert atoms.calc.results["forces"][0, 0] == pytest.approx(0.1 * Hartree)


def test_the_cell_of_abinit_is_the_one_that_it_prints(tmp_path):
    text = (
        "\n.Version 8.10.3 of ABINIT\n\n"
        " -outvars: echo values of preprocessed input variables --------\n"
        "            acell      1.0E+01  1.0E+01  1.0E+01 Bohr\n            natom           1\n"
        "           ntypat           1\n            rprim      0.0  0.5  0.5\n"
        "                       0.5  0.0  0.5\n                       0.5  0.5  0.0\n"
        "            typat      1\n            znucl       14.0\n\n" + "=" * 80 + "\n"
        " Real(R)+Recip(G) space primitive vectors, cartesian coordinates (Bohr,Bohr^-1):\n"
        " R(1)=  0.0000000  5.0000000  5.0000000  G(1)= -0.1  0.1  0.1\n"
        " R(2)=  5.0000000  0.0000000  5.0000000  G(2)=  0.1 -0.1  0.1\n"
        " R(3)=  5.0000000  5.0000000  0.0000000  G(3)=  0.1  0.1 -0.1\n"
        " ----iterations are completed or convergence reached----\n"
        " cartesian coordinates (angstrom) at end:\n    1      0.0  0.0  0.0\n"
        " Components of total free energy (in Hartree) :\n    >>>>>>>>> Etotal= -8.0E+00\n"
        "== END DATASET(S) ====\n"
    )
    path = tmp_path / "si.abo"
    path.write_text(text)
    (atoms,) = read_file(path).frames
    assert atoms.cell[0] == pytest.approx([0, 5 * Bohr, 5 * Bohr])
    path.write_text(
        text.replace("            natom", "           optcell           2\n            natom")
    )
    with pytest.raises(DataError, match="relaxed the cell"):
        read_file(path)


@pytest.mark.parametrize("name", ["running_scf.log", "Methane.md", "Methane.dat"])
def test_outputs_of_unknown_programs_are_not_taken_for_others_by_their_endings(tmp_path, name):
    path = tmp_path / name
    path.write_text("                              ABACUS v3.4\n TOTAL ENERGY: 1.0\n")
    with pytest.raises(DataError, match="neither name nor content says which format"):
        read_file(path)


NWCHEM = """
                       NWPW PSPW Calculation

                             Geometry "geometry" -> ""
                             -------------------------

 Output coordinates in angstroms (scale by  1.889725989 to convert to a.u.)

  No.       Tag          Charge          X              Y              Z
 ---- ---------------- ---------- -------------- -------------- --------------
    1 C                    6.0000     0.00000000     0.00000000     0.00000000

      Lattice Parameters
      ------------------

      lattice vectors in angstroms (scale by  1.889725989 to convert to a.u.)

      a1=<   4.000   0.000   0.000 >
      a2=<   0.000   5.526   0.000 >
      a3=<   0.000   0.000   4.596 >
      a=       4.000 b=      5.526 c=       4.596

          *               NWPW PSPW Calculation              *
 orbital energies:
     0.3919370E+00 (  10.665eV) occ=1.000
     0.3908827E+00 (  10.637eV) occ=1.000

 Total PSPW energy     :  -0.1709317826E+02
"""


def test_plane_waves_of_nwchem_are_periodic_and_bohr_is_no_angstrom(tmp_path):
    path = tmp_path / "carbon.nwo"
    path.write_text(
        "              Northwest Computational Chemistry Package (NWChem) 7.0\n" + NWCHEM
    )
    (atoms,) = read_file(path).frames
    assert atoms.pbc.all()
    path.write_text(
        path.read_text().replace("Output coordinates in angstroms", "Output coordinates in a.u.")
    )
    with pytest.raises(DataError, match="geometry in Bohr"):
        read_file(path)


@pytest.mark.parametrize("pressure", [50.0, 0.01])
def test_enthalpies_of_airss_are_told_of(tmp_path, package_log, pressure):
    path = tmp_path / "si.res"
    path.write_text(
        f"TITL si {pressure} 64.0 -1000.0 0 0 1 (P1) n - 1\nCELL 1.54 4 4 4 90 90 90\nLATT -1\n"
        "SFAC Si\nSi 1 0 0 0 1.0\nEND\n"
    )
    (atoms,) = read_file(path, "res").frames
    assert atoms.calc.results["energy"] == -1000.0
    assert ("are enthalpies" in package_log.text) == (pressure > 1)
