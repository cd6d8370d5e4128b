"""Files of other programs: elements, cells and the status of the calculation are not made up."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.units import Bohr, GPa, Hartree, kcal, mol

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.frame_files import read_file, read_frames
from pet_finetune.data.readers import read_structures
from pet_finetune.errors import DataError

DUMP = """\
ITEM: TIMESTEP
0
ITEM: NUMBER OF ATOMS
2
ITEM: BOX BOUNDS pp pp pp
0 10
0 10
0 10
ITEM: ATOMS id type x y z fx fy fz
1 1 0.0 0.0 0.0 0.1 0.0 0.0
2 2 1.0 0.0 0.0 -0.1 0.0 0.0
"""
DATA = """\
made by hand

2 atoms
2 atom types
0 10 xlo xhi
0 10 ylo yhi
0 10 zlo zhi

Masses

1 {0}
2 {1}

Atoms # atomic

1 1 0.0 0.0 0.0
2 2 1.0 0.0 0.0
"""
CIF = """\
data_x
_cell_length_a 4
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Cu1 Cu 0 0 0 {0}
Au1 Au {2} {2} {2} {1}
"""


def refused(path, **options) -> str:
    with pytest.raises(DataError) as error:
        read_frames(path, **options)
    return str(error.value)


def test_a_dump_without_elements_is_asked_about(tmp_path):
    file = tmp_path / "x.dump"
    file.write_text(DUMP + DUMP)
    message = refused(file)
    assert "types of atoms (1, 2)" in message
    assert "--types 1=O,2=H" in message
    frames = read_frames(file, types={1: "Na", 2: "Cl"})
    assert [atoms.get_chemical_formula() for atoms in frames] == ["ClNa", "ClNa"]
    np.testing.assert_allclose(frames[1].get_forces()[0], [0.1, 0, 0])
    # ASE puts an energy of zero beside the forces.
    assert "energy" not in frames[0].calc.results
    assert "type 2" in refused(file, types={1: "Na"})


def test_a_dump_with_elements_and_units(tmp_path):
    file = tmp_path / "x.lammpstrj"
    text = DUMP.replace("id type", "id element").replace("\n1 1 ", "\n1 Na ")
    text = text.replace("\n2 2 ", "\n2 Cl ")
    file.write_text("ITEM: UNITS\nreal\n" + text)
    (atoms,) = read_frames(file)
    assert atoms.get_chemical_symbols() == ["Na", "Cl"]
    assert atoms.get_forces()[0, 0] == pytest.approx(0.1 * 0.0433641, rel=1e-5)
    file.write_text("ITEM: UNITS\nlj\n" + text)
    assert "'lj'" in refused(file)


def test_a_dump_that_is_cut_off(tmp_path):
    file = tmp_path / "x.dump"
    file.write_text(DUMP + DUMP[: DUMP.rindex("2 2")])
    message = refused(file, types={1: "Na", 2: "Cl"})
    assert "frame 1" in message
    assert "2 atoms, and 1 are there" in message


@pytest.mark.parametrize("name", ["x.data", "x.lmp", "data.water"])
def test_elements_of_a_data_file_are_those_of_its_masses(tmp_path, name):
    file = tmp_path / name
    file.write_text(DATA.format("22.99", "35.45"))
    assert read_frames(file)[0].get_chemical_symbols() == ["Na", "Cl"]
    file.write_text(DATA.format("2.014", "15.999"))
    assert read_frames(file)[0].get_chemical_symbols() == ["H", "O"]


def test_masses_that_are_no_elements_are_asked_about(tmp_path):
    file = tmp_path / "x.data"
    for masses in (("1.0", "1.0"), ("72.0", "15.999")):
        file.write_text(DATA.format(*masses))
        assert "types: {1: O" in refused(file)
        frames = read_frames(file, types={1: "Na", 2: "Cl"})
        assert frames[0].get_chemical_symbols() == ["Na", "Cl"]
    text = DATA.format("1", "1")
    file.write_text(text[: text.index("Masses")] + text[text.index("Atoms") :])
    assert "types of atoms (1, 2)" in refused(file)


def test_the_format_can_be_named(tmp_path):
    file = tmp_path / "structure.of.mine"
    write(file, bulk("NaCl", "rocksalt", a=5.6), format="vasp")
    assert "`format: ...`" in refused(file)
    assert read_frames(file, "vasp")[0].get_chemical_formula() == "ClNa"
    assert "Did you mean 'vasp'?" in refused(file, format="vaps")


def test_partly_occupied_sites_are_refused(tmp_path):
    file = tmp_path / "x.cif"
    file.write_text(CIF.format("1", "1.0", "0.5"))
    assert len(read_frames(file)[0]) == 2
    assert "occupancy" not in read_frames(file)[0].info
    file.write_text(CIF.format("0.5", "0.5", "0"))
    message = refused(file)
    assert "Cu 0.5, Au 0.5" in message
    assert "ordered" in message
    file.write_text(CIF.format("0.7", "1", "0.5"))
    assert "Cu 0.7" in refused(file)


def test_all_molecules_of_an_sdf_and_all_structures_of_one_poscar(tmp_path):
    record = "\n  made by hand\n\n  1  0\n    0.0000    0.0000    0.0000 {0}   0  0\nM  END\n$$$$\n"
    (tmp_path / "x.sdf").write_text(record.format("Ar") + record.format("Ne"))
    assert [str(a.symbols) for a in read_frames(tmp_path / "x.sdf")] == ["Ar", "Ne"]
    write(tmp_path / "POSCAR", bulk("Cu"))
    text = (tmp_path / "POSCAR").read_text()
    (tmp_path / "POSCAR").write_text(text + text.replace("Cu", "Ag"))
    assert [str(a.symbols) for a in read_frames(tmp_path / "POSCAR")] == ["Cu", "Ag"]


def test_a_cell_that_a_format_loses_is_refused(tmp_path):
    text = "$coord\n 0 0 0 o\n 1 0 0 h\n$cell angs\n 12. 12. 12. 90. 90. 90.\n$periodic 3\n$end\n"
    (tmp_path / "coord").write_text(text)
    assert "lost in reading the format 'turbomole'" in refused(tmp_path / "coord")
    (tmp_path / "coord").write_text(text[: text.index("$cell")] + "$end\n")
    assert str(read_frames(tmp_path / "coord")[0].symbols) == "OH"


CP2K = """ CP2K| version string:                                    CP2K version 7.1
 GLOBAL| Run type                                                   ENERGY_FORCE
 CELL| Vector a [angstrom]:       5.000     0.000     0.000    |a| =       5.000
 CELL| Vector b [angstrom]:       0.000     6.000     0.000    |b| =       6.000
 CELL| Vector c [angstrom]:       0.000     0.000     7.000    |c| =       7.000
 DFT| Charge                                                                  -1
 MODULE QUICKSTEP:  ATOMIC COORDINATES IN angstrom

  Atom  Kind  Element       X           Y           Z          Z(eff)       Mass

       1     1 Fe  26    0.000000    0.000000    1.000000     16.00      55.8450
       2     2 Fe  26    2.000000    0.000000   -1.000000     16.00      55.8450

 POISSON| Periodicity                                                         XY
