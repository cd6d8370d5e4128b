"""The files of a run: rows that survive a stop, and folders that are not overwritten."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from models import random_potential, trained_adapter
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.errors import DataError, TrainingError
from pet_finetune.files import check_new
from pet_finetune.training.metrics import Metrics
from pet_finetune.training.run_files import ADAPTER, BEST, LAST, OPTIONS, SPLITS, TABLE, RunFiles
from pet_finetune.training.step import EpochRecord


def record(epoch):
    metrics = {"energy": Metrics("energy", {"energy": [0.5 * epoch, 1.0, 2]})}
    return EpochRecord(epoch, 1e-3, 0.25, metrics, metrics, 0.1, epoch == 1, 1.5, 80.0)


def rows(files):
    with (files.folder / TABLE).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_rows_are_added_one_by_one(tmp_path):
    files = RunFiles(tmp_path / "a" / "b")
    for epoch in (1, 2):
        files.add_row(record(epoch))
    found = rows(files)
    assert [row["epoch"] for row in found] == ["1", "2"]
    assert found[1]["validation/energy/energy_mae"] == "0.5"
    assert found[0]["best"] == "1"
    assert found[1]["best"] == "0"


def test_extra_losses_have_their_columns(tmp_path):
    files = RunFiles(tmp_path)
    files.add_row(replace(record(1), extra={"anchor": 0.125}))
    (row,) = rows(files)
    assert row["train/anchor"] == "0.125"


def test_rows_that_will_be_done_again_are_dropped(tmp_path):
    files = RunFiles(tmp_path)
    files.drop_rows_after(3)  # nothing there yet
    for epoch in (1, 2, 3):
        files.add_row(record(epoch))
    with (tmp_path / TABLE).open("a") as stream:
        stream.write("4,0.1")  # killed while writing
    files.drop_rows_after(2)
    assert [row["epoch"] for row in rows(files)] == ["1", "2"]
    files.add_row(record(3))
    assert [row["epoch"] for row in rows(files)] == ["1", "2", "3"]
    files.drop_rows_after(0)
    assert not (tmp_path / TABLE).exists()
    (tmp_path / TABLE).touch()
    files.drop_rows_after(1)
    files.add_row(record(1))
    assert [row["epoch"] for row in rows(files)] == ["1"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    for name, why in (("file/run", "file' is a file"), ("link", "link' is a link to nothing")):
        told = rf"Cannot write to the output folder.*{why}\. Choose another with -o FOLDER"
        with pytest.raises(TrainingError, match=told):
            RunFiles(tmp_path / name)
    with pytest.raises(DataError, match="exists and is not overwritten"):
        check_new(tmp_path / "link")


def test_a_disk_that_fills_up_is_explained(tmp_path):
    files = RunFiles(tmp_path / "run")
    (tmp_path / "run" / TABLE).mkdir()
    with pytest.raises(TrainingError, match="Cannot write to the output folder"):
        files.add_row(record(1))
    (tmp_path / "run" / OPTIONS).mkdir()
    with pytest.raises(TrainingError, match="Cannot write to the output folder"):
        files.write(OPTIONS, "text")


def test_an_adapter_is_kept_beside_its_merged_model(tmp_path):
    files = RunFiles(tmp_path)
    files.base_name, files.provenance = "base", {"parent": "base"}
    model = trained_adapter(random_potential())
    files.keep_best(model, record(4))
    kept = load_checkpoint(files.best)
    assert kept.provenance == {"parent": "base", "epoch": 4, "metric": 0.1}
    assert kept.training is None
    assert (files.adapter / "adapter_config.json").exists()
    files.keep_last(model, {"step": 3, "tensor": torch.ones(2)})
    last = load_checkpoint(files.last, keep_adapter=True)
    assert last.training["step"] == 3
    assert last.model.adapter is not None


def test_a_plain_model_has_no_adapter_folder(tmp_path):
    files = RunFiles(tmp_path)
    files.keep_best(random_potential(), record(1))
    assert not files.adapter.exists()


@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_folder_with_a_run_is_not_overwritten(tmp_path, name):
    files = RunFiles(tmp_path)
    files.check_free()
    (tmp_path / name).touch()
    with pytest.raises(TrainingError, match="holds a run already"):
        files.check_free()


def test_the_users_options_file_is_not_overwritten(tmp_path):
    mine = tmp_path / OPTIONS
    mine.write_text("seed: 1\n")
    files = RunFiles(tmp_path)
    with pytest.raises(TrainingError, match="would replace your options file"):
        files.check_free(mine)
    files.check_free(tmp_path / "other.yaml")


def test_going_on_in_another_folder_takes_the_files_along(tmp_path):
    old = tmp_path / "old"
    (old / ADAPTER).mkdir(parents=True)
    (old / ADAPTER / "adapter_config.json").write_text("{}")
    for name in (BEST, LAST, TABLE, SPLITS):
        (old / name).write_text(name)
    files = RunFiles(tmp_path / "new")
    files.take_over(old)
    found = {path.name for path in files.folder.iterdir()}
    assert found == {BEST, TABLE, SPLITS, ADAPTER}
    assert (files.adapter / "adapter_config.json").read_text() == "{}"
    assert (old / BEST).read_text() == BEST
    with pytest.raises(TrainingError, match="holds a run already"):
        files.take_over(old)
