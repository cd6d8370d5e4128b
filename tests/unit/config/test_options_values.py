"""What single options accept, and the words used for what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import ModelOptions, Options
from pet_finetune.errors import ConfigError

TRAINING_SET = {
    "systems": {"read_from": "a.xyz", "length_unit": "angstrom"},
    "targets": {"energy": {"key": "energy", "unit": "eV"}},
}


def nested(path: str, value: Any) -> dict[str, Any]:
    """Options with one value at a dotted path beside a training set."""
    raw: dict[str, Any] = {"training_set": TRAINING_SET}
    node = raw
    *sections, name = path.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    return raw


def problems(raw: dict[str, Any], **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_options(raw, **kwargs)
    return caught.value.problems


def options(raw: dict[str, Any], **kwargs: Any) -> Options:
    return parse_options(raw, **kwargs).options


TRAINING = "architecture.training"
MODEL = "architecture.model"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{TRAINING}.num_epochs", "abc", "expected a positive integer or null, got 'abc'."),
        (f"{TRAINING}.num_epochs", 0, "expected a positive integer or null, got 0."),
        (f"{TRAINING}.num_epochs", 2.5, "expected a positive integer or null, got 2.5."),
        (f"{TRAINING}.batch_size", True, "expected a positive integer or null, got true."),
        (f"{TRAINING}.log_interval", None, "expected a positive integer, got nothing."),
        (f"{TRAINING}.batch_size", [1, 2], "expected a positive integer or null, got [1, 2]."),
        (
            f"{TRAINING}.batch_size",
            {"a": 1},
            "expected a positive integer or null, got a section (a).",
        ),
        (
            f"{TRAINING}.learning_rate",
            "1e-3",
            "expected a positive number or null, got '1e-3'. Write it without quotes.",
        ),
        (f"{TRAINING}.learning_rate", -1e-3, "expected a positive number or null, got -0.001."),
        (
            f"{TRAINING}.learning_rate",
            float("nan"),
            "expected a positive number or null, got nan.",
        ),
        (f"{TRAINING}.weight_decay", -1, "expected a non-negative number or null, got -1."),
        (
            f"{TRAINING}.ema",
            1.0,
            "expected a number between 0 and 1, both excluded or null, got 1.0.",
        ),
        (
            f"{TRAINING}.warmup_fraction",
            1.0,
            "expected a number from 0 up to, but not including, 1, got 1.0.",
        ),
        (f"{TRAINING}.scale_targets", 3, "expected true or false, got 3."),
        (
            f"{TRAINING}.early_stopping.patience",
            -1,
            "expected a positive integer, got -1.",
        ),
        (
            f"{TRAINING}.early_stopping.min_delta",
            1,
            "expected a number from 0 up to, but not including, 1, got 1.",
        ),
        (
            f"{TRAINING}.early_stopping",
            False,
            "expected a section with keys (patience, min_delta) or null, got false.",
        ),
        (
            f"{TRAINING}.scheduler",
            "cosin",
            "expected one of cosine, constant, got 'cosin'. Did you mean 'cosine'?",
        ),
        (
            f"{TRAINING}.finetune.method",
            "LoRA",
            "expected one of full, lora, prompt, heads, got 'LoRA'. Did you mean 'lora'?",
        ),
        (
            f"{TRAINING}.finetune.config.rank",
            0,
            "expected a positive integer, got 0.",
        ),
        (
            f"{MODEL}.transformer_type",
            "preln",
            "expected one of PreLN, PostLN, got 'preln'. Did you mean 'PreLN'?",
        ),
        (
            f"{MODEL}",
            "big",
            "expected a section with keys (cutoff, num_neighbors_adaptive, ",
        ),
        (
            "device",
            "gppu",
            "expected auto, cpu, cuda, cuda:0, mps, gpu or a number of processes, ",
        ),
        (
            "device",
            "cuda:x",
            "expected auto, cpu, cuda, cuda:0, mps, gpu or a number of processes, ",
        ),
        ("base_precision", 16, "expected 32 or 64, got 16. Forces are derivatives"),
        ("base_precision", 48, "expected 32 or 64, got 48."),
        ("seed", -1, "expected a non-negative integer or null, got -1."),
        (
            "architecture.name",
            "gap",
            "expected 'pet', got 'gap'. This package trains the PET architecture only.",
        ),
        (
            "architecture.atomic_types",
            ["H", "O"],
            "expected a list of atomic numbers, 1 to 118 or null, got ['H', 'O'].",
        ),
        (
            "validation_set",
            1.5,
            "expected a number from 0 up to, but not including, 1, got 1.5.",
        ),
        ("validation_set", -0.1, "expected a number from 0 up to, but not including, 1, "),
        ("test_set", 1.0, "expected a number from 0 up to, but not including, 1, got 1.0."),
    ],
)
def test_wrong_values_are_refused_in_plain_words(path: str, value: Any, message: str) -> None:
    found = problems(nested(path, value))
    assert any(line.startswith(f"{path}: {message}") for line in found), found


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"energy": {"H": 1.0}}, "'H' is not an atomic number."),
        ({"energy": {1: "x"}}, "The value of element 1 is 'x'."),
        (3.0, "or the path of a checkpoint"),
    ],
)
def test_given_baselines_that_make_no_sense(value: Any, reason: str) -> None:
    (line,) = problems(nested(f"{TRAINING}.atomic_baseline", value))
    assert line.startswith("architecture.training.atomic_baseline: expected {target: number} or")
    assert reason in line


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"energy": -1.0}, "expected {target: positive number}"),
        ({"energy": {1: 1.0}}, "One scale a target is supported"),
        (True, "or the path of a checkpoint"),
    ],
)
def test_given_scales_that_make_no_sense(value: Any, reason: str) -> None:
    (line,) = problems(nested(f"{TRAINING}.fixed_scaling_weights", value))
    assert reason in line


def test_valid_given_baselines_and_scales() -> None:
    raw = nested(f"{TRAINING}.atomic_baseline", {"energy": {1: -13, 8: -430.5}})
    raw["architecture"]["training"]["fixed_scaling_weights"] = {"energy": 2}
    training = options(raw).training
    assert training.atomic_baseline == {"energy": {1: -13.0, 8: -430.5}}
    assert training.fixed_scaling_weights == {"energy": 2.0}
    raw["architecture"]["training"] |= {"atomic_baseline": "a.ckpt", "fixed_scaling_weights": "b"}
    training = options(raw).training
    assert (training.atomic_baseline, training.fixed_scaling_weights) == ("a.ckpt", "b")


def test_whole_numbers_and_switch_words_are_taken_for_what_they_mean() -> None:
    assert options(nested(f"{TRAINING}.batch_size", 8.0)).training.batch_size == 8
    assert options(nested(f"{TRAINING}.learning_rate", 1)).training.learning_rate == 1.0
    assert options(nested(f"{TRAINING}.scale_targets", "off")).training.scale_targets is False
    assert options(nested(f"{TRAINING}.early_stopping", 7)).training.early_stopping.patience == 7
    assert options(nested("device", "CUDA:1")).device == "cuda:1"


@pytest.mark.parametrize(("given", "word"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_words_that_yaml_takes_for_booleans_are_words(given: Any, word: str) -> None:
    training = options(nested("architecture.training.compile", given)).architecture.training
    assert training.compile == word


def test_empty_sections_are_sections_of_defaults() -> None:
    raw = {"training_set": TRAINING_SET, "architecture": {"model": None, "training": None}}
    assert options(raw).architecture == options({"training_set": TRAINING_SET}).architecture
    assert options({"training_set": TRAINING_SET, "architecture": None}).training.num_epochs is None


def test_options_cannot_be_changed_after_loading() -> None:
    loaded = options({"training_set": TRAINING_SET})
    with pytest.raises(ValueError, match="frozen"):
        loaded.training.num_epochs = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        ModelOptions().cutoff = 5.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "guess"),
    [
        ("sede", "Did you mean 'seed'?"),
        (f"{TRAINING}.learnig_rate", "Did you mean 'learning_rate'?"),
        (f"{MODEL}.Cutoff", "Did you mean 'cutoff'?"),
        (f"{TRAINING}.finetune.readfrom", "Did you mean 'read_from'?"),
        (f"{TRAINING}.finetune.config.rnak", "Did you mean 'rank'?"),
        (f"{TRAINING}.loss.energy.weigth", "Did you mean 'weight'?"),
        (f"{TRAINING}.baseline.mod", "Did you mean 'mode'?"),
        ("architecture.batch_size", "Did you mean architecture.training.batch_size?"),
        ("num_epochs", "Did you mean architecture.training.num_epochs?"),
        (f"{MODEL}.R_CUT", "today's is 'cutoff'."),
    ],
)
def test_unknown_options_name_the_nearest_and_the_allowed(path: str, guess: str) -> None:
    (line,) = problems(nested(path, 1))
    assert line.startswith(f"{path}: ")
    assert guess in line
    assert "Allowed here: " in line


def test_options_without_effect_are_not_offered() -> None:
    (line,) = problems(nested(f"{TRAINING}.num_worker", 1))
    assert "num_workers" not in line


def test_the_training_set_is_required() -> None:
    (line,) = problems({"seed": 1})
    assert line == (
        "training_set: missing. Training data: a path, a section, or a list of sections."
    )


def test_all_problems_come_together() -> None:
    raw = nested(f"{TRAINING}.num_epochs", "abc")
    raw["architecture"]["training"]["learnig_rate"] = 1
    raw["architecture"]["model"] = {"d_pet": 130}
    raw["sede"] = 1
    raw["training_set"] = {"systems": "a.xyz", "targets": {"energy": {"unit": "kcal"}}}
    found = problems(raw)
    places = {line.split(":")[0] for line in found}
    assert places == {
        "architecture.training.num_epochs",
        "architecture.training.learnig_rate",
        "architecture.model.num_heads",
        "sede",
        "training_set.targets.energy.unit",
    }


def test_the_message_counts_and_lists_the_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({"training_set": "a.xyz", "sede": 1, "devise": 2}, source="my.yaml")
    first, *rest = str(caught.value).splitlines()
    assert first == "my.yaml: 2 problems"
    assert [line.strip().split(":")[0] for line in rest] == ["sede", "devise"]


def test_a_wrong_value_does_not_cause_contradictions_with_its_default() -> None:
    raw = nested(f"{MODEL}.d_pet", "abc")
    raw["architecture"]["model"]["num_heads"] = 7  # does not divide the default d_pet
    (line,) = problems(raw)
    assert line.startswith("architecture.model.d_pet")


def test_options_that_are_no_section_at_all() -> None:
    (line,) = problems(nested("architecture", 5))
    assert line.startswith("architecture: expected a section with keys (name, model, ")


@pytest.mark.parametrize("section", ["architecture", "training_set", "validation_set"])
def test_keys_must_be_names(section: str) -> None:
    found = problems({"training_set": TRAINING_SET, section: {1: 2}})
    assert f"{section}: expected a name as key, got 1." in found


# What a careless edit may leave anywhere in the file: every piece is put in every place.
GARBAGE: tuple[Any, ...] = (None, -1, "x", True, 0.5, [], ["a", None], {}, {"a": 1}, {1: 2}, [[1]])


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, item in node.items() if isinstance(node, dict) else ():
        yield (*path, name)
        yield from places(item, (*path, name))


def test_whatever_is_written_there_is_either_read_or_explained() -> None:
    whole = nested(f"{TRAINING}.finetune", {"read_from": "m.ckpt", "config": {"rank": 4}})
    whole["architecture"]["training"] |= {"LORA_RANK": 4, "loss": {"energy": {"forces": "mse"}}}
    whole["validation_set"] = {**TRAINING_SET, "extra_data": {"charge": {"key": "q"}}}
    messages: list[str] = []
    for path in places(whole):
        for piece in GARBAGE:
            raw = copy.deepcopy(whole)
            node = raw
            for name in path[:-1]:
                node = node[name]
            node[path[-1]] = piece
            try:
                parse_options(raw)
            except ConfigError as error:
                messages += error.problems
    assert len(messages) > 100
    assert not [line for line in messages if "Input should" in line or "not accepted:" in line]
