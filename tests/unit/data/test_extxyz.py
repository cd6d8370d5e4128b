"""Extended XYZ is read whole: no frame, column, cell or element is lost or made up."""

from __future__ import annotations

import bz2
import gzip
import lzma

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.io import write

from pet_finetune.config.dataset import DatasetOptions
from pet_finetune.data.extxyz import read_extxyz
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.readers import read_structures
from pet_finetune.data.symbols import element_of
from pet_finetune.errors import DataError

WATER = """\
3
Properties=species:S:1:pos:R:3 energy=-1.5
O 0.000 0.000 0.000
H 0.960 0.000 0.000
H 0.000 0.960 0.000
"""
WIDER = WATER.replace("O 0.000", "O -10.000")  # its rows have several lengths


def read(text: str, **options):
    return read_extxyz(text, "w.xyz", **options)


def refused(text: str, **options) -> str:
    with pytest.raises(DataError) as error:
        read(text, **options)
    return str(error.value)


@pytest.mark.parametrize("between", ["\n", "\n\n  \n", " \n"])
def test_frames_behind_empty_lines_are_read(between):
    frames = read(WATER + between + WATER + between)
    assert [len(atoms) for atoms in frames] == [3, 3]
    assert frames[1].get_potential_energy() == -1.5


def test_an_empty_comment_is_no_end():
    assert len(read("1\n\nAr 0 0 0\n1\n\nAr 0 0 0\n")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WATER + "trailing words\n", ["line 6", "frame 0", "'trailing words'"]),
        (WATER.replace("3\n", "2\n", 1), ["line 5", "more than frame 0", "line 1"]),
        (WATER.replace("3\n", "4\n", 1) + WATER, ["line 6 (frame 0)", "'3'", "too large"]),
        (WATER + WATER[:-22], ["last frame, 1", "line 6", "cut off", "3 atoms, and 2"]),
        (WATER + WATER[:-4], ["last frame, 1", "line 6", "ends within a row"]),
        (WATER + WIDER[:-2], ["last frame, 1", "line 6", "ends within a row"]),
        (WATER.replace("0.960", "O.960", 1), ["line 4", "column 2", "'O.960'"]),
        (WATER.replace(" 0.000\nH", "\nH", 1), ["line 3", "4 columns"]),
        ("three\n" + WATER, ["line 1", "'three'"]),
    ],
)
def test_what_cannot_be_read_is_named_by_frame_and_line(text, words):
    message = refused(text)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("column", "other", "words"),
    [
        ("Z:I:1", "6", "species is 'H' and Z is '6', which is C"),
        ("numbers:I:1", "8", "numbers is '8', which is O"),
        ("atomic_numbers:I:1", "2", "atomic_numbers is '2', which is He"),
        ("element:S:1", "C", "element is 'C'. Remove"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(column, other, words):
    right = {"O": "8", "H": "1"} if ":I:" in column else {"O": "O", "H": "H"}
    rows = [("O", 0.0, right["O"]), ("H", 0.9, right["H"]), ("H", 1.8, right["H"])]

    def text(rows):
        lines = [f"{symbol} {x} 0 0 {more}\n" for symbol, x, more in rows]
        return f"3\nProperties=species:S:1:pos:R:3:{column}\n{''.join(lines)}"

    assert str(read(text(rows))[0].symbols) == "OH2"
    message = refused(text([*rows[:2], ("H", 1.8, other)]))
    assert words in message
    assert "line 5" in message


def test_numbers_decide_where_labels_are_no_elements():
    (atoms,) = read("1\nProperties=species:S:1:pos:R:3:Z:I:1\nOW 0 0 0 8\n")
    assert list(atoms.numbers) == [8]


def test_columns_that_are_not_named_are_said(package_log):
    read("1\nplain\nAr 0 0 0 0.1 0.2 0.3\n")
    assert "not read" in package_log.text


def test_six_numbers_of_a_stress_are_in_the_order_of_voigt(package_log):
    voigt = 'Lattice="9 0 0 0 9 0 0 0 9" stress="1 2 3 4 5 6" virial=[1, 2, 3, 4, 5, 6]'
    (atoms,) = read(WATER.replace("energy", voigt + " energy"))
    np.testing.assert_array_equal(atoms.get_stress(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(atoms.info["virial"], [[1, 6, 5], [6, 2, 4], [5, 4, 3]])
    assert "xx yy zz yz xz xy" in package_log.text


@pytest.mark.parametrize("nine", ['"1 6 5 6 2 4 5 4 3"', "[[1, 6, 5], [6, 2, 4], [5, 4, 3]]"])
def test_nine_numbers_of_a_stress_flat_and_nested(nine):
    (atoms,) = read(WATER.replace("energy", f"stress={nine} energy"))
    np.testing.assert_array_equal(atoms.get_stress(), [1, 2, 3, 4, 5, 6])


def test_other_counts_of_numbers_are_refused():
    message = refused(WATER.replace("energy", 'stress="1 2 3 4" energy'))
    assert "line 2" in message
    assert "6 in the order xx yy zz yz xz xy" in message


def test_fortran_exponents():
    (atoms,) = read(WATER.replace("H 0.960", "H 0.960D+00"))
    assert atoms.positions[1, 0] == 0.96


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("fe", ("Fe", None)), ("26", ("Fe", None)), ("C1", ("C", None)), ("C_a", ("C", None)),
        ("Fe2+", ("Fe", None)), ("Cl-", ("Cl", None)), ("D", ("H", 2.014)), ("T", ("H", 3.016)),
        ("2H", ("H", 2.014)), ("13C", ("C", 13.0)), ("OW", None), ("X", None), ("0", None),
        ("119", None), ("1C", None), ("Du1", None),
    ],
)  # fmt: skip
def test_labels_of_atoms(label, expected):
    found = element_of(label)
    if expected is None or expected[1] is None:
        assert found == expected
    else:
        assert found is not None
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], abs=1e-3)