"""
CP2K_OLD = (
    CP2K
    + """ ENERGY| Total FORCE_EVAL ( QS ) energy (a.u.):       -2.000000000000000

 ATOMIC FORCES in [a.u.]

 # Atom   Kind   Element          X              Y              Z
      1      1      Fe          0.10000000     0.20000000     0.30000000
      2      2      Fe         -0.10000000    -0.20000000    -0.30000000
 SUM OF ATOMIC FORCES           0.00000000     0.00000000     0.00000000     0.00000000

 STRESS TENSOR [GPa]

            X               Y               Z
  X       1.00000000     0.50000000     0.00000000
  Y       0.50000000     2.00000000     0.00000000
  Z       0.00000000     0.00000000     3.00000000
"""
)
CP2K_NEW = (
    CP2K
    + """ ENERGY| Total FORCE_EVAL ( QS ) energy [hartree]     -2.000000000000000

 FORCES| Atomic forces [hartree/bohr]
 FORCES|   Atom     x               y               z               |f|
 FORCES|      1  1.00000000E-01  2.00000000E-01  3.00000000E-01   3.74165739E-01
 FORCES|      2 -1.00000000E-01 -2.00000000E-01 -3.00000000E-01   3.74165739E-01
 FORCES| Sum     0.00000000E+00  0.00000000E+00  0.00000000E+00

 STRESS| Analytical stress tensor [bar]
 STRESS|                        x                   y                   z
 STRESS|      x        1.00000000000E+04   5.00000000000E+03   0.00000000000E+00
 STRESS|      y        5.00000000000E+03   2.00000000000E+04   0.00000000000E+00
 STRESS|      z        0.00000000000E+00   0.00000000000E+00   3.00000000000E+04
