"""Loggers beside ``train.csv``, by the real libraries, and without them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from pet_finetune import installation
from pet_finetune.training import loggers
from tiny_data import options, write_options


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "train.csv").open() as stream:
        return list(csv.DictReader(stream))


def tuning(**training: Any) -> dict[str, Any]:
    finetune = {"method": "heads", "read_from": "base.ckpt"}
    return {"finetune": finetune, "num_epochs": 2, **training}


def test_tensorboard_has_the_numbers_of_the_table(train, here: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(options(tuning(log=["csv", "tensorboard"])))
    events = EventAccumulator(str(here / "run" / "tensorboard"))
    events.Reload()
    table = rows(here / "run")
    assert len(table) == 2
    for name in ("loss", "learning_rate", "validation/energy/forces_mae"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({int(row["epoch"]): float(row[name]) for row in table})


def test_weights_and_biases_offline(train, here: Path) -> None:
    pytest.importorskip("wandb")
    train(options(tuning(), wandb={"project": "tests", "mode": "offline"}))
    (file,) = (here / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"validation/energy/forces_mae" in content
    assert b"tests" in content


def test_trackio(train, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(here / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    train(options(tuning(log="trackio")))
    (file,) = (here / "trackio").rglob("pet-finetune.db")
    assert b"validation/energy/forces_mae" in file.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_not_installed(
    name: str, command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = installation.find_spec
    monkeypatch.setattr(installation, "find_spec", lambda n: None if n == name else find(n))
    write_options(here / "mine.yaml", options(tuning(log=[name])))
    answer = command("train", "mine.yaml", "-o", "run")
    assert answer.code == 1
    assert f"{name} needs the library {name}, which is not installed" in answer.err
    assert f"pip install 'pet-finetune[{name}]'" in answer.err
    assert not (here / "run" / "train.csv").exists()


def test_a_service_that_fails_does_not_end_the_run(
    train, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(loggers.Logger):
        name = library = "json"

        def begin(self) -> None:
            return

        def add(self, numbers: Any, epoch: int) -> None:
            raise ConnectionError("the server is down")

        def end(self) -> None:
            raise AssertionError("it is closed though it failed")

    monkeypatch.setattr(loggers, "_KINDS", {"tensorboard": Broken})
    answer = train(options(tuning(log="tensorboard")))
    assert "json gets nothing more of this run: the server is down" in answer.err
    assert len(rows(here / "run")) == 2
