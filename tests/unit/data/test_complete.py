"""Files that are cut are refused: nothing is lost without a word."""

import contextlib
import logging

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from pet_finetune.data.complete import check_complete
from pet_finetune.data.files import read_frames
from pet_finetune.errors import DataError


def frames(count):
    rng = np.random.default_rng(0)
    return [Atoms("H3", rng.random((3, 3)), cell=[9] * 3, pbc=True) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 43])
def test_a_trajectory_is_read_whole_or_refused(tmp_path, count):
    file = tmp_path / "x.traj"
    write(file, frames(count))
    whole = file.read_bytes()
    assert len(read_frames(file)) == count
    for cut in range(1, len(whole), max(len(whole) // 60, 1)):
        file.write_bytes(whole[:-cut])
        with contextlib.suppress(DataError):
            assert len(read_frames(file)) == count  # the padding of the table is no loss
    file.write_bytes(whole + b"half a frame")
    with pytest.raises(DataError, match="bytes stand behind the last"):
        read_frames(file)


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_a_database_that_is_cut_is_refused(tmp_path, cut):
    file = tmp_path / "x.db"
    write(file, frames(3))
    assert len(read_frames(file)) == 3
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match="cut off"):
        read_frames(file)


def test_half_a_coordinate_at_the_end_of_an_xdatcar_is_noticed(tmp_path):
    file = tmp_path / "XDATCAR"
    write(file, frames(3), format="vasp-xdatcar")
    assert len(read_frames(file)) == 3
    file.write_text(file.read_text()[:-5])
    with pytest.raises(DataError, match="last line is shorter"):
        read_frames(file)


def test_steps_that_vasp_began_count():
    with pytest.raises(DataError, match="holds 2 frames"):
        check_complete("vasp-xml", b"", "<calculation>" * 2, 1, "vasprun.xml")


@pytest.mark.parametrize(
    ("steps", "rest", "lines"),
    [((1, 2), "", 0), ((1, 100), "", 0), ((1,), "Iteration      2(   1)\n", 1)],
)
def test_an_outcar_that_ends_within_a_step_is_named(caplog, steps, rest, lines):
    energy = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n"
    text = "".join(f"Iteration {step:6d}(   1)\n{energy}" for step in steps) + rest
    with caplog.at_level(logging.WARNING, logger="pet_finetune"):
        check_complete("vasp-out", b"", text, len(steps), "OUTCAR")
    assert len(caplog.records) == lines
