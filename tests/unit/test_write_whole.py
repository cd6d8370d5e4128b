"""A file or a folder is written whole, or what was there stays."""

import os
import re
from pathlib import Path

import pytest

import pet_finetune
from pet_finetune.errors import DataError
from pet_finetune.files import check_new, check_writable, replacing, write_whole


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))

    write_whole(tmp_path / "run.json", "é")

    assert order == ["fsync", "replace", "fsync"]  # the file, its name, its folder
    assert (tmp_path / "run.json").read_bytes() == "é".encode()


def test_an_error_leaves_the_earlier_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as partial:
            partial.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_names_the_file_that_was_to_be(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"device: '.*record.json'") as caught:
        write_whole(tmp_path / "record.json", "{}")
    assert caught.value.filename == str(tmp_path / "record.json")


def test_a_folder_appears_whole(tmp_path):
    with replacing(tmp_path / "predictions") as partial:
        partial.mkdir()
        (partial / "x.bin").write_bytes(b"1")
        assert not (tmp_path / "predictions").exists()

    assert (tmp_path / "predictions" / "x.bin").read_bytes() == b"1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["predictions"]


def test_files_are_as_readable_as_those_that_open_makes(tmp_path):
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "whole", "")

    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_other_code_puts_files_in_their_places():
    root = Path(pet_finetune.__file__).parent
    by_hand = re.compile(r"os\.(replace|fsync)\(")
    found = [path.name for path in root.rglob("*.py") if by_hand.search(path.read_text("utf-8"))]
    assert found == ["files.py"]


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: write_whole(pipe, "x"), lambda: check_writable(pipe)):
        with pytest.raises(OSError, match="a device or a pipe"):
            write()
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_takes_no_files_is_told_before_the_work():
    with pytest.raises(DataError, match=r"'/proc/model.pt' cannot be written \(/proc: "):
        check_new(Path("/proc/model.pt"))