"""
)


@pytest.mark.parametrize("text", [CP2K_OLD, CP2K_NEW])
def test_a_single_calculation_of_cp2k_is_read(tmp_path, text):
    path = tmp_path / "x.out"
    path.write_text(text)
    (atoms,) = read_frames(path)
    assert atoms.numbers.tolist() == [26, 26]
    assert atoms.pbc.tolist() == [True, True, False]
    assert atoms.cell.lengths().tolist() == [5.0, 6.0, 7.0]
    assert atoms.positions[1].tolist() == [2.0, 0.0, -1.0]
    assert atoms.info["energy"] == pytest.approx(-2.0 * Hartree)
    assert atoms.info["charge"] == -1
    assert atoms.arrays["forces"][1] == pytest.approx(np.array([-1, -2, -3]) * Hartree / Bohr / 10)
    assert atoms.info["stress"][0] == pytest.approx(np.array([-1.0, -0.5, 0.0]) * GPa)
    path.write_text(text.replace("ENERGY_FORCE", "MD"))
    assert "dpdata (cp2k/aimd_output)" in refused(path)
    path.write_text(text.replace("hartree/bohr", "eV/angstrom"))
    if text == CP2K_NEW:
        assert "forces in eV/angstrom" in refused(path)
    path.write_text(text.replace("16.00", " 0.00"))
    assert "ghost atoms" in refused(path)
    path.write_text(text + " *** WARNING SCF run NOT converged\n")
    assert "SCF run NOT converged" in read_file(path).doubtful[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npz", None, "arrays of numpy (X, z)"),
        ("b.npz", b"PK\x03\x04" + bytes(50), "damaged or cut off"),
        ("c.h5", b"\x89HDF\r\n\x1a\n" + bytes(50), "tables of HDF5"),
        ("d.npy", b"\x93NUMPY" + bytes(50), "an array of numpy"),
        ("e.pkl", b"\x80\x04\x95" + bytes(50), "a pickle"),
    ],
)
def test_numbers_without_a_meaning_get_a_message_of_their_own(tmp_path, name, content, words):
    np.savez(tmp_path / "a.npz", X=np.zeros((5, 3, 3)), z=np.array([8, 1, 1]))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert words in message
    assert "extended xyz" in message


def test_dummies_of_any_format_are_refused(tmp_path):
    atoms = molecule("H2O")
    atoms.numbers[1] = 0
    write(tmp_path / "x.traj", [molecule("H2O"), atoms])
    message = refused(tmp_path / "x.traj")
    assert "frame 1" in message
    assert "dummies" in message


def test_columns_and_data_of_a_database_are_labels(tmp_path):
    atoms = molecule("H2O")
    forces = np.arange(9.0).reshape(3, 3)
    with ase.db.connect(tmp_path / "x.db") as rows:
        rows.write(atoms, dft_energy=-3.0, data={"dft_forces": forces})
    target = {"key": "dft_energy", "forces": {"key": "dft_forces"}, "stress": "off"}
    options = {"systems": str(tmp_path / "x.db"), "targets": {"energy": target}}
    (structure,) = read_structures(DatasetOptions.model_validate(options))
    assert structure.labels["energy"].item() == -3.0
    np.testing.assert_array_equal(structure.labels["energy/forces"].numpy(), forces)


def frames_of(*energies: float):
    frames = []
    for energy in energies:
        atoms = molecule("H2O")
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    return frames


@pytest.fixture
def half_converged(tmp_path):
    frames = frames_of(-1.0, -2.0, -3.0)
    for atoms, fine in zip(frames, (True, False, True), strict=True):
        atoms.info["scf_converged"] = fine
    write(tmp_path / "x.xyz", frames)
    return tmp_path / "x.xyz"


def of(path, **systems):
    systems["read_from"] = str(path)
    return DatasetOptions.model_validate({"systems": systems, "targets": {"energy": {}}})


def test_frames_that_did_not_converge_are_left_out_kept_or_refused(half_converged, package_log):
    kept = read_structures(of(half_converged))
    assert [structure.index for structure in kept] == [0, 2]  # their numbers stay
    assert "frame 1 did not converge (1 of 3 frames)" in package_log.text
    assert len(read_structures(of(half_converged, unconverged="keep"))) == 3
    with pytest.raises(DataError, match=r"frame 1 did not converge.*unconverged: drop"):
        read_structures(of(half_converged, unconverged="error"))
    only = of(half_converged).model_copy(update={"indices": (1,)})
    with pytest.raises(DataError, match="No other frame is left"):
        read_structures(only)


def test_a_file_that_was_read_is_not_parsed_again_until_it_changes(half_converged):
    first = read_file(half_converged)
    assert read_file(half_converged) is first
    half_converged.write_text(half_converged.read_text().replace("energy=-1.0", "energy=-9.0"))
    assert read_file(half_converged).frames[0].get_potential_energy() == -9.0


@pytest.mark.parametrize(
    ("stated", "energy", "force", "stress"),
    [
        ("energy-unit=kcal/mol", 0.0433641, None, None),
        ("energy_unit=eV force-unit=Hartree/Bohr", 1.0, 51.42207, None),
        ("stress-unit=GPa", 1.0, 1.0, 0.00624151),
        ("units=atomic", 27.211386, 51.42207, 183.6315),
        ('unit_stress="eV/Ang^3"', 1.0, 1.0, 1.0),
    ],
)
def test_units_that_a_file_states_are_used(tmp_path, package_log, stated, energy, force, stress):
    (tmp_path / "x.xyz").write_text(
        '1\nLattice="9 0 0 0 9 0 0 0 9" energy=1 stress="1 0 0 0 1 0 0 0 1" '
        f"Properties=species:S:1:pos:R:3:forces:R:3 {stated}\nAr 1 0 0 1 0 0\n"
    )
    (structure,) = read_structures(of(tmp_path / "x.xyz"))
    assert structure.labels["energy"].item() == pytest.approx(energy, rel=1e-5)
    if force is not None:
        assert structure.labels["energy/forces"][0, 0].item() == pytest.approx(force, rel=1e-4)
    if stress is not None:
        assert structure.labels["energy/stress"][0, 0].item() == pytest.approx(stress, rel=1e-4)
    changed = (energy, force or 1.0, stress or 1.0) != (1.0, 1.0, 1.0)
    assert ("states" in package_log.text) == changed


def test_units_that_contradict_the_options_are_refused(tmp_path):
    (tmp_path / "x.xyz").write_text("1\nenergy=1 energy-unit=kcal/mol\nAr 0 0 0\n")
    options = {"systems": str(tmp_path / "x.xyz"), "targets": {"energy": {"unit": "Hartree"}}}
    with pytest.raises(DataError, match=r"energy-unit=kcal/mol, and the options say Hartree"):
        read_structures(DatasetOptions.model_validate(options))
    options["targets"]["energy"]["unit"] = "kcal/mol"
    (structure,) = read_structures(DatasetOptions.model_validate(options))
    assert structure.labels["energy"].item() == pytest.approx(0.0433641, rel=1e-5)
    (tmp_path / "x.xyz").write_text("1\nenergy=1 energy-unit=eV/atom\nAr 0 0 0\n")
    with pytest.raises(DataError, match="no unit of the energy"):
        read_structures(DatasetOptions.model_validate(options))


POSCAR = """\
silica
1.0
5 0 0
0 5 0
0 0 5
Si O
1 {count}
{flags}Direct
0.0 0.0 0.0{three}
0.3 0.0 0.0{three}
0.0 0.3 0.0{three}
{rest}"""


@pytest.mark.parametrize("flags", ["", "Selective dynamics\n"])
def test_a_poscar_holds_no_more_atoms_than_it_says(tmp_path, flags):
    three = " T F T" if flags else ""
    velocities = "\n0.1 0.0 0.0\n0.0 0.0 0.0\n0.0 0.0 0.0\n"
    for rest in ("", velocities):
        text = POSCAR.format(count=2, flags=flags, three=three, rest=rest)
        (tmp_path / "POSCAR").write_text(text)
        assert len(read_frames(tmp_path / "POSCAR")[0]) == 3
    (tmp_path / "POSCAR").write_text(POSCAR.format(count=1, flags=flags, three=three, rest=""))
    with pytest.raises(DataError, match=r"line 7 that it has 2 atoms, and line 1[12] holds"):
        read_frames(tmp_path / "POSCAR")


@pytest.mark.parametrize(
    ("unit", "length", "energy"), [("bohr", 0.529177, 1.0), ("kcal/mol", 1.0, 0.0433641)]
)
def test_a_unit_without_a_quantity_is_of_its_own(tmp_path, unit, length, energy):
    text = f'1\nunits={unit} energy=1.0 pbc="F F F"\nO 1.0 0 0\n'
    (tmp_path / "a.xyz").write_text(text)
    options = {"systems": {"read_from": str(tmp_path / "a.xyz")}, "targets": {"energy": {}}}
    (structure,) = read_structures(DatasetOptions.model_validate(options))
    assert float(structure.positions[0, 0]) == pytest.approx(length, abs=1e-5)
    assert float(structure.labels["energy"]) == pytest.approx(energy, abs=1e-5)


def test_units_of_a_database_of_schnetpack_are_used(tmp_path, caplog):
    with ase.db.connect(tmp_path / "a.db") as rows:
        rows.metadata = {
            "_distance_unit": "Bohr",
            "_property_unit_dict": {"energy": "kcal/mol", "forces": "kcal/mol/Ang"},
        }
        rows.write(molecule("H2O"), data={"energy": [23.06055], "forces": np.ones((3, 3))})
    target = {"energy": {"key": "energy", "forces": {"key": "forces"}}}
    options = DatasetOptions.model_validate(
        {"systems": {"read_from": str(tmp_path / "a.db")}, "targets": target}
    )
    (structure,) = read_structures(options)
    assert float(structure.labels["energy"]) == pytest.approx(1.0, abs=1e-5)
    assert float(structure.labels["energy/forces"][0, 0]) == pytest.approx(1 / 23.06055, abs=1e-5)
    expected = molecule("H2O").positions * 0.529177
    assert np.allclose(structure.positions, expected, atol=1e-4)
    assert "energy-unit=kcal/mol" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"@module": "pymatgen.core.structure", "lattice": {}}', "to_ase_atoms"),
        ('[{"structure": {"@module": "pymatgen.core.structure"}, "energy": 1}]', "VASP's sign"),
    ],
)
def test_files_of_others_that_no_reader_knows_are_named(tmp_path, content, words):
    (tmp_path / "data.cfg").write_text(content)
    with pytest.raises(DataError, match=words):
        read_frames(tmp_path / "data.cfg")


def test_a_box_without_its_bounds_is_named(tmp_path):
    text = DUMP.replace("BOUNDS pp pp pp", "BOUNDS").replace("type", "element")
    (tmp_path / "a.dump").write_text(text.replace("1 1 0.0", "1 O 0.0").replace("2 2 1.0", "2 H 1"))
    with pytest.raises(DataError, match="BOX BOUNDS pp pp pp"):
        read_frames(tmp_path / "a.dump")


ATOM = "ATOM      1  O   HOH A   1       0.000   0.000   0.100  1.00  0.00           O\n"


def test_a_unit_cell_of_1_angstrom_in_a_pdb_is_none(tmp_path):
    line = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
    (tmp_path / "a.pdb").write_text(line + ATOM + "END\n")
    (atoms,) = read_frames(tmp_path / "a.pdb")
    assert not atoms.pbc.any()
    assert not atoms.cell.any()


@pytest.mark.parametrize(("group", "told"), [("P 1", False), ("P 21 21 21", True), ("", False)])
def test_symmetry_that_a_pdb_asks_for_is_told_of(tmp_path, package_log, group, told):
    line = f"CRYST1   10.000   10.000   10.000  90.00  90.00  90.00 {group:11s}   4\n"
    (tmp_path / "a.pdb").write_text(line + ATOM + "END\n")
    (atoms,) = read_frames(tmp_path / "a.pdb")
    assert atoms.pbc.all()
    assert ("space group P 21 21 21" in package_log.text) == told


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.cif", "data_x\n_cell_length_a 5\n_cell_length_b 5\n_cell_length_c 5\n"
         "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 90\nloop_\n"
         "_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
         "Si1 0 0 ?\n", "three numbers, not `?`"),
        ("POSCAR", "mine\n1.0\n0 2 2\n2 0 2\n2 2 0\n2\nDirect\n0 0 0\n.2 .2 .2\n",
         "names their elements"),
        ("XDATCAR", "x\n 1\n 5 0 0\n 0 5 0\n 0 0 5\n Si\n 2\nDirect configuration=     1\n 0 0 0\n"
         " .2 .2 .2\nDirect configuration=     2\n 0 0 0\n", "as many rows"),
        ("a.out", "     Program PWSCF v.7.2 starts on\n     celldm(1)= 10.\n", "it is cut off"),
    ],
)  # fmt: skip
def test_what_ase_says_in_riddles_is_explained(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    assert words in refused(tmp_path / name)


def test_labels_of_types_in_a_data_file_of_lammps(tmp_path):
    (tmp_path / "data.nacl").write_text(
        "LAMMPS\n\n2 atoms\n2 atom types\n0 5 xlo xhi\n0 5 ylo yhi\n0 5 zlo zhi\n\n"
        "Atom Type Labels\n\n1 Na\n2 Cl\n\nMasses\n\nNa 22.99\nCl 35.45\n\n"
        "Atoms # charge\n\n1 Cl -1.0 0 0 0\n2 Na 1.0 2.5 2.5 2.5\n"
    )
    (atoms,) = read_frames(tmp_path / "data.nacl")
    assert atoms.get_chemical_symbols() == ["Cl", "Na"]
    assert atoms.positions[1].tolist() == [2.5, 2.5, 2.5]


def test_an_output_of_another_program_is_none_of_quantum_espresso(tmp_path):
    (tmp_path / "x.out").write_text("  Psi4: An Open-Source Package\n  Final Energy: -76.4\n")
    message = refused(tmp_path / "x.out")
    assert "neither name nor content says which format it is" in message


def test_operations_of_a_cif_without_a_name(tmp_path):
    (tmp_path / "a.cif").write_text(
        "data_x\n_cell_length_a 5\n_cell_length_b 5\n_cell_length_c 5\n_cell_angle_alpha 90\n"
        "_cell_angle_beta 90\n_cell_angle_gamma 90\nloop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n"
        "'-x,-y,-z'\nloop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n"
        "_atom_site_fract_z\nFe1 0.1 0.1 0.1\n"
    )
    assert "name of the space group" in refused(tmp_path / "a.cif")


N2P2 = """\
begin
comment of two atoms
lattice 10.0 0.0 0.0
lattice 0.0 10.0 0.0
lattice 0.0 0.0 10.0
atom 0.0 0.0 0.0 H 0.0 0.0 0.1 0.0 0.0
atom 1.4 0.0 0.0 H 0.0 0.0 -0.1 0.0 0.0
energy -1.1
charge 0.0
end
"""


@pytest.mark.parametrize(
    ("form", "length", "energy"), [("", 0.5291772, 27.2113862), ("n2p2", 1.0, 1.0)]
)
def test_the_units_of_n2p2_are_said_and_chosen(tmp_path, package_log, form, length, energy):
    file = tmp_path / "input.data"
    file.write_text(N2P2)
    (frame,) = read_frames(file, form)
    assert frame.positions[1, 0] == pytest.approx(1.4 * length)
    assert frame.cell.lengths() == pytest.approx(10.0 * length)
    assert frame.get_potential_energy() == pytest.approx(-1.1 * energy)
    assert frame.get_forces()[0, 0] == pytest.approx(0.1 * energy / length)
    assert ("in Bohr and Hartree" in package_log.text) == (not form)


def test_values_of_metatensor_without_structures_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "energy.mts", "w") as archive:
        archive.writestr("keys.npy", b"")
    with pytest.raises(DataError, match="holds values of metatensor"):
        read_frames(tmp_path / "energy.mts")


@pytest.mark.parametrize(
    "form",
    ["gen", "mol", "sdf", "dlp4", "rmc6f", "n2p2", "runnerdata", "nwchem-in", "proteindatabank",
     "gromos", "res", "turbomole"],
)  # fmt: skip
def test_a_structure_that_is_cut_off_is_refused(tmp_path, form):
    file = tmp_path / "a"
    atoms = bulk("SiC", "zincblende", a=4.36) if form in ("rmc6f", "res") else molecule("H2O")
    if "n2p2" in form or "runner" in form:
        file.write_text(N2P2)
    else:
        write(file, atoms, format="mol" if form == "sdf" else form)  # sdf is mol, several times
    whole = file.read_text()
    assert len(read_frames(file, form)[-1]) in (2, 3)
    lines = whole.splitlines(keepends=True)
    last = max(k for k, line in enumerate(lines) if re.search(r"\b[HhC]\b|\dH|^ +3 2", line))
    file.write_text("".join(lines[:last]))
    with pytest.raises(DataError, match="cut off|has no|ASE cannot read"):
        read_frames(file, form)


@pytest.mark.parametrize("form", ["cif", "gaussian-in", "xsf"])
def test_a_last_number_that_is_cut_off_is_told_of(tmp_path, package_log, form):
    file = tmp_path / "a"
    write(file, bulk("SiC", "zincblende", a=4.36) * 2, format=form)
    whole = file.read_text().rstrip()
    for text, told in ((whole + "\n", False), (whole, False), (whole[:-3], True)):
        package_log.clear()
        file.write_text(text)
        read_frames(file, form)
        assert ("last number fewer decimals" in package_log.text) == told


def test_a_name_that_is_not_utf8_is_told_of(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path / "d") + b"\xe4ta.xyz"))
    write(file, molecule("H2O"), format="extxyz")
    with pytest.raises(DataError, match=r"name of the data file '.*d\\udce4ta.xyz' is not UTF-8"):
        read_frames(file)


def test_arrays_of_md17_and_its_like_are_read(tmp_path, package_log):
    path, rng = tmp_path / "ethanol.npz", np.random.default_rng(0)
    positions, forces = rng.normal(size=(2, 2, 3, 3))
    arrays = {
        "R": positions,
        "F": forces,
        "E": np.array([[-1.0], [-2.0]]),
        "z": np.array([8, 1, 1]),
    }
    np.savez(path, **arrays, e_unit="kcal/mol", r_unit="Ang", theory="PBE")
    first, second = read_structures(of(path))
    assert second.labels["energy"].item() == pytest.approx(-2.0 * kcal / mol)
    assert second.labels["energy/forces"].numpy() == pytest.approx(forces[1] * kcal / mol)
    assert (first.positions.numpy() == positions[0]).all()
    assert first.numbers.tolist() == [8, 1, 1]
    assert not first.pbc.any()
    assert "theory are not read" in package_log.text
    padded = {
        "numbers": np.array([[8, 1, 0], [8, 1, 1]]),
        "coords": positions,
        "cell": np.eye(3) * 9,
    }
    np.savez(path, **padded, pbc=np.array([True, True, False]))
    first, second = read_frames(path)
    assert (len(first), len(second)) == (2, 3)
    assert first.pbc.tolist() == [True, True, False]
    np.savez(path, **(arrays | {"F": forces[0]}))
    assert "the forces have the shape (3, 3)" in refused(path)


def test_folders_of_deepmd_are_read(tmp_path):
    rng, arrays = np.random.default_rng(0), tmp_path / "water" / "set.000"
    arrays.mkdir(parents=True)
    (tmp_path / "water" / "type.raw").write_text("0\n1\n1\n")
    coordinates, forces, virial = (rng.normal(size=(2, size)) for size in (9, 9, 9))
    virial = virial + virial.reshape(2, 3, 3).transpose(0, 2, 1).reshape(2, 9)
    np.save(arrays / "coord.npy", coordinates)
    np.save(arrays / "force.npy", forces)
    np.save(arrays / "energy.npy", np.array([-1.0, -2.0]))
    np.save(arrays / "virial.npy", virial)
    np.save(arrays / "box.npy", np.tile(8.0 * np.eye(3).ravel(), (2, 1)))
    assert "write their symbols into type_map.raw" in refused(tmp_path)
    (tmp_path / "water" / "type_map.raw").write_text("O\nH\n")
    _, second = read_structures(of(tmp_path))
    assert second.numbers.tolist() == [8, 1, 1]
    assert second.labels["energy"].item() == -2.0
    assert second.labels["energy/forces"].numpy() == pytest.approx(forces[1].reshape(3, 3))
    assert second.labels["energy/stress"].numpy() == pytest.approx(-virial[1].reshape(3, 3) / 512)
    np.save(arrays / "real_atom_types.npy", np.array([[1, 0, -1], [0, 1, 1]]))
    (tmp_path / "water" / "nopbc").touch()
    first, _ = read_frames(tmp_path)
    assert (first.get_chemical_formula(), first.pbc.any(), "stress" in first.info) == (
        "HO",
        False,
        False,
    )
    np.save(arrays / "force.npy", forces[:1])
    assert "cannot be read" in refused(tmp_path)


MLIP = """BEGIN_CFG
 Size
    2
 Supercell
         4.0 0.0 0.0
         0.0 4.0 0.0
         0.0 0.0 4.0
 AtomData:  id type       cartes_x      cartes_y      cartes_z           fx          fy          fz
             1    0       0.0 0.0 0.0     0.1 0.2 0.3
             2    1       2.0 2.0 2.0    -0.1 -0.2 -0.3
 Energy
        -7.5
 PlusStress:  xx          yy          zz          yz          xz          xy
         6.4 0.0 0.0 0.0 0.0 -3.2
 Feature   EFS_by       VASP