def test_isotopes_keep_their_masses():
    (atoms,) = read(WATER.replace("H 0.960", "D 0.960"))
    assert atoms.get_chemical_symbols() == ["O", "H", "H"]
    assert atoms.get_masses() == pytest.approx([15.999, 2.014, 1.008], abs=1e-3)


def test_numbers_in_place_of_symbols_are_atomic_numbers():
    (atoms,) = read(WATER.replace("O 0", "8 0").replace("H 0", "1 0"))
    assert atoms.get_chemical_formula() == "H2O"


@pytest.mark.parametrize("comment", ["Properties=species:S:1:pos:R:3", "Atoms. Timestep: 0"])
def test_numbers_from_one_on_are_types_and_asked_for(comment):
    text = f"3\n{comment}\n1 0 0 0\n2 1 0 0\n2 0 1 0\n"
    assert "types: {1: O, 2: H}" in refused(text)
    (atoms,) = read(text, types={1: "O", 2: "H"})
    assert atoms.get_chemical_formula() == "H2O"
    assert "type 2" in refused(text, types={1: "O"})


@pytest.mark.parametrize(
    ("label", "words"), [("X", "dummy atom"), ("OW", "'OW' is no element"), ("0", "dummy")]
)
def test_atoms_that_are_none(label, words):
    message = refused(WATER.replace("O 0", f"{label} 0"))
    assert words in message
    assert "line 3" in message


@pytest.mark.parametrize(
    "comment",
    [
        "cell: 12.4 12.4 12.4",
        "Box = 12.4, 12.4, 12.4",
        "box 12. 12. 12.",
        'cell="12.4 0 0 0 12.4 0 0 0 12.4" energy=1',
        "# CELL(abcABC): 12.4 12.4 12.4 90.0 90.0 90.0  Step: 0",
        'lattice="12.4 0 0 0 12.4 0 0 0 12.4"',
        "CRYST1 12.4 12.4 12.4 90 90 90",
        "12.4 12.4 12.4",
        "12.4 0 0 0 12.4 0 0 0 12.4",
        "12.4 12.4 12.4 90 90 90",
        "a=12.4 b=12.4 c=12.4",
        "Lx = 12.4, Ly = 12.4, Lz = 12.4",
        "cell_x: 12.4 cell_y: 12.4 cell_z: 12.4",
        "PBC 12.4 12.4 12.4 90 90 90",
        "Periodic 12.4 12.4 12.4",
        "boxsize 12.4",
        "box length: 12.4",
        "lattice constant 12.4",
        "celldm(1) = 23.4",
        "Water box 12.4 A",
        "vec1 12.4 0 0 vec2 0 12.4 0 vec3 0 0 12.4",
        "dimensions 12.4 12.4 12.4",
        "Tv 12.4 0 0",
    ],
)
def test_a_cell_that_would_be_lost_is_refused(comment):
    message = refused(f"1\n{comment}\nAr 0 0 0\n")
    assert "molecule in vacuum" in message
    assert "line 2" in message
    (atoms,) = read(f'1\nnote="{comment.replace(chr(34), "")}" pbc="F F F"\nAr 0 0 0\n')
    assert not atoms.pbc.any()


