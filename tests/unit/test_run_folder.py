"""Each run has a folder of its own, and the last one is found whatever the file times say."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from pet_finetune.errors import RunError
from pet_finetune.runs import RunFolder, newest_run, own_folder, starts_of, works_elsewhere

#: Claims a folder as soon as it may, with a clock that stands, and keeps it until it is killed.
_CLAIM = """
import datetime, sys, types
from pathlib import Path
from pet_finetune.errors import RunError
from pet_finetune import runs as folder

class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

folder.datetime = types.SimpleNamespace(datetime=Clock, timezone=datetime.timezone)
print("ready", flush=True)
sys.stdin.readline()
try:
    if len(sys.argv) > 1:
        claimed = folder.RunFolder.take(Path(sys.argv[1]))
    else:
        claimed = folder.RunFolder.new()
    print(claimed.path, flush=True)
except RunError as error:
    print("refused:", error, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def claims(tmp_path):
    """Let n processes claim at once; what each says, and the processes."""
    started = []

    def claim(count, *arguments):
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", _CLAIM, *map(str, arguments)], cwd=tmp_path, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            started.append(process)
            assert process.stdout.readline() == "ready\n"
        for process in started[-count:]:
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in started[-count:]], started

    yield claim
    for process in started:
        process.kill()
        process.communicate()


def test_runs_of_one_second_get_a_folder_each(claims):
    said, _ = claims(5)
    name = "outputs/2026-01-02/03-04-05"
    assert sorted(said) == [name, *(f"{name}.{number}" for number in (1, 2, 3, 4))]


def test_of_runs_that_want_one_folder_a_single_one_gets_it(claims, tmp_path):
    said, processes = claims(5, "mine")
    assert said.count("mine") == 1
    pid = processes[said.index("mine")].pid
    with pytest.raises(RunError, match=rf"in use by process {pid} on host .*another folder"):
        RunFolder.take(tmp_path / "mine")
    processes[said.index("mine")].kill()
    processes[said.index("mine")].wait()
    with RunFolder.take(tmp_path / "mine") as folder:
        assert folder.path == tmp_path / "mine"


def test_a_folder_that_is_claimed_stays_so_within_and_is_free_after(tmp_path):
    with RunFolder.take(tmp_path / "a") as folder:
        with own_folder(folder) as path:
            assert path == tmp_path / "a"
        with pytest.raises(RunError, match="in use"), own_folder(tmp_path / "a"):
            pass
    with own_folder(str(tmp_path / "a")) as path:
        assert path.is_dir()


def test_another_process_in_a_folder_is_seen(claims, tmp_path):
    folder = tmp_path / "run"
    assert not works_elsewhere(folder)
    with own_folder(folder):
        assert not works_elsewhere(folder)  # this one
    said, _ = claims(1, folder)
    assert said == [str(folder)]
    assert works_elsewhere(folder)
    assert works_elsewhere(folder)  # asking takes nothing away


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"Cannot write to the output folder.*file/a.*-o FOLDER"):
        RunFolder.take(tmp_path / "file" / "a")
    with pytest.raises(RunError, match="Cannot write to the output folder"):
        RunFolder.new(tmp_path / "file")


def saved(folder, started=None, record="run.json"):
    folder.mkdir(parents=True)
    (folder / "last.ckpt").touch()
    if started is not None:
        (folder / record).write_text(json.dumps({"started": started}))
    return folder


def touched_in_turn(*folders):
    """File times as a copy may have them: of the last one as the oldest."""
    for age, folder in enumerate(folders):
        for path in [folder, *folder.iterdir()]:
            os.utime(path, (1_000_000_000 - age, 1_000_000_000 - age))


def test_the_newest_run_is_that_of_the_latest_name_and_number(tmp_path):
    day = tmp_path / "outputs/2026-01-02"
    folders = [saved(day / name) for name in ("03-04-05", "03-04-05.2", "03-04-05.10")]
    earlier = saved(tmp_path / "outputs/2026-01-01/23-00-00")
    touched_in_turn(earlier, *folders)
    half, own = folders[-1] / ".last.ckpt.a_b1c2d3", folders[-1] / ".notes.of_mine1"
    for folder, name in ((half, "last.ckpt"), (own, "todo")):  # a save that was killed
        folder.mkdir()
        (folder / name).touch()
    assert newest_run(tmp_path / "outputs", "last.ckpt") == folders[-1]
    with RunFolder.take(folders[-1]):
        assert own.exists()
        assert not half.exists()
    shutil.copytree(tmp_path / "outputs", tmp_path / "copied")  # with new file times
    assert (
        newest_run(tmp_path / "copied", "last.ckpt") == tmp_path / "copied/2026-01-02/03-04-05.10"
    )


@pytest.mark.parametrize("record", ["run.json", "md.json"])
def test_a_run_that_was_gone_on_with_is_newer_than_its_name(tmp_path, record):
    old = saved(
        tmp_path / "2026-01-01/00-00-00",
        ["2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"],
        record,
    )
    new = saved(tmp_path / "2026-01-10/00-00-00", ["2026-01-10T00:00:00+00:00"], record)
    touched_in_turn(old, new)
    assert newest_run(tmp_path, "last.ckpt") == old


def test_members_of_an_ensemble_are_one_run(tmp_path):
    whole = tmp_path / "2026-01-02/00-00-00"
    saved(whole / "member_0")
    saved(whole / "member_10", ["2026-01-05T00:00:00+00:00"])
    saved(tmp_path / "2026-01-04/00-00-00")
    assert newest_run(tmp_path, "last.ckpt") == whole


def test_no_run_one_run_and_several_that_say_nothing(tmp_path):
    root = tmp_path / "runs"
    assert newest_run(root, "last.ckpt") is None
    a = saved(root / "a")
    (a / "run.json").write_text("{")  # damaged: as good as none
    assert newest_run(root, "last.ckpt") == a
    saved(root / "b")
    with pytest.raises(RunError, match=r"of 2 runs .* none says.*'.*/a', '.*/b'.*--restart FOLDER"):
        newest_run(root, "last.ckpt")


def test_starts_are_added_to_those_before():
    first = starts_of({})
    assert len(first) == 1
    assert starts_of({"started": first})[0] == first[0]
    assert starts_of({"started": first})[1] > first[0]


def test_a_later_run_that_left_no_state_is_named(tmp_path, caplog):
    """One that was killed before its first epoch ended, say."""
    kept = saved(tmp_path / "2026-01-01/00-00-00", ["2026-01-01T00:00:00+00:00"])
    earlier = saved(tmp_path / "2025-12-31/00-00-00", ["2025-12-31T00:00:00+00:00"])
    (earlier / "last.ckpt").unlink()
    assert newest_run(tmp_path, "last.ckpt") == kept
    assert not caplog.records
    dead = saved(tmp_path / "2026-01-02/00-00-00", ["2026-01-02T00:00:00+00:00"])
    (dead / "last.ckpt").unlink()
    with caplog.at_level(logging.INFO, "pet_finetune"):
        assert newest_run(tmp_path, "last.ckpt") == kept
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"'{dead}' was begun later and has no last.ckpt" in line
    (kept / "last.ckpt").unlink()
    caplog.clear()
    assert newest_run(tmp_path, "last.ckpt") is None
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"'{dead}', and 2 more, was begun at 2026-01-02 00:00 UTC" in line