END_CFG
"""


def test_configurations_of_mlip_are_read(tmp_path):
    path = tmp_path / "train.cfg"
    path.write_text(MLIP + "\n" + MLIP.replace("-7.5", "-8.5"))
    assert "types of atoms (0, 1) that no element is given for" in refused(path)
    systems = {"types": {0: "Na", 1: "Cl"}}
    _, second = read_structures(of(path, **systems))
    assert second.numbers.tolist() == [11, 17]
    assert second.pbc.all()
    assert second.labels["energy"].item() == -8.5
    assert second.labels["energy/forces"][1].tolist() == [-0.1, -0.2, -0.3]
    stress = second.labels["energy/stress"]
    assert (stress[0, 0].item(), stress[0, 1].item()) == pytest.approx((-0.1, 0.05))
    cut, missing = MLIP[:-8], MLIP.replace("    2\n", "    3\n")
    damaged = MLIP.replace(" 0.3\n", "\n")
    for text, words in ((cut, "END_CFG"), (missing, "2 of 3 atoms"), (damaged, "cannot be read")):
        path.write_text(text)
        assert words in refused(path, **systems)


def ml_ab(count: int = 2) -> str:
    light, heavy, single = (f"{sign * 50}\n" for sign in ("-", "*", "="))
    text = f" 1.0 Version\n{heavy}     The number of configurations\n{light}     {count}\n{heavy}"
    for number in (1, 2):
        text += f"     Configuration num.      {number}\n{single}"
        text += single.join(
            f"     {name}\n{light}{values}"
            for name, values in (
                ("System name", "     salt\n"),
                ("The number of atoms", "     3\n"),
                ("Atom types and atom numbers", "     Na   1\n     Cl   2\n"),
                ("Primitive lattice vectors (ang.)", "4.0 0.0 0.0\n0.0 4.0 0.0\n0.0 0.0 5.0\n"),
                ("Atomic positions (ang.)", "0.0 0.0 0.0\n2.0 0.0 0.0\n0.0 2.0 0.0\n"),
                ("Total energy (eV)", f"     -{number}.5\n"),
                ("Forces (eV ang.^-1)", "0.1 0.0 0.0\n0.2 0.0 0.0\n-0.3 0.0 0.0D+00\n"),
                (
                    "Stress (kbar)",
                    f" XX YY ZZ\n{light}1.0 2.0 3.0\n{light} XY YZ ZX\n{light}4 5 6\n",
                ),
            )
        )
        text += heavy
    return text


def test_data_of_vasp_s_learned_force_fields_are_read(tmp_path):
    path = tmp_path / "ML_ABN"
    path.write_text(ml_ab())
    first, second = read_structures(of(path))
    assert second.numbers.tolist() == [11, 17, 17]
    assert second.pbc.all()
    assert (first.labels["energy"].item(), second.labels["energy"].item()) == (-1.5, -2.5)
    assert second.labels["energy/forces"][:, 0].tolist() == [0.1, 0.2, -0.3]
    expected = np.array([[1.0, 4.0, 6.0], [4.0, 2.0, 5.0], [6.0, 5.0, 3.0]]) * -0.1 * GPa
    assert second.labels["energy/stress"].numpy() == pytest.approx(expected)
    for text, words in (
        (ml_ab(3), "says it has 3 configurations, and 2 are there"),
        (ml_ab()[:-500], "frame 1 of"),
    ):
        path.write_text(text)
        assert words in refused(path)
