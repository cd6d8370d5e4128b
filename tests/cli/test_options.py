"""``pet-finetune options``, and the completion of shells."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from pet_finetune.cli import main
from pet_finetune.config.options_reference import options_schema


def test_a_branch(command) -> None:
    answer = command("options", "architecture.training.finetune.config")
    assert answer.code == 0
    assert (
        "architecture.training.finetune.config.rank\n    a positive integer, default " in answer.out
    )
    assert "architecture.model" not in answer.out
    answer = command("options", "rank")
    assert answer.code == 1
    assert "Did you mean 'architecture.training.finetune.config.rank'?" in answer.err


def test_all_of_them(command) -> None:
    lines = command("options").out.splitlines()
    assert any(line.startswith("architecture.training.batch_size (") for line in lines)
    assert len(lines) > 100


def test_the_schema(command) -> None:
    assert json.loads(command("options", "--schema").out) == options_schema()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    assert not ended.value.code
    script = capsys.readouterr().out
    for word in ("--restart", "export", "--format", "options"):
        assert word in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, text=True, check=False)
        assert checked.returncode == 0
