"""The JSON schema of options files: it allows what the program allows, and finds mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pet_finetune.config.load import parse_options
from pet_finetune.config.options_reference import (
    SCHEMA_FILE,
    entries_below,
    option_entries,
    options_schema,
    schema_line,
)
from pet_finetune.errors import ConfigError
from tiny_data import options

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[3]
TRAINING = "architecture.training"
#: Short forms and rarer sections, each beside the usual options.
GOOD: dict[str, Any] = {
    "training_set": "train.xyz",
    "validation_set": {"indices": [1, 2]},
    "test_set": ["a.xyz", {"systems": "b.xyz", "targets": {"energy": {"forces": "on"}}}],
    f"{TRAINING}.finetune": {"method": "dora", "read_from": "a.ckpt", "retention": False},
    f"{TRAINING}.finetune.config": {"rank": 4, "rank_pattern": {"mlp.*": 2}},
    f"{TRAINING}.finetune.inherit_heads": {"energy": "energy/pbe"},
    f"{TRAINING}.early_stopping": 5,
    f"{TRAINING}.loss": "huber",
    f"{TRAINING}.batch_size": "${oc.env:BATCH,8}",
    f"{TRAINING}.rotational_consistency": 0.5,
    TRAINING: {"num_epochs": 4, "finetune": {"method": "full", "read_from": "a", "unfreeze": 2}},
    f"{TRAINING}.finetune.replay": {"read_from": "pool.xyz"},
    "architecture.atomic_types": [1, 6, 8],
    "architecture.model": {"cutoff": 5.0, "num_neighbors_adaptive": None},
    "seed": None,
    "wandb": {"project": "mine"},
}
WRONG: dict[str, Any] = {
    "sead": 1,
    f"{TRAINING}.batch_size": 0,
    f"{TRAINING}.learning_rate": "fast",
    f"{TRAINING}.finetune": {"method": "lroa", "read_from": "a.ckpt"},
    f"{TRAINING}.finetune.config": {"rank": -1},
    f"{TRAINING}.finetune.config.rnak": 4,
    f"{TRAINING}.loss": "mea",
    "architecture.model.cutoff": -1.0,
    "validation_set": {"sytems": "a.xyz"},
    "training_set": 5,
}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = options_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The usual options with one of them changed."""
    content = copy.deepcopy(options({"finetune": {"method": "lora", "read_from": "a.ckpt"}}))
    *above, last = path.split(".")
    section = content
    for name in above:
        section = section.setdefault(name, {})
    section[last] = value
    return content


def test_the_shipped_schema_is_that_of_the_program() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == options_schema(), (
        "write it anew: pet-finetune options --schema > src/pet_finetune/options.schema.json"
    )
    assert schema_line().startswith("# yaml-language-server: $schema=")


@pytest.mark.parametrize("path", GOOD)
def test_what_the_program_takes_is_allowed(path: str, validator: Any) -> None:
    content = changed(path, GOOD[path])
    assert [error.message for error in validator.iter_errors(content)] == []
    if "$" not in str(GOOD[path]):
        parse_options(content)


@pytest.mark.parametrize("path", WRONG)
def test_mistakes_are_found(path: str, validator: Any) -> None:
    content = changed(path, WRONG[path])
    assert list(validator.iter_errors(content))
    with pytest.raises(ConfigError):
        parse_options(content)


@pytest.mark.parametrize("file", [ROOT / "options.yaml", *ROOT.glob("examples/**/*.yaml")])
def test_files_of_the_repository(file: Path, validator: Any) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "training_set" not in content:
        pytest.skip("no options of a training")
    assert [error.message for error in validator.iter_errors(content)] == []


def test_every_option_is_described_there() -> None:
    text = json.dumps(options_schema(), ensure_ascii=False)
    for entry in option_entries():
        if not entry.meaning.startswith("Accepted") and "Keys as in" not in entry.meaning:
            assert json.dumps(entry.meaning, ensure_ascii=False)[1:-1] in text, entry.name


def test_branches() -> None:
    names = [entry.name for entry in entries_below("architecture.training.finetune.config")]
    assert names[0] == "architecture.training.finetune.config"
    assert "architecture.training.finetune.config.rank" in names
    (one,) = entries_below("training_set.targets.energy_unknown".replace("energy_unknown", "unit"))
    assert one.name == "training_set[].targets.<name>.unit"
    with pytest.raises(ConfigError, match="Did you mean 'architecture.training.batch_size'"):
        entries_below("batch_size")
    with pytest.raises(ConfigError, match="Did you mean 'architecture.training'"):
        entries_below("architecture.trainig")
