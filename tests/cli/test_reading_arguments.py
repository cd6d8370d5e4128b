"""``--format`` and ``--types`` say how a file is read where it does not say it itself."""

from __future__ import annotations

import pytest
from ase.build import bulk
from ase.io import write

from pet_finetune.cli import main
from pet_finetune.data.frame_files import read_frames
from pet_finetune.dynamics.md_checks import read_frame
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
ITEM: ATOMS id type x y z fx fy fz v_energy
1 1 0.0 0.0 0.0 0.1 0.0 0.0 1
2 2 2.0 0.0 0.0 -0.1 0.0 0.0 1
"""


@pytest.mark.parametrize("command", ["md", "eval", "inspect"])
def test_the_commands_that_read_files_have_them(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--format" in text
    assert "--types" in text


def test_types_reach_the_reader(tmp_path, capsys):
    file = tmp_path / "x.dump"
    file.write_text(DUMP)
    main(["inspect", str(file), "--types", "1=Na,2=Cl"])
    text = capsys.readouterr().out
    assert "v_energy" in text  # read, and only the label is missing
    assert "does not say which elements" not in text
    assert main(["inspect", str(file)]) == 1
    assert main(["convert", str(file), str(tmp_path / "set"), "--types", "1=Na,2=Cl"]) == 0


@pytest.mark.parametrize(("types", "words"), [("1=Zz", "'Zz'"), ("1", "''"), (" -1=H", "form 1=O")])
def test_types_that_are_none(tmp_path, capsys, types, words):
    with pytest.raises(SystemExit):
        main(["inspect", "x.dump", "--types", types])
    assert words in capsys.readouterr().err


def test_an_options_file_says_it_itself(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("training_set: x.xyz\n")
    assert main(["inspect", str(tmp_path / "options.yaml"), "--format", "vasp"]) == 1
    assert "the options file says that of its own" in capsys.readouterr().err


def test_a_simulation_starts_from_a_named_format(tmp_path):
    write(tmp_path / "start", bulk("NaCl", "rocksalt", a=5.6), format="vasp")
    with pytest.raises(DataError, match="--format"):
        read_frame(tmp_path / "start", None)
    assert read_frame(tmp_path / "start", None, "vasp").get_chemical_formula() == "ClNa"


def test_a_simulation_takes_lengths_as_the_file_states_them_and_changes_no_shared_frame(tmp_path):
    file = tmp_path / "x.xyz"
    file.write_text('1\nLattice="1 0 0 0 1 0 0 0 1" length-unit=nm\nAr 0.5 0 0\n')
    atoms = read_frame(file, None)
    assert atoms.positions[0, 0] == pytest.approx(5.0)
    assert atoms.cell.lengths() == pytest.approx([10.0] * 3)
    assert read_frames(file)[0].positions[0, 0] == 0.5
