"""``finetune.new_elements``: what it may say, and what it is told when it may not."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config import parse_options
from pet_finetune.errors import ConfigError

NAME = "architecture.training.finetune.new_elements"


def load(new_elements: Any, checkpoint: str | None = "base.ckpt") -> Any:
    finetune = {"new_elements": new_elements, "method": "full"}
    raw = {
        "training_set": "a.xyz",
        "architecture": {"training": {"finetune": finetune}},
    }
    return parse_options(raw, checkpoint).options


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("nearest", "nearest"),
        ("random", "random"),
        ({"Br": "Cl", "na": 3}, {"Br": "Cl", "Na": "Li"}),
        ({35: 17}, {"Br": "Cl"}),
    ],
)
def test_what_it_may_say(given: Any, meant: Any) -> None:
    options = load(given)
    assert options.finetune.new_elements == meant
    again = parse_options(options.resolved()).options
    assert again.finetune.new_elements == meant


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("neerest", "got 'neerest'. Did you mean 'nearest'?"),
        ({}, "expected nearest, random, or {new element: element that it starts from} or null"),
        (["Br"], "got ['Br']."),
        ({"Brr": "Cl"}, "'Brr' is no chemical element. Did you mean 'Br'?"),
        ({"Br": "Chlorine"}, "'Chlorine' is no chemical element."),
        ({"Br": 200}, "200 is no atomic number"),
        ({"Br": "Br"}, "Br cannot start from itself."),
        ({"Br": "Cl", 35: "F"}, "Br is named twice."),
        ({False: "Fm"}, "put nobelium in quotes"),
    ],
)
def test_what_it_may_not_say(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(given)
    (line,) = caught.value.problems
    assert line.startswith(f"{NAME}: ")
    assert message in line


def test_a_model_from_scratch_takes_its_elements_from_the_data() -> None:
    with pytest.raises(ConfigError, match="trained from scratch takes its elements") as caught:
        load("nearest", None)
    assert caught.value.problems[0].startswith(NAME)
