"""Frames and frame numbers from files, and whether these were read whole."""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write

from pet_finetune.data.dataset_files import frame_numbers
from pet_finetune.data.formats import check_complete
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.structure import list_frames
from pet_finetune.data.text import Content
from pet_finetune.errors import DataError


def test_reads_all_frames_of_any_format(tmp_path):
    frames = [molecule("H2O"), molecule("CO2")]
    write(tmp_path / "a.xyz", frames)
    write(tmp_path / "a.traj", frames)
    write(tmp_path / "POSCAR", bulk("NaCl", "rocksalt", a=5.6))
    (tmp_path / "b.xyz.gz").write_bytes(gzip.compress((tmp_path / "a.xyz").read_bytes()))
    write(tmp_path / "at@1.xyz", frames)
    for name in ("a.xyz", "a.traj", "b.xyz.gz", "at@1.xyz"):
        assert [len(atoms) for atoms in read_frames(tmp_path / name)] == [3, 3], name
    assert read_frames(str(tmp_path / "POSCAR"))[0].get_chemical_formula() == "ClNa"


def test_missing_file_suggests_the_nearest_name(tmp_path, monkeypatch):
    write(tmp_path / "train.xyz", molecule("H2O"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read_frames("trian.xyz")
    message = str(error.value)
    assert "'trian.xyz' does not exist" in message
    assert str(tmp_path) in message
    assert message.endswith("Did you mean 'train.xyz'?")


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.xyz@:10", "by `indices`"), ("~/a.xyz", "whole path"), ("*.xyz", "known to the shell")],
)
def test_what_other_programs_expand_is_told(tmp_path, monkeypatch, name, words):
    write(tmp_path / "a.xyz", molecule("H2O"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        read_frames(name)


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(DataError, match="folder does not exist"):
        read_frames(tmp_path / "no" / "train.xyz")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_frames(tmp_path)


@pytest.mark.parametrize("name", ["empty.xyz", "empty.traj", "empty"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="is empty"):
        read_frames(tmp_path / name)


def test_file_without_structures(tmp_path):
    (tmp_path / "notes.md").write_text("# no structures here\n")
    with pytest.raises(DataError, match=r"notes\.md"):
        read_frames(tmp_path / "notes.md")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("POSCAR", "a comment\nno scale\n"),
        ("unknown.foo", "?"),
    ],
)
def test_damaged_or_unknown_files_name_the_reason(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"ASE cannot read .*{name}.*xtended xyz"):
        read_frames(tmp_path / name)


def test_frame_numbers_from_list_and_file(tmp_path):
    file = tmp_path / "numbers.txt"
    file.write_text("# the good ones\n3\n1  # and this\n\n0 4\n")
    assert frame_numbers((3, 1), 5, "a.xyz") == [3, 1]
    assert frame_numbers(str(file), 5, "a.xyz") == [3, 1, 0, 4]
    assert frame_numbers((7,), None, "a.xyz") == [7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are none"),
        ("1\n5", r"does not have frame 5\. It has frames 0 to 4"),
        ("-1", "does not have frame -1"),
        ("1\n2\n1", "more than once: frame 1"),
        ("0\n1.5", "line 2: '1.5' is not a frame number"),
    ],
)
def test_frame_numbers_that_cannot_be(tmp_path, text, message):
    file = tmp_path / "numbers.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        frame_numbers(str(file), 5, "a.xyz")
    assert "numbers.txt" in str(error.value)


def test_negative_numbers_without_a_count():
    with pytest.raises(DataError, match="count from 0"):
        frame_numbers((-2,), None, "a.xyz")


def test_missing_index_file(tmp_path):
    with pytest.raises(DataError, match=r"index file .* does not exist"):
        frame_numbers(str(tmp_path / "no.txt"), 5, "a.xyz")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([4], "frame 4"),
        ([2, 3], "frames 2, 3"),
        ([1, 2, 3, 7], "frames 1-3, 7"),
        (list(range(0, 40, 2)), "frames 0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
    ],
)
def test_frames_as_text(numbers, text):
    assert list_frames(numbers) == text


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "link.xyz").symlink_to("nowhere.xyz")
    os.mkfifo(tmp_path / "pipe.xyz")
    (tmp_path / "deepmd").mkdir()
    (tmp_path / "deepmd" / "type.raw").write_text("0 1")
    for name, words in (
        ("link.xyz", "a link to nothing .'nowhere.xyz'"),
        ("pipe.xyz", "a pipe or a device"),
        ("deepmd", "DeePMD-kit.*dpdata"),
    ):
        with pytest.raises(DataError, match=words):
            read_frames(tmp_path / name)


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


def test_steps_that_vasp_began_count(package_log):
    text = "<calculation>" * 3
    killed = Content(Path(), "vasprun.xml", text=text, kind="vasp-xml")
    check_complete(killed, 2)
    assert "ends within ionic step 3: it is left out" in package_log.text
    for content, count in ((killed, 1), (replace(killed, text=f"{text}</modeling>"), 2)):
        with pytest.raises(DataError, match="holds 3 frames"):
            check_complete(content, count)


@pytest.mark.parametrize(
    ("steps", "rest", "lines"),
    [((1, 2), "", 0), ((1, 100), "", 0), ((1,), "Iteration      2(   1)\n", 1)],
)
def test_an_outcar_that_ends_within_a_step_is_named(caplog, steps, rest, lines):
    energy = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n"
    text = "".join(f"Iteration {step:6d}(   1)\n{energy}" for step in steps) + rest
    with caplog.at_level(logging.WARNING, logger="pet_finetune"):
        check_complete(Content(Path(), "OUTCAR", text=text, kind="vasp-out"), len(steps))
    assert len(caplog.records) == lines
