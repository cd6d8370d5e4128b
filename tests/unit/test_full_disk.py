"""A disk that is full, a folder that is closed, a plot that fails: one message, nothing lost."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import write

from logs import logging_as_it_was
from models import random_potential, trained_adapter
from pet_finetune.adapters import peft_files
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_content
from pet_finetune.data.ase_databases import write_exact
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.label_columns import find_value
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.data.writing import PredictionWriter
from pet_finetune.dynamics import relaxation
from pet_finetune.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    DynamicsError,
    PetFinetuneError,
    TrainingError,
)
from pet_finetune.files import check_room, write_whole
from pet_finetune.installation import drawn
from pet_finetune.locks import FileLock
from pet_finetune.log import get_logger, setup_logging
from pet_finetune.training.run_files import KEPT, TABLE, RunFiles

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(*ignored, **settings):
    raise FULL


@pytest.mark.parametrize("name", [KEPT, "run.json", "results.json", TABLE])
def test_files_of_a_run_stay_as_they_were(tmp_path, monkeypatch, name):
    files = RunFiles(tmp_path)
    (tmp_path / name).write_text("epoch,loss\n1,2\n3,4\n")
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    actions = {
        KEPT: lambda: files.write_kept({"a": None}),
        "run.json": lambda: files.tell({"a": 1}),
        TABLE: lambda: files.drop_rows_after(1),
    }
    with pytest.raises(TrainingError, match=f"Cannot write to.*{tmp_path}.*No space left.*restart"):
        actions.get(name, lambda: files.write(name, "new"))()
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("ending", [".xyz", ".db", "/"])
def test_predictions_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch, ending):
    write(tmp_path / "a.xyz", molecule("H2O"))
    structure = atoms_to_structure(molecule("H2O"), source=str(tmp_path / "a.xyz"))
    places = {
        ".xyz": "ase.io.write",
        ".db": "ase.db.sqlite.SQLite3Database._write",
        "/": "numpy.save",
    }
    failed = sqlite3.OperationalError("database or disk is full") if ending == ".db" else FULL

    def fail(*ignored, **settings):
        raise failed

    monkeypatch.setattr(places[ending], fail)
    with (
        pytest.raises(DataError, match=r"Cannot write '.*pred.*(No space|disk is full)"),
        PredictionWriter(f"{tmp_path}/pred{ending}", "energy") as writer,
    ):
        writer.add([structure], [{"energy": np.array(-1.0)}])
    assert [path.name for path in tmp_path.iterdir()] == ["a.xyz"]


@pytest.mark.parametrize("ending", [".xyz", ".db", "/"])
def test_what_was_predicted_before_an_error_stays(tmp_path, ending):
    write(tmp_path / "a.xyz", molecule("H2O"))
    structure = atoms_to_structure(molecule("H2O"), source=str(tmp_path / "a.xyz"))
    (tmp_path / "pred.partial").mkdir()  # of an earlier attempt

    def predict():
        with PredictionWriter(f"{tmp_path}/pred{ending}", "energy") as writer:
            writer.add([structure] * 2, [{"energy": np.array(-1.0)}] * 2)
            raise MemoryError

    with pytest.raises(MemoryError):
        predict()
    names = {".xyz": "pred.partial.xyz", ".db": "pred.partial.db", "/": "pred.partial"}
    frames = read_frames(tmp_path / names[ending])
    energies = [find_value(atoms, "energy") for atoms in frames]
    assert np.ravel(energies).tolist() == [-1.0, -1.0]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.xyz", "pred.partial", names[ending]}


def test_a_log_that_cannot_be_written_says_so_once(tmp_path, capsys, monkeypatch):
    with logging_as_it_was():
        setup_logging("INFO", tmp_path / "train.log")
        (handler,) = get_logger().handlers
        (file,) = [h for h in handler.targets if isinstance(h, logging.FileHandler)]
        monkeypatch.setattr(file.stream, "write", full, raising=False)
        for number in range(3):
            get_logger().info("line %d", number)
    printed = capsys.readouterr().err
    assert printed.count("train.log ends here: No space left on device.") == 1
    assert "Traceback" not in printed
    assert "line 2" in printed  # stderr goes on


def test_a_picture_that_fails_is_a_line_in_the_log(caplog):
    def of_matplotlib():
        return 1 / 0

    def of_ours():
        raise PetFinetuneError("Plots need matplotlib.")

    with caplog.at_level(logging.INFO, "pet_finetune"):
        assert drawn("fine.svg", lambda: None)
        assert not drawn("a.svg", of_matplotlib)
        assert not drawn("b.svg", of_ours)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "a.svg: not drawn (ZeroDivisionError: division by zero)"),
        ("INFO", "b.svg: not drawn. Plots need matplotlib."),
    ]


def test_a_frame_that_does_not_fit_leaves_those_before_whole(tmp_path, monkeypatch):
    file = tmp_path / "relaxed.xyz"
    write(file, molecule("H2O"))
    before = file.read_bytes()

    def half(path, *ignored, **settings):
        with file.open("ab") as stream:
            stream.write(b"3\nLatti")
        raise FULL

    monkeypatch.setattr("ase.io.write", half)
    with pytest.raises(DynamicsError, match=r"Cannot write '.*relaxed.xyz': No space"):
        relaxation._append(file, molecule("CH4"))
    assert file.read_bytes() == before


def test_half_of_an_adapter_is_not_left(tmp_path, monkeypatch):
    sizes = [10**6, 0]  # the weights, after their description
    monkeypatch.setattr(peft_files, "write_whole", lambda *_: full() if not sizes.pop() else None)
    model = random_potential()
    with pytest.raises(AdapterError, match="Cannot write the adapter to '.*new': No space left"):
        save_adapter(trained_adapter(model), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_does_not_fit_names_its_file_and_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*set.lock'"):
        FileLock(tmp_path / "set.lock").acquire()
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_what_needs_more_than_there_is_is_not_begun(tmp_path):
    check_room(tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        check_room(tmp_path, 10**18)


@pytest.mark.parametrize("closed", ["closed", "file"])
def test_a_folder_that_is_closed(tmp_path, closed, monkeypatch):
    (tmp_path / "file").write_text("")  # root may write everywhere, but not below a file

    def refuse(*ignored, **settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if closed == "closed":
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises((PermissionError, NotADirectoryError)):
        write_whole(tmp_path / closed / "a", "b")
    with pytest.raises(DataError, match=r"Cannot write '.*a.db': (Permission denied|Not a dir)"):
        write_exact(tmp_path / closed / "a.db", [molecule("H2O")])
    with pytest.raises(
        CheckpointError, match=r"cannot be written \((Permission denied|File ex|Not)"
    ):
        save_content(tmp_path / closed / "a.ckpt", {"a": 1})
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["file"]


def test_a_database_that_fills_the_disk_stays_as_it_was(tmp_path, monkeypatch):
    write_exact(tmp_path / "a.db", [molecule("H2O")])

    def fail(*ignored, **settings):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("ase.db.sqlite.SQLite3Database._write", fail)
    with pytest.raises(DataError, match=r"Cannot write '.*a.db': database or disk is full"):
        write_exact(tmp_path / "a.db", [molecule("NH3")] * 2)
    assert [str(atoms.symbols) for atoms in read_frames(tmp_path / "a.db")] == ["OH2"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]


def test_torch_says_of_a_full_disk_what_is_wrong(tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
        with pytest.raises(CheckpointError, match=r"no space is left|File too large"):
            save_content(tmp_path / "a.ckpt", {"a": torch.zeros(5_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.iterdir())
