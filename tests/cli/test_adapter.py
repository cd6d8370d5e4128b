"""``pet-finetune adapter``: info, check, merge and combine, and what they refuse."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import ethanol, trained_adapter
from pet_finetune import PETCalculator, load, load_checkpoint
from pet_finetune.adapters.peft_files import read_adapter, save_adapter, write_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.keys import TargetSpec


@pytest.fixture
def folders(here: Path) -> dict[str, Path]:
    """Adapters of base.ckpt, by their methods."""
    base = load_checkpoint("base.ckpt").model
    kinds = {"water": {}, "ice": {"use_rslora": True}, "dora": {"use_dora": True}}
    return {
        name: save_adapter(
            trained_adapter(copy.deepcopy(base), seed=seed, **config), here / name, "base.ckpt"
        )
        for seed, (name, config) in enumerate(kinds.items())
    }


def test_info(command, folders):
    answer = command("adapter", "info", "water", "ice")
    assert answer.code == 0
    for text in ("LoRA", "rank-stabilised LoRA", "2, 3", "attention.input_linear", "base.ckpt"):
        assert text in answer.out


def test_info_of_prompts(command, here: Path):
    model = trained_adapter(load_checkpoint("base.ckpt").model, num_prompts=3)
    save_adapter(model, here / "prompts", "base.ckpt")
    answer = command("adapter", "info", "prompts")
    assert "prompts, 3 tokens in each attention layer" in answer.out
    assert "rank" not in answer.out  # which means nothing for them


def test_several_targets(command, here: Path):
    base = load_checkpoint("base.ckpt").model
    base.add_target(TargetSpec("charges", "charge", "e", per_atom=True))
    save_checkpoint("two.ckpt", base)
    for seed, name in enumerate("ab"):
        tuned = trained_adapter(copy.deepcopy(base), seed=seed, targets=["energy", "charges"])
        save_adapter(tuned, here / name, "two.ckpt")
    assert "energy, charges" in command("adapter", "info", "a").out
    answer = command("adapter", "check", "a", "b", "-c", "two.ckpt")
    assert answer.code == 0, answer.out
    assert "a: ok: 'energy' and its forces of a pair of atoms of each element: finite" in answer.out
    assert "a: ok: 'charges' of a pair of atoms of each element: finite" in answer.out
    answer = command("adapter", "combine", "a", "b", "-o", "ab")
    assert answer.code == 0, answer.err
    answer = command("adapter", "merge", "ab", "-c", "two.ckpt", "-o", "merged.ckpt")
    assert answer.code == 0, answer.err
    assert list(load_checkpoint("merged.ckpt").model.targets) == ["energy", "charges"]


def test_check_alone_with_the_base_and_together(command, folders):
    answer = command("adapter", "check", "water", "ice", "-c", "base.ckpt")
    assert answer.code == 0, answer.out
    assert "water: ok: fits the base" in answer.out
    assert "ice: ok: largest update: " in answer.out
    assert "together: ok: can be combined by cat, svd, linear" in answer.out
    answer = command("adapter", "check", "water", "dora")
    assert "together: ok: 'dora' is a DoRA adapter" in answer.out


def test_check_finds_what_is_wrong(command, folders, here: Path):
    ice = read_adapter(here / "ice")
    first = next(iter(ice.tensors))
    tensors = {**ice.tensors, first: torch.full_like(ice.tensors[first], torch.nan)}
    write_adapter(replace(ice, tensors=tensors), here / "ice")
    answer = command("adapter", "check", "water", "ice", "nothing")
    assert answer.code == 1
    assert "water: ok" in answer.out
    assert "ice: WRONG: 1 tensors hold numbers that are not finite" in answer.out
    assert "nothing: WRONG: There is no adapter in 'nothing'" in answer.out


def test_merge_makes_a_checkpoint_that_needs_nothing_else(command, folders):
    answer = command("adapter", "merge", "dora", "-c", "base.ckpt", "-o", "merged.ckpt")
    assert (answer.code, answer.out.strip()) == (0, "merged.ckpt")
    found = PETCalculator("merged.ckpt", device="cpu").get_forces(ethanol())
    expected = PETCalculator("base.ckpt", adapter="dora", device="cpu").get_forces(ethanol())
    assert abs(found - expected).max() == 0.0
    assert load_checkpoint("merged.ckpt").provenance["adapter"] == "dora"
    again = command("adapter", "merge", "dora", "-c", "base.ckpt", "-o", "merged.ckpt")
    assert again.code == 1
    assert "'merged.ckpt' exists already" in again.err


def test_combine_is_what_the_library_does(command, folders):
    answer = command(
        *("adapter", "combine", "water", "ice", "--weights", "0.3", "0.9"),
        *("-c", "base.ckpt", "-o", "mixed"),
    )
    assert answer.code == 0, answer.err
    model = load("base.ckpt")
    for name in ("water", "ice"):
        model.load_adapter(name, name=name)
    model.add_weighted_adapter({"water": 0.3, "ice": 0.9}, "mixed")
    model.set_adapter("mixed")
    found = PETCalculator("base.ckpt", adapter="mixed", device="cpu").get_forces(ethanol())
    assert abs(found - PETCalculator(model, device="cpu").get_forces(ethanol())).max() == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("combine", "water", "ice", "-o", "m", "--weights", "1"), "2 adapters and 1 weights"),
        (("combine", "water", "ice", "-o", "m", "--weights", "1", "1"), "do not sum to 1"),
        (("combine", "water", "ice", "-o", "m", "--combination", "lin"), "Did you mean 'linear'"),
        (("combine", "water", "dora", "-o", "m"), "'dora' is a DoRA adapter"),
        (("combine", "water", "ice", "-o", "water"), "'water' is not empty"),
        (("merge", "water", "-c", "none.ckpt", "-o", "m.ckpt"), "none.ckpt"),
        (("info", "nothing"), "There is no adapter in 'nothing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:30],
)
def test_what_is_refused(command, folders, here: Path, arguments, message: str):
    answer = command("adapter", *arguments)
    assert answer.code == 1
    assert message in answer.err
    assert not (here / "m").exists()
