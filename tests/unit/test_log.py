from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from logs import logging_as_it_was
from pet_finetune.log import get_logger, setup_logging
from pet_finetune.terminal import Watch


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    with logging_as_it_was():
        yield


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


def test_a_program_without_a_console_logs_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    setup_logging(file=tmp_path / "train.log")
    get_logger("x").info("written")
    with Watch("with nobody to see it"):
        pass
    assert "written" in (tmp_path / "train.log").read_text(encoding="utf-8")


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


def warn_of_frames(count: int) -> None:
    for index in range(count):
        get_logger("data").warning("frame %d of a1.xyz: spin = %r is odd", index, 0.5 * index)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line[28:] for line in capsys.readouterr().err.splitlines()]


def test_warnings_that_repeat_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.log"
    setup_logging(file=file)
    warn_of_frames(54)
    get_logger("data").warning("something else")
    get_logger("x").info("epoch 1")
    said = lines(capsys)
    assert said == [
        "frame 0 of a1.xyz: spin = 0.0 is odd",
        "something else",
        "53 more warnings like this: frame 53 of a1.xyz: spin = 26.5 is odd",
        "epoch 1",
    ]
    assert [line[28:] for line in file.read_text().splitlines()] == said


def test_what_is_counted_last_is_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(file=tmp_path / "train.log")
    warn_of_frames(4)
    setup_logging()
    assert lines(capsys)[-1].startswith("3 more warnings like this: frame 3 of a1.xyz")
    assert "3 more warnings" in (tmp_path / "train.log").read_text()


def test_a_warning_of_every_epoch_is_told_when_it_has_doubled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging()
    for epoch in range(16):
        get_logger("x").warning("gradient %d", epoch)
        get_logger("x").info("epoch %d", epoch)
    said = [line for line in lines(capsys) if "gradient" in line]
    assert said == [
        "gradient 0",
        "gradient 1",
        "2 more warnings like this: gradient 3",
        "4 more warnings like this: gradient 7",
        "8 more warnings like this: gradient 15",
    ]


def test_warnings_that_differ_in_more_than_numbers_are_all_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging()
    texts = ["a1.xyz is odd", "a2.xyz is odd", "option b2 has no effect", "option b3 has no effect"]
    for text in texts:
        get_logger("x").warning(text)
    get_logger("y").warning(texts[0])
    assert lines(capsys) == [*texts, texts[0]]


def test_other_lines_are_never_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    for number in range(3):
        get_logger("x").info("epoch %d", number)
        get_logger("x").error("run %d failed", number)
    assert len(lines(capsys)) == 6


def test_warnings_of_python_are_lines_of_the_log_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setup_logging()
        for index in range(5):
            warnings.warn(f"frame {index} is\nodd", stacklevel=1)
        get_logger("x").info("end")
    said = lines(capsys)
    assert len(said) == 3
    assert said[0].startswith("UserWarning: frame 0 is odd (")
    assert said[1].startswith("4 more warnings like this: UserWarning: frame 4 is odd")
