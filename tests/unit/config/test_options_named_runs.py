"""Named runs: what an entry means, and what a file is told when it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pet_finetune.config.load import parse_options
from pet_finetune.config.named_run_options import NamedRun, read_named_runs, run_names
from pet_finetune.errors import ConfigError

DEFAULTS = {"base_model": "base.ckpt", "dataset_path": "train.xyz"}


def write(content: Any, folder: Path, name: str = "runs.json") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def one(folder: Path, *overrides: str, **entry: Any) -> NamedRun:
    path = write({"defaults": DEFAULTS, "run": entry}, folder)
    (run,) = read_named_runs(path, ["run"], overrides)
    return run


def failing(folder: Path, content: Any, *overrides: str, wanted: Any = None, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_named_runs(write(content, folder, **kwargs), wanted, overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_an_entry_is_an_options_file(tmp_path: Path) -> None:
    run = one(
        tmp_path,
        lora_r=4,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["mlp.w_in"],
        peft_use_rslora=True,
        peft_use_dora=True,
        learning_rate=0.001,
        num_epochs=3,
        batch_size=2,
        gradient_accumulation_steps=4,
        seed=7,
    )
    by_hand = {
        "seed": 7,
        "architecture": {
            "name": "pet",
            "training": {
                "learning_rate": 0.001,
                "num_epochs": 3,
                "batch_size": 2,
                "gradient_accumulation_steps": 4,
                "finetune": {
                    "method": "lora",
                    "read_from": "base.ckpt",
                    "config": {
                        "rank": 4,
                        "alpha": 16,
                        "dropout": 0.1,
                        "target_modules": ["mlp.w_in"],
                        "use_rslora": True,
                        "use_dora": True,
                    },
                },
            },
        },
        "training_set": {
            "systems": {"read_from": "train.xyz", "length_unit": "angstrom"},
            "targets": {"energy": {"key": "energy", "unit": "eV"}},
        },
        "validation_set": 0.1,
        "test_set": 0.1,
    }
    assert run.raw == by_hand
    assert run.loaded.options == parse_options(by_hand).options
    assert run.folder == Path("lora_adapters/32bits_r4_dora_rslora/run")


def test_the_data_of_an_entry(tmp_path: Path) -> None:
    names = {"length_unit": "bohr", "energy_unit": "Hartree", "energy_key": "e"}
    run = one(tmp_path, validation_path="v.xyz", test_fraction=0.2, stress_key=None,
              forces_key="f", **names)  # fmt: skip
    for part, file in (("training_set", "train.xyz"), ("validation_set", "v.xyz")):
        section = run.raw[part]
        assert section["systems"] == {"read_from": file, "length_unit": "bohr"}
        assert section["targets"]["energy"] == {
            "key": "e", "unit": "Hartree", "forces": {"key": "f"}, "stress": "off",
        }  # fmt: skip
    assert run.loaded.options.test_set == 0.2


@pytest.mark.parametrize(
    ("entry", "folder"),
    [
        ({}, "32bits_r32"),
        ({"lora_r": 2, "peft_use_dora": True}, "32bits_r2_dora"),
        ({"peft_use_rslora": True}, "32bits_r32_rslora"),
        ({"base_precision": 64}, "64bits_r32"),
        ({"quant_bits": 32}, "32bits_r32"),
        ({"quant_bits": 64}, "64bits_r32"),
        ({"quant_bits": None}, "32bits_r32"),
        ({"quant_bits": 16}, "16bits_r32"),
        ({"quant_bits": 4, "lora_r": 2, "peft_use_dora": True}, "4bits_r2_dora"),
        ({"method": "prompt"}, "32bits_prompt"),
        ({"precision": "bf16-mixed", "lora_r": 4}, "16bits_r4"),
        ({"method": "full"}, "32bits_full"),
        ({"method": "heads"}, "32bits_heads"),
        ({"method": "dora"}, "32bits_r32_dora"),
    ],
)
def test_where_results_go(tmp_path: Path, entry: Any, folder: str) -> None:
    assert one(tmp_path, **entry).folder == Path("lora_adapters", folder, "run")


def test_entries_win_over_defaults_and_overrides_over_both(tmp_path: Path) -> None:
    shared = {**DEFAULTS, "lora_r": 4, "num_epochs": 9, "validation_fraction": 0.3, "batch_size": 5}
    path = write({"defaults": shared, "a": {"architecture.training.num_epochs": 8,
                                            "validation_path": "v.xyz"}}, tmp_path)  # fmt: skip
    (run,) = read_named_runs(path, None, ["lora_r=2", "architecture.training.batch_size=1"])
    options = run.loaded.options
    assert options.finetune.config.rank == 2
    assert (options.training.num_epochs, options.training.batch_size) == (8, 1)
    assert run.raw["validation_set"]["systems"]["read_from"] == "v.xyz"


def test_any_option_may_be_named(tmp_path: Path) -> None:
    run = one(
        tmp_path,
        **{
            "architecture.training.baseline.ridge": 0.5,
            "architecture": {"training": {"baseline": {"mode": "keep"}}},
            "ema": 0.9,
            "new_elements": "nearest",
            "modules_to_save": [],
        },
    )
    training = run.loaded.options.training
    assert (training.baseline.mode, training.baseline.ridge, training.ema) == ("keep", 0.5, 0.9)
    assert training.finetune.new_elements == "nearest"
    assert training.finetune.config.modules_to_save == ()


def test_shared_settings_of_lora_are_not_for_other_methods(tmp_path: Path) -> None:
    shared = {**DEFAULTS, "lora_r": 4, "peft_use_dora": True}
    path = write({"defaults": shared, "a": {"method": "full"}, "b": {}}, tmp_path)
    full, lora = read_named_runs(path, None)
    assert "config" not in full.raw["architecture"]["training"]["finetune"]
    assert lora.loaded.options.finetune.config.rank == 4
    mine = {"defaults": shared, "a": {"method": "heads", "lora_r": 4}}
    assert "run 'a': lora_r: belongs to method" in failing(tmp_path, mine)


def test_yaml_says_the_same(tmp_path: Path) -> None:
    content = {"defaults": DEFAULTS, "a": {"lora_r": 4}, "b": {}}
    path = write(yaml.safe_dump(content), tmp_path, "runs.yaml")
    assert [run.raw for run in read_named_runs(path, None)] == [
        run.raw for run in read_named_runs(write(content, tmp_path), None)
    ]
    assert run_names(path) == ["a", "b"]


ENTRY = {"defaults": DEFAULTS, "ethanol_r8": {}, "ethanol_r4": {"lora_r": 4}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": {},\n }', "runs.json, line 2, column 2: is no JSON: "),
        ("[]", "expected runs by name, {...}, got list."),
        ('{"a": {}, "a": {}}', "'a' stands twice in one section."),
        ({}, "the file names no run."),
        ({"defaults": DEFAULTS}, "the file names no run."),
        ({"a": 5}, "a: expected a section of settings, got 5."),
        ({"a/b": DEFAULTS}, "'a/b' cannot be a run's name"),
        ({"a": {"dataset_path": "x.xyz"}}, "run 'a': base_model is missing"),
        ({"a": {"base_model": "x.ckpt"}}, "run 'a': dataset_path is missing"),
        ({"a": {**DEFAULTS, "lora_rank": 4}}, "unknown setting 'lora_rank'. Did you mean 'lora_r'"),
        ({"a": {**DEFAULTS, "num_epoch": 4}}, "setting 'num_epoch'. Did you mean 'num_epochs'?"),
        (
            {"a": {**DEFAULTS, "architecture.training.num_epoch": 4}},
            "architecture.training.num_epoch: unknown option. Did you mean 'num_epochs'?",
        ),
        ({"a": {**DEFAULTS, "lora_r": "4"}}, "run 'a': lora_r: expected a positive integer"),
        (
            {"a": {**DEFAULTS, "lora_r": 4, "rank": 4}},
            "run 'a': lora_r and rank are the same option. Keep one of them.",
        ),
        (
            {"a": {**DEFAULTS, "test_path": "t.xyz", "test_fraction": 0.1}},
            "test_path and test_fraction are the same option.",
        ),
        ({"a": {**DEFAULTS, "seed.first": 1, "seed": 2}}, "seed.first: seed is no section here."),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, content: Any, message: str) -> None:
    assert message in failing(tmp_path, content)


def test_no_such_file(tmp_path: Path) -> None:
    write({}, tmp_path, "finetune.json")
    with pytest.raises(ConfigError, match=r"no such file of runs. In that folder: finetune.json"):
        read_named_runs(tmp_path / "fine.json", None)


def test_no_such_run(tmp_path: Path) -> None:
    message = failing(tmp_path, ENTRY, wanted=["ethanol_r9"])
    assert "there is no run 'ethanol_r9'. Did you mean 'ethanol_r" in message
    assert message.endswith("Runs: ethanol_r8, ethanol_r4.")


def test_the_problems_of_all_runs_are_told_at_once(tmp_path: Path) -> None:
    content = {**ENTRY, "x": {"lora_r": 0}, "y": {"lora_dropout": 2, "batch_size": 0}}
    message = failing(tmp_path, content)
    assert len(message.splitlines()) == 2
    for part in ("run 'x': lora_r: ", "run 'y': ", "lora_dropout: ", "batch_size: "):
        assert part in message


def test_overrides_that_are_none(tmp_path: Path) -> None:
    assert "'lora_r': expected key=value" in failing(tmp_path, ENTRY, "lora_r")
    assert "Quote it if it is text" in failing(tmp_path, ENTRY, "lora_r=[")
