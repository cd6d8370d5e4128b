from __future__ import annotations

import pytest

from pet_finetune import errors
from pet_finetune.errors import ConfigError, PetFinetuneError, did_you_mean


def test_one_except_clause_catches_every_error() -> None:
    kinds = [kind for name, kind in vars(errors).items() if name.endswith("Error")]
    assert len(kinds) == 10
    assert all(issubclass(kind, PetFinetuneError) for kind in kinds)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learnig_rate", " Did you mean 'learning_rate'?"),
        ("LEARNING_RATE", " Did you mean 'learning_rate'?"),
        ("zzz", ""),
    ],
)
def test_the_nearest_name_is_suggested(name: str, expected: str) -> None:
    assert did_you_mean(name, ["learning_rate", "batch_size"]) == expected


def test_a_config_error_keeps_its_problems_apart() -> None:
    assert ConfigError("a.yaml: 2 problems", ["one", "two"]).problems == ("one", "two")
    assert ConfigError("a.yaml: missing").problems == ("a.yaml: missing",)
