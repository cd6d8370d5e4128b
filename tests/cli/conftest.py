"""A folder as a user has it (data, a foundation, options), and the command run inside it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import pet_finetune.api  # noqa: F401 - all is imported before a test changes a part of it
from logs import logging_as_it_was
from models import random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.cli import main
from pet_finetune.data.readers import probe_structures
from pet_finetune.training.loggers import RunDisplay
from tiny_data import molecules, options, write_frames, write_options


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit status."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture(scope="session")
def _ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    write_frames(folder / "train.xyz", molecules(10))
    write_frames(folder / "test.xyz", molecules(4, seed=1))
    save_checkpoint(folder / "base.ckpt", random_potential(dtype=torch.float32))
    write_options(folder / "options.yaml", options())
    return folder


@pytest.fixture
def here(_ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: train.xyz, test.xyz, base.ckpt and options.yaml."""
    shutil.copytree(_ready, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    with logging_as_it_was():
        yield


@pytest.fixture
def reported() -> None:
    """Ask for this where the whole probe set and the plots at the end of a run matter."""


@pytest.fixture(autouse=True)
def _little_is_reported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reported" in request.fixturenames:  # which takes most of a second a run
        return
    room = "pet_finetune.forgetting"
    monkeypatch.setattr(f"{room}.dimers.dimers_svg", lambda *ignored: "<svg/>")
    monkeypatch.setattr("pet_finetune.report.figures.available", lambda: False)
    monkeypatch.setattr(
        f"{room}.retention.probe_structures", lambda species: probe_structures(species)[::8]
    )


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``pet-finetune`` in this process."""

    def run(*arguments: Any) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Answer(code, printed.out, printed.err)

    return run


@pytest.fixture
def train(command: Command, here: Path) -> Callable[..., Answer]:
    """Train with options given as a dictionary, into the folder ``run``; it must succeed."""

    def run(content: dict[str, Any], *arguments: Any) -> Answer:
        write_options(here / "mine.yaml", content)
        answer = command("train", "mine.yaml", "-o", "run", *arguments)
        assert answer.code == 0, answer.err
        return answer

    return run


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call with a number of steps: after these, Ctrl-C is pressed, once; after 0 never."""

    def after(steps: int) -> None:
        left = [steps]

        def step(self: RunDisplay, *ignored: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(RunDisplay, "step_ended", step)

    return after
