"""``pet-finetune pretrain``, and the function that it calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase.io import read

import pet_finetune as pf
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.errors import ConfigError

EMT = "ase.calculators.emt:EMT"


def test_a_checkpoint_to_fine_tune_from(command, here: Path) -> None:
    wide = ("--max-force", "1000", "--max-energy", "1000", "--temperatures", "300")
    answer = command(
        "pretrain", "train.xyz", "-c", "base.ckpt", "--teacher", EMT, "-n", "30", *wide,
        "--epochs", "1", "-o", "pretrained.ckpt",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "pretrained.ckpt learned from" in answer.err
    assert f"frames of {EMT} (explore " in answer.err
    assert list(load_checkpoint("pretrained.ckpt").model.targets) == ["energy"]


def test_what_is_wrong_is_said_before_anything_is_computed(command, here: Path) -> None:
    given = ("pretrain", "train.xyz", "-c", "base.ckpt")
    answer = command(*given, "--teacher", "gfn3", "-o", "out.ckpt")
    assert answer.code == 1
    assert "Did you mean 'gfn2'?" in answer.err
    answer = command(*given, "--teacher", EMT, "-o", "base.ckpt")
    assert "'base.ckpt' exists and is not overwritten" in answer.err
    answer = command(*given, "--teacher", EMT, "-n", "2", "-o", "out.ckpt")
    assert "n: expected an integer of at least 20, got 2" in answer.err
    answer = command("pretrain", "trian.xyz", "-c", "base.ckpt", "-o", "out.ckpt")
    assert "Did you mean 'train.xyz'?" in answer.err
    assert not Path("out.work").exists()


def test_from_python(here: Path) -> None:
    frames = read("train.xyz", ":")
    with pytest.raises(ConfigError, match="techer: unknown option. Did you mean 'teacher'"):
        pf.pretrain("base.ckpt", frames, techer=EMT)
    result = pf.pretrain(
        "base.ckpt", frames, teacher=EMT, n=30, epochs=1, max_force=1e3, max_energy=1e3
    )
    assert result.checkpoint is None
    assert sorted(result.after["energy"])[0].startswith("energy")
    assert list(result.model.targets) == ["energy"]


def test_with_one_train_and_kept_for_the_next(
    command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    section = "architecture.training.finetune"
    wide = f"{{teacher: {EMT}, n: 30, epochs: 1, max_force: 1000, max_energy: 1000}}"
    method = ("-r", f"{section}.method=full")
    own = ("train", "options.yaml", *method, "-r", f"{section}.pretrain={wide}")
    given = (*own, "-c", "base.ckpt")
    first = command(*given, "-o", "one")
    assert first.code == 0, first.err
    (made,) = (here / "cache/pet-finetune/pretrained").glob("base-*.ckpt")
    assert f"{made} learned from" in first.err
    assert f"read_from: {made}" in Path("one/options.yaml").read_text()
    second = command(*given, "-o", "two")
    assert f"pre-trained on this system before: {made}" in second.err
    assert "learned from" not in second.err
    made.unlink()  # a run that goes on has no need of it
    again = command(*own, "--restart", "two", "-r", "architecture.training.num_epochs=9")
    assert again.code == 0, again.err
    assert "learned from" not in again.err
    assert "finetune.pretrain" not in again.err


def test_nothing_to_pretrain(command, here: Path) -> None:
    section = "architecture.training.finetune"
    answer = command("train", "options.yaml", "-r", f"{section}.pretrain={{n: 30}}")
    assert answer.code == 1
    assert "trains a checkpoint further before the run, but none is given" in answer.err
