"""Caches and libraries where there is no home: what they find instead, and the line about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pet_finetune import installation
from pet_finetune.backends import choice

SOURCES = Path(installation.__file__).resolve().parents[1]

#: Imports what asks for the home or the user on import or later, and evaluates.
USE = """
import os, pwd, sys
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown  # as in a container that is run as any user
import pet_finetune
import getpass, pathlib, logging
logging.basicConfig(format="%(message)s")
import ase.config, matplotlib
import torch._inductor.runtime.cache_dir_utils as inductor
from pet_finetune.backends import choice
choice.prepare()
choice.prepare()
for folder in (pathlib.Path.home(), matplotlib.get_cachedir(), matplotlib.get_configdir()):
    assert os.access(folder, os.W_OK), folder
assert getpass.getuser()
print(pathlib.Path.home(), inductor.default_cache_dir(), sep="\\n")
"""


def use(temporary: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    every = {**os.environ, "PYTHONPATH": str(SOURCES), "PET_FINETUNE_KERNELS": "off"}
    every.update(TMPDIR=str(temporary), **{k: v for k, v in environment.items() if v is not None})
    gone = {"LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR"}
    gone |= {name for name, value in environment.items() if value is None}
    every = {name: value for name, value in every.items() if name not in gone}
    return subprocess.run(
        [sys.executable, "-c", USE], env=every, capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_everything_finds_a_home_and_one_line_says_so(tmp_path: Path, home: str | None):
    answer = use(tmp_path, HOME=home)
    assert answer.returncode == 0, answer.stderr
    found, _ = answer.stdout.splitlines()
    assert Path(found).parent == tmp_path
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1, answer.stderr
    assert f"caches are kept in {found}" in lines[0]
    assert (home or "HOME") in lines[0]
    assert not Path("/nonexistent").exists()


def test_a_home_that_serves_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = dict(os.environ)
    installation.provide_home()
    assert dict(os.environ) == before
    assert installation.notice() is None
    assert installation.cache_folders() == [tmp_path / ".cache" / "pet-finetune"]


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that cannot be written, by root neither."""
    folder = tmp_path / "cache"
    folder.mkdir()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder and access(path, mode)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.setattr(installation, "_temporary", lambda: tmp_path / "other")
    return folder


def test_kernels_are_read_from_a_read_only_cache_and_compiled_elsewhere(
    read_only: Path, tmp_path: Path
):
    installation.provide_home()
    line = installation.notice()
    assert line is not None
    assert str(read_only) in line
    path = choice._library_path()
    assert path.is_relative_to(tmp_path / "other")
    there = read_only / "pet-finetune" / "kernels" / path.name
    there.parent.mkdir(parents=True)
    there.touch()
    assert choice._library_path() == there
    assert os.environ["MPLCONFIGDIR"] == "mine"


def test_a_folder_that_another_user_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make = installation._temporary.__wrapped__
    mine = make()
    assert make() == mine
    assert mine.stat().st_mode & 0o077 == 0
    mine.rmdir()
    (tmp_path / "theirs").mkdir()
    mine.symlink_to(tmp_path / "theirs")
    assert make() not in (mine, tmp_path / "theirs")