@pytest.mark.parametrize(
    "comment",
    [
        "water box 64 molecules",
        "box 1234",
        "cell 12 of 64",
        "i = 3, time = 1.5, E = -17.1646",
        "-76.3 0.1 0.2",
        "gdb 1 3 4 5",
        "periodic image 0 0 0",
        "dipole x=1.0 y=2.0 z=3.0",
        "rotational constants A=9.1 B=3.2 C=2.7",
        "box 3 a test",
    ],
)
def test_comments_without_a_cell_stay_molecules(comment):
    (atoms,) = read(f"1\n{comment}\nAr 0 0 0\n")
    assert not atoms.pbc.any()


def test_plain_xyz_loses_no_lattice():
    text = '1\nLattice="9 0 0 0 9 0 0 0 9"\nAr 0 0 0\n'
    assert read(text)[0].pbc.all()
    assert "molecule in vacuum" in refused(text, plain=True)


def test_encodings_and_line_ends(tmp_path):
    text = WATER.replace("energy", 'note="5 Å" energy')
    contents = {
        "bom": text.encode("utf-8-sig"),
        "utf16": text.encode("utf-16"),
        "latin1": text.encode("latin-1"),
        "dos": text.replace("\n", "\r\n").encode(),
        "mac": text.replace("\n", "\r").encode(),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.xyz").write_bytes(content)
        (atoms,) = read_frames(tmp_path / f"{name}.xyz")
        assert atoms.info["note"] == "5 Å", name
        assert atoms.get_potential_energy() == -1.5


@pytest.mark.parametrize(
    ("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_packed_files(tmp_path, ending, pack):
    file = tmp_path / f"w.xyz{ending}"
    file.write_bytes(pack((WATER + "\n" + WATER).encode()))
    assert len(read_frames(file)) == 2
    file.write_bytes(pack(WATER.encode() * 50)[:-20])
    with pytest.raises(DataError, match="damaged or cut off"):
        read_frames(file)


def test_the_same_as_ase_where_ase_is_right(tmp_path):
    frames = [bulk("NaCl", "rocksalt", a=5.6), molecule("CH3CH2OH")]
    for atoms in frames:
        atoms.info.update(name="a b", values=np.arange(3.0))
        atoms.set_velocities(np.ones((len(atoms), 3)))
    write(tmp_path / "a.xyz", frames)
    for atoms, own in zip(frames, read_frames(tmp_path / "a.xyz"), strict=True):
        np.testing.assert_allclose(atoms.positions, own.positions, atol=1e-7)
        np.testing.assert_allclose(atoms.cell.array, own.cell.array)
        np.testing.assert_allclose(atoms.get_momenta(), own.get_momenta(), atol=1e-7)
        assert atoms.pbc.tolist() == own.pbc.tolist()
        assert own.info["name"] == "a b"
        assert own.info["values"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ghost", ["H:", "H-Bq", "H_ghost", "H(Bq)", "@H", "Gh(H)", "bqH", "Bq1"])
def test_a_ghost_atom_is_no_atom(ghost):
    assert element_of(ghost) is None
    assert "dummy atom" in refused(WATER.replace("H 0.960", f"{ghost} 0.960"))


def test_exponents_of_fortran_in_the_comment():
    (atoms,) = read(WATER.replace("-1.5", "-0.15D+01 tag=12D34 note=1.5Dx"))
    assert atoms.get_potential_energy() == -1.5
    assert atoms.info == {"tag": "12D34", "note": "1.5Dx"}


SILICON = bulk("Si", cubic=True) * (2, 1, 1)
CP2K = "3\n i = 0, time = 0.5, E = -17.2\nO 0 0 0\nH 0.96 0 0\nH 0 0.96 0\n"


def test_trajectories_of_cp2k_lose_no_cell(caplog):
    with caplog.at_level("INFO"):
        (atoms,) = read(CP2K)
    assert not atoms.pbc.any()
    assert "Hartree" in caplog.text
    two = CP2K.replace("3\n", "6\n", 1) + "O 9 0 0\nH 9.96 0 0\nH 9 0.96 0\n"
    assert "no cell" in refused(two)
    assert len(read(two.replace("-17.2", '-17.2 pbc="F F F"'))[0]) == 6
    assert read(two.replace("-17.2", '-17.2 Lattice="9 0 0 0 9 0 0 0 9"'))[0].pbc.all()
    with pytest.raises(DataError, match="forces or velocities"):
        read_extxyz(CP2K, "run/WATER-frc-1.xyz")
    assert "no cell" in refused(two.replace("time = 0.5, ", ""))  # of an optimisation
    rows = (
        f"{s} {p[0]} {p[1]} {p[2]}" for s, p in zip(SILICON.symbols, SILICON.positions, strict=True)
    )
    assert "no cell" in refused("16\n i = 1, E = -63.1\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("plain", [False, True])
def test_a_frame_of_i_pi_says_the_unit_of_its_positions(tmp_path, plain):
    comment = "# Step: 0 Bead: 0 positions{atomic_unit} cell{angstrom}"
    (tmp_path / "a.xyz").write_text(f"2\n{comment}\nH 0 0 0\nH 0 0 1.4\n")
    systems = {"read_from": str(tmp_path / "a.xyz"), "format": "xyz" if plain else ""}
    (found,) = read_structures(DatasetOptions.model_validate({"systems": systems, "targets": {}}))
    assert float(found.positions[1, 2]) == pytest.approx(1.4 * 0.529177, rel=1e-5)
    assert "holds forces" in refused(f"1\n{comment.replace('positions', 'forces')}\nH 0 0 0\n")


def test_columns_without_positions_are_refused():
    assert "all atoms would be at the origin" in refused(WATER.replace(":pos:", ":frac:"))
    assert read(WATER.replace(":pos:", ":positions:"))[0].positions[1, 0] == 0.96


def test_a_key_of_one_meaning_stands_once():
    message = refused(WATER.replace("energy=-1.5", "energy=-1.5 energy=-2.5"))
    assert "energy stands more than once" in message


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_files_under_another_name(tmp_path, pack):
    (tmp_path / "w.xyz").write_bytes(pack(WATER.encode()))
    assert len(read_frames(tmp_path / "w.xyz")) == 1
    (tmp_path / "w.xyz.gz").write_bytes(WATER.encode())  # a browser has unpacked it
    assert len(read_frames(tmp_path / "w.xyz.gz")) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x28\xb5\x2f\xfd" + bytes(9), "Zstandard"),
        (bytes(257) + b"ustar" + bytes(250), "tar -xf"),
        (b"PK\x03\x04" + bytes(99), "zip archive"),
        (b"PK\x03\x04" + bytes(26) + b"best_model/data.pkl" + bytes(99), "is a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><title>404</title></html>", "a web page"),
    ],
)
def test_what_is_no_data_says_what_it_is(tmp_path, content, words):
    (tmp_path / "w.xyz").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_frames(tmp_path / "w.xyz")
    if words == "tar -xf":
        (tmp_path / "w.tar.gz").write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=words):
            read_frames(tmp_path / "w.tar.gz")


@pytest.mark.parametrize("ending", ["xyz", "traj"])
def test_types_that_are_given_for_nothing_are_told(tmp_path, caplog, ending):
    write(tmp_path / f"w.{ending}", molecule("H2O"))
    read_frames(tmp_path / f"w.{ending}", types={1: "O"})
    assert "types that are given are not used" in caplog.text
    caplog.clear()
    assert str(read("1\nAtoms. Timestep: 0\n1 0 0 0\n", types={1: "O"})[0].symbols) == "O"
    assert not caplog.text
