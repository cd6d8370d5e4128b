from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pet_finetune.log import get_logger, setup_logging


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger("pet_finetune")
    handlers, level, propagate = list(root.handlers), root.level, root.propagate
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level, root.propagate = handlers, level, propagate


def test_all_loggers_hang_below_the_package() -> None:
    assert get_logger("training").name == "pet_finetune.training"
    assert get_logger("pet_finetune.training").name == "pet_finetune.training"
    assert get_logger().name == "pet_finetune"


def test_lines_go_to_stderr_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "train.log"
    setup_logging("INFO", file)
    get_logger("train").info("epoch %d", 3)
    get_logger("train").debug("unseen")
    assert capsys.readouterr().err.endswith("INFO    epoch 3\n")
    written = file.read_text(encoding="utf-8")
    assert "epoch 3" in written
    assert "unseen" not in written


def test_setting_up_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging("warning")
    get_logger("x").info("quiet")
    get_logger("x").warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_log_file_that_cannot_be_opened_keeps_the_old_handlers(tmp_path: Path) -> None:
    setup_logging()
    before = list(logging.getLogger("pet_finetune").handlers)
    with pytest.raises(OSError, match="."):
        setup_logging(file=tmp_path)
    assert logging.getLogger("pet_finetune").handlers == before
