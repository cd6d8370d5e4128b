"""Elements from the names of atoms in files of biomolecules: one meaning, or a question."""

from __future__ import annotations

import pytest

from pet_finetune.data.frame_files import read_frames
from pet_finetune.errors import DataError


def gro(*atoms: tuple[str, str]) -> str:
    rows = [
        f"{k:5d}{residue:<5s}{name:>5s}{k:5d}{0.2 * k:8.3f}{0.0:8.3f}{0.0:8.3f}\n"
        for k, (name, residue) in enumerate(atoms, 1)
    ]
    return f"made by hand\n{len(rows)}\n{''.join(rows)}   3.0   3.0   3.0\n"


def pdb(name: str, residue: str, element: str) -> str:
    return (
        f"ATOM      1 {name:4s} {residue:>3s} A   1       1.000   2.000   3.000  1.00  0.00"
        f"          {element:>2s}\nEND\n"
    )


@pytest.mark.parametrize(
    ("name", "residue", "symbol"),
    [
        ("OW", "SOL", "O"),
        ("HW1", "SOL", "H"),
        ("CA", "ALA", "C"),  # calcium for ASE
        ("HG1", "THR", "H"),  # mercury
        ("1HB", "ALA", "H"),
        ("CA", "CA", "Ca"),
        ("NA", "NA+", "Na"),
        ("CL", "CL", "Cl"),  # carbon
        ("LI", "MOL", "Li"),  # iodine
        ("Cl1", "MOL", "Cl"),
        ("C1", "MOL", "C"),
        ("Zn", "ZN", "Zn"),
    ],
)
def test_a_name_with_one_meaning(tmp_path, name, residue, symbol):
    (tmp_path / "a.gro").write_text(gro((name, residue), ("OW", "SOL")))
    (atoms,) = read_frames(tmp_path / "a.gro")
    assert atoms.get_chemical_symbols() == [symbol, "O"]
    assert atoms.pbc.all()


@pytest.mark.parametrize(
    ("name", "words"),
    [("CL1", "'CL1' of residue 'MOL': C or Cl"), ("NA", "N or Na"), ("MW", "no element")],
)
def test_other_names_are_asked_about(tmp_path, name, words):
    (tmp_path / "a.gro").write_text(gro((name, "MOL")))
    with pytest.raises(DataError, match=words):
        read_frames(tmp_path / "a.gro")


def test_several_frames_of_gromacs(tmp_path):
    (tmp_path / "a.gro").write_text(gro(("CA", "ALA")) + gro(("CA", "ALA"), ("CA", "CA")))
    assert [str(atoms.symbols) for atoms in read_frames(tmp_path / "a.gro")] == ["C", "CCa"]


@pytest.mark.parametrize(
    ("name", "residue", "element", "symbol"),
    [
        (" CA ", "LIG", "", "C"),  # an element of one letter stands in the second column
        ("CA  ", "LIG", "CA", "Ca"),
        (" CA ", "ALA", "C", "C"),
        ("CL1 ", "LIG", "CL", "Cl"),
        ("CL1 ", "LIG", "", ""),
    ],
)
def test_pdb_files_say_the_element_or_place_the_name(tmp_path, name, residue, element, symbol):
    (tmp_path / "a.pdb").write_text(pdb(name, residue, element))
    if symbol:
        assert read_frames(tmp_path / "a.pdb")[0].get_chemical_symbols() == [symbol]
    else:
        with pytest.raises(DataError, match=r"C or Cl.*columns 77-78"):
            read_frames(tmp_path / "a.pdb")


def test_gromos_names(tmp_path):
    rows = "1 SOL OW 1 0.1 0.2 0.3\n2 CL CL 2 1.1 0.2 0.3\n"
    text = f"TITLE\nx\nEND\nPOSITION\n{rows}END\nBOX\n 3.0 3.0 3.0\nEND\n"
    (tmp_path / "a.g96").write_text(text)
    assert str(read_frames(tmp_path / "a.g96")[0].symbols) == "OCl"
