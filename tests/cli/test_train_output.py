"""``pet-finetune train -o model.pt``: the exported model at the end of a run."""

from __future__ import annotations

from pathlib import Path

import ase.io
import pytest

from pet_finetune import PETCalculator
from pet_finetune.checkpoint.opening import load_checkpoint
from tiny_data import options, write_options

START = ("train", "options.yaml", "-c", "base.ckpt")


def run_folder() -> Path:
    (best,) = Path("outputs").glob("*/*/run.json")
    return best.parent


def test_the_model_for_engines(here: Path, command) -> None:
    metatomic = pytest.importorskip("metatomic_ase")
    answer = command(*START, "-o", "new/model.pt")
    assert answer.code == 0, answer.err
    assert "predictions are the checkpoint's" in answer.out
    best = run_folder() / "best_model.ckpt"
    found = []
    for calculator in (metatomic.MetatomicCalculator("new/model.pt"), PETCalculator(best)):
        atoms = ase.io.read("test.xyz", 0)
        atoms.calc = calculator
        found.append(atoms.get_potential_energy())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_model_for_metatrain(here: Path, command) -> None:
    assert command(*START, "-o", "model.ckpt").code == 0
    assert load_checkpoint("model.ckpt").kind == "metatrain"


def test_an_ensemble_is_one_file(here: Path, command) -> None:
    write_options(here / "options.yaml", options({"num_epochs": 1, "finetune": {"ensemble": 2}}))
    answer = command(*START, "-o", "model.pt")
    assert answer.code == 0, answer.err
    assert "energy_uncertainty" in answer.out
    assert Path("model.pt").exists()


def test_an_interrupted_run_exports_when_it_is_done(here: Path, command, stop) -> None:
    stop(4)
    assert command(*START, "-o", "model.pt").code == 130
    assert not Path("model.pt").exists()
    stop(0)
    answer = command("train", "options.yaml", "--restart", "auto", "-o", "model.pt")
    assert answer.code == 0, answer.err
    assert Path("model.pt").exists()
    assert run_folder()  # the one run


def test_a_folder_with_such_a_name_is_a_folder(here: Path, command) -> None:
    Path("mine.pt").mkdir()
    assert command(*START, "-o", "mine.pt").code == 0
    assert Path("mine.pt/best_model.ckpt").exists()


FINETUNE = "architecture.training.finetune"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*START, "-o", "train.xyz/model.pt"), "-o: 'train.xyz/model.pt' cannot be written"),
        ((*START, "-o", "base.ckpt"), "'base.ckpt' is the checkpoint itself"),
        ((*START, "-o", "m.ckpt", "-r", f"{FINETUNE}.method=prompt"), "has no prompts"),
        ((*START, "-o", "m.ckpt", "-r", f"{FINETUNE}.ensemble=2"), "has no committee"),
        ((*START, "-o", "m.pt", "--profile"), "--profile makes no model"),
        (
            ("train", "--config", "runs.json", "--all", "-o", "model.pt"),
            "with --config it is the folder above",
        ),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_before_the_run(here: Path, command, arguments, words) -> None:
    before = sorted(path.name for path in here.iterdir())
    answer = command(*arguments)
    assert answer.code == 1
    assert words in answer.err
    assert sorted(path.name for path in here.iterdir()) == before
