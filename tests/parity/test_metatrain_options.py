"""Our options against metatrain's own: the same names, the same network by default."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config.dataset import DatasetOptions, SystemsOptions
from pet_finetune.config.finetune import FinetuneOptions
from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import (
    LongRangeOptions,
    ModelOptions,
    Options,
)
from pet_finetune.config.target import GradientOptions, TargetOptions
from pet_finetune.config.training import TrainingOptions

base_hypers = pytest.importorskip("metatrain.share.base_hypers")
documentation = pytest.importorskip("metatrain.pet.documentation")


def defaults(hypers: Any) -> dict[str, Any]:
    from metatrain.utils.hypers import init_with_defaults

    return init_with_defaults(hypers)


def test_the_default_network_is_metatrains() -> None:
    ours = ModelOptions().model_dump()
    assert ours.pop("num_prompts") == 0  # metatrain has none
    assert ours == defaults(documentation.ModelHypers)


def test_defaults_of_training_differ_only_where_documented() -> None:
    theirs = defaults(documentation.TrainerHypers)
    ours = TrainingOptions()
    differ = {
        name: field.description
        for name, field in TrainingOptions.model_fields.items()
        if name in theirs
        and name not in ("finetune", "per_structure_targets")
        and "no effect" not in (field.description or "")
        and getattr(ours, name) != theirs[name]
    }
    assert set(differ) == {"batch_size", "num_epochs", "learning_rate", "checkpoint_interval"}
    for description in differ.values():
        assert "metatrain's default is" in (description or "")


def test_metatrains_defaults_written_out_can_be_read() -> None:
    raw = {
        "training_set": "a.xyz",
        "validation_set": 0.1,
        "architecture": {
            "name": "pet",
            "model": defaults(documentation.ModelHypers),
            "training": defaults(documentation.TrainerHypers),
        },
    }
    options = parse_options(raw).options
    assert options.training.num_epochs == 1000
    assert not options.is_finetuning


@pytest.mark.parametrize(
    ("theirs", "ours", "rewritten"),
    [
        (base_hypers.BaseHypers, Options, set()),
        (base_hypers.SystemsHypers, SystemsOptions, set()),
        (base_hypers.TargetHypers, TargetOptions, {"per_atom"}),
        (base_hypers.GradientDict, GradientOptions, set()),
        (base_hypers.DatasetDictHypers, DatasetOptions, set()),
        (documentation.ModelHypers, ModelOptions, set()),
        (documentation.LongRangeHypers, LongRangeOptions, set()),
        (documentation.TrainerHypers, TrainingOptions, set()),
        (documentation.NoFinetuneHypers, FinetuneOptions, set()),
    ],
)
def test_every_option_of_metatrain_is_known(theirs: Any, ours: Any, rewritten: set[str]) -> None:
    assert set(theirs.__annotations__) - set(ours.model_fields) == rewritten
