"""Where training starts: -c, read_from, the method, and the older spellings."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config.finetune import DEFAULT_TARGET_MODULES, FinetuneConfig
from pet_finetune.config.load import LoadedOptions, parse_options
from pet_finetune.errors import ConfigError

FINETUNE = "architecture.training.finetune"


def load(training: Any = None, checkpoint: str | None = None, **kwargs: Any) -> LoadedOptions:
    data = {
        "systems": {"read_from": "a.xyz", "length_unit": "angstrom"},
        "targets": {"energy": {"unit": "eV"}},
    }
    raw = {"training_set": data, "architecture": {"training": training}}
    return parse_options(raw, checkpoint, **kwargs)


def problems(*args: Any, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return caught.value.problems


def test_neither_checkpoint_nor_read_from_is_from_scratch() -> None:
    loaded = load()
    assert not loaded.options.is_finetuning
    assert loaded.options.finetune.method == "full"
    assert loaded.options.learning_rate() == 1e-3
    assert loaded.options.baseline_mode() == "fit"
    assert loaded.notices == ()


def test_a_checkpoint_alone_means_lora() -> None:
    loaded = load(checkpoint="base.ckpt")
    finetune = loaded.options.finetune
    assert (finetune.method, finetune.read_from) == ("lora", "base.ckpt")
    assert finetune.config.rank == 32
    assert finetune.config.alpha == 32.0
    assert finetune.config.target_modules == DEFAULT_TARGET_MODULES
    assert loaded.options.baseline_mode() == "refit"
    assert loaded.notices == (f"{FINETUNE}.method not given: lora (the default with -c).",)


@pytest.mark.parametrize(
    ("finetune", "checkpoint", "method"),
    [
        ({"read_from": "m.ckpt"}, None, "full"),  # metatrain's default
        ({"inherit_heads": {}}, "m.ckpt", "lora"),
        ({"read_from": "m.ckpt", "config": {"rank": 4}}, None, "lora"),
        ({"read_from": "m.ckpt", "config": {"r": 4}}, None, "lora"),
        ({"config": {"head_modules": ["h"]}}, "m.ckpt", "heads"),
        ({"method": "full"}, "m.ckpt", "full"),
        ({"method": "heads"}, "m.ckpt", "heads"),
        ({"read_from": None, "config": {}, "inherit_heads": {}}, None, "full"),
    ],
)
def test_the_method_when_it_is_not_named(finetune: Any, checkpoint: Any, method: str) -> None:
    assert load({"finetune": finetune}, checkpoint).options.finetune.method == method


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-3), ("heads", 1e-3), ("full", 5e-4)])
def test_the_learning_rate_follows_the_method(method: str, rate: float) -> None:
    training = {"finetune": {"method": method, "read_from": "m.ckpt"}}
    assert load(training).options.learning_rate() == rate
    assert load({**training, "learning_rate": 6e-5}).options.learning_rate() == 6e-5


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-3), ("full", 2e-4)])
def test_the_learning_rate_follows_the_optimizer_too(method: str, rate: float) -> None:
    training = {"finetune": {"method": method, "read_from": "m.ckpt"}, "optimizer": "adamw"}
    assert load(training).options.learning_rate() == rate
    assert load({"optimizer": "adamw"}).options.learning_rate() == 5e-4
    assert load({}).options.learning_rate() == 1e-3


def test_one_average_of_the_weights_by_default_and_none_beside_swa() -> None:
    assert load({}).options.training.ema == 0.99
    assert load({"ema": None}).options.training.ema is None
    assert load({"swa": {"start": 0.5}}).options.training.ema is None


def test_alpha_follows_the_rank_unless_given() -> None:
    def lora(**config: Any) -> Any:
        return load({"finetune": {"config": config}}, "m.ckpt").options.finetune.config

    assert lora(rank=16).alpha == 16.0
    assert lora(rank=16, alpha=4).alpha == 4.0
    assert lora(r=2, lora_alpha=1, lora_dropout=0.1).model_dump(
        include={"rank", "alpha", "dropout"}
    ) == {"rank": 2, "alpha": 1.0, "dropout": 0.1}
    assert lora(target_modules="all-linear").target_modules == ("all-linear",)


def test_a_checkpoint_beside_another_read_from_is_an_error() -> None:
    (line,) = problems({"finetune": {"read_from": "a.ckpt", "method": "full"}}, "b.ckpt")
    assert line == f"{FINETUNE}.read_from: is 'a.ckpt', but -c gives 'b.ckpt'. Remove one of them."


def test_the_same_checkpoint_twice_is_fine() -> None:
    training = {"finetune": {"read_from": "./run/../a.ckpt", "method": "full"}}
    assert load(training, "a.ckpt").options.finetune.read_from == "a.ckpt"


@pytest.mark.parametrize("method", ["lora", "heads"])
def test_a_method_that_changes_a_model_needs_one(method: str) -> None:
    training = {"finetune": {"method": method}}
    (line,) = problems(training)
    assert line.startswith(f"{FINETUNE}.method: {method} changes an existing model")
    assert load(training, require_start=False).options.finetune.method == method


def test_two_names_for_one_setting() -> None:
    (line,) = problems({"finetune": {"config": {"rank": 4, "r": 8}}}, "m.ckpt")
    assert line.startswith(f"{FINETUNE}.config.r: is 8, but today's spelling")
    assert load({"finetune": {"config": {"rank": 4, "r": 4}}}, "m.ckpt").options.is_finetuning


def test_metatrains_lora_section_runs_unchanged() -> None:
    finetune = {
        "method": "lora",
        "read_from": "pet-mad.ckpt",
        "config": {"rank": 4, "alpha": 8, "target_modules": ["input_linear", "output_linear"]},
        "inherit_heads": {"energy": "energy/base"},
    }
    loaded = load({"finetune": finetune})
    own = loaded.options.finetune
    assert (own.config.rank, own.config.alpha) == (4, 8.0)
    assert own.config.target_modules == ("input_linear", "output_linear")
    assert own.inherit_heads == {"energy": "energy/base"}
    assert loaded.notices == ()


def test_the_shorthand_of_a_method() -> None:
    short = load({"finetune": {"method": "dora", "config": {"rank": 4}}}, "m.ckpt")
    long = load({"finetune": {"method": "lora", "config": {"rank": 4, "use_dora": True}}}, "m.ckpt")
    assert short.options == long.options
    assert short.options.finetune.config.use_dora


def test_qlora_is_lora_in_four_bits() -> None:
    config = load({"finetune": {"method": "qlora"}}, "m.ckpt").options.finetune.config
    assert (config.quant_bits, config.rank) == (4, 32)
    eight = {"method": "qlora", "config": {"quant_bits": 8}}
    assert load({"finetune": eight}, "m.ckpt").options.finetune.config.quant_bits == 8


def test_settings_of_prompts_choose_prompts() -> None:
    config = {"num_prompts": 4, "modules_to_save": []}
    loaded = load({"finetune": {"config": config}}, "m.ckpt").options
    assert loaded.finetune.method == "prompt"
    assert loaded.resolved()["architecture"]["training"]["finetune"]["config"] == config


def test_pefts_names_of_settings() -> None:
    config = {"r": 4, "lora_alpha": 2, "init_lora_weights": True, "use_rslora": True}
    own = load({"finetune": {"config": config}}, "m.ckpt").options.finetune.config
    assert (own.rank, own.alpha, own.use_rslora) == (4, 2.0, True)


@pytest.mark.parametrize("key", ["init", "init_lora_weights"])
def test_factors_start_as_loras_alone(key: str) -> None:
    """Once there was a choice, and options files of then are still about."""
    load({"finetune": {"config": {"rank": 4, key: "default"}}}, "m.ckpt")
    (line,) = problems({"finetune": {"config": {"rank": 4, key: "pissa"}}}, "m.ckpt")
    assert line.startswith(f"{FINETUNE}.config.{key}: is 'pissa', but")


@pytest.mark.parametrize(
    ("config", "key", "phrase"),
    [
        ({"rank": 0}, "rank", "a positive integer"),
        ({"alpha": -1}, "alpha", "a positive number"),
        ({"rank_pattern": {"w_in": 0}}, "rank_pattern", "{layer: positive integer}"),
        ({"alpha_pattern": ["w_in"]}, "alpha_pattern", "{layer: positive number}"),
    ],
)
def test_settings_of_lora_that_make_no_sense(config: Any, key: str, phrase: str) -> None:
    (line,) = problems({"finetune": {"method": "lora", "config": config}}, "m.ckpt")
    assert line.startswith(f"{FINETUNE}.config.{key}: expected ")
    assert phrase in line


def test_settings_of_another_method_are_refused_but_metatrains_leftovers() -> None:
    full = {"method": "full", "config": {"rank": 4}}
    assert any("no effect" in line for line in load({"finetune": full}, "m.ckpt").notices)
    (line,) = problems({"finetune": {**full, "config": {"use_dora": True}}}, "m.ckpt")
    assert line.startswith(f"{FINETUNE}.config.use_dora: belongs to method lora, but the method")


# The older spellings


def test_the_old_lora_keys_run_and_tell_todays() -> None:
    training = {"USE_LORA_PEFT": True, "LORA_RANK": 4, "LORA_ALPHA": 0.5}
    loaded = load(training, "best_model.ckpt")
    own = loaded.options.finetune
    assert (own.method, own.config.rank, own.config.alpha) == ("lora", 4, 0.5)
    assert own.read_from == "best_model.ckpt"
    assert loaded.notices == (
        "architecture.training.USE_LORA_PEFT is an older spelling; today: "
        f"{FINETUNE}.method: lora.",
        f"architecture.training.LORA_RANK is an older spelling; today: {FINETUNE}.config.rank.",
        f"architecture.training.LORA_ALPHA is an older spelling; today: {FINETUNE}.config.alpha.",
    )


def test_without_lora_everything_is_trained() -> None:
    loaded = load({"USE_LORA_PEFT": False, "LORA_RANK": 4}, "m.ckpt")
    assert loaded.options.finetune.method == "full"
    assert any("LORA_RANK has no effect" in line for line in loaded.notices)


def test_a_rank_alone_means_lora_and_nulls_mean_nothing() -> None:
    assert load({"LORA_RANK": 2}, "m.ckpt").options.finetune.method == "lora"
    assert load({"LORA_RANK": None, "USE_LORA_PEFT": None}).options == load().options


@pytest.mark.parametrize(
    ("training", "place"),
    [
        ({"LORA_RANK": 4, "finetune": {"method": "lora", "config": {"rank": 8}}}, "LORA_RANK"),
        ({"USE_LORA_PEFT": True, "finetune": {"method": "full"}}, "USE_LORA_PEFT"),
        ({"USE_LORA_PEFT": False, "finetune": {"method": "lora"}}, "USE_LORA_PEFT"),
        ({"EPOCH_NUM": 5, "num_epochs": 6}, "EPOCH_NUM"),
    ],
)
def test_old_and_new_spelling_that_disagree(training: Any, place: str) -> None:
    (line,) = problems(training, "m.ckpt")
    assert line.startswith(f"architecture.training.{place}: ")
    assert "today's spelling" in line
    assert "Keep only the latter." in line


def test_old_and_new_spelling_that_agree() -> None:
    training = {"LORA_RANK": 4, "finetune": {"method": "lora", "config": {"rank": 4}}}
    assert load(training, "m.ckpt").options.finetune.config.rank == 4


def test_a_switch_that_is_no_switch() -> None:
    (line,) = problems({"USE_LORA_PEFT": "perhaps"}, "m.ckpt")
    assert "USE_LORA_PEFT: expected true or false, got 'perhaps'." in line


def test_a_wrong_old_value_is_reported_at_todays_place() -> None:
    (line,) = problems({"LORA_RANK": "four"}, "m.ckpt")
    assert line == f"{FINETUNE}.config.rank: expected a positive integer, got 'four'."


def test_other_old_names() -> None:
    loaded = load({"EPOCH_NUM": 7, "INITIAL_LR": 1e-3, "STRUCTURAL_BATCH_SIZE": 3})
    training = loaded.options.training
    assert (training.num_epochs, training.learning_rate, training.batch_size) == (7, 1e-3, 3)
    assert len(loaded.notices) == 3


OLDEST = {
    "MODEL_TO_START_WITH": "best_model_state_dict",
    "ALL_SPECIES_PATH": "all_species.npy",
    "SELF_CONTRIBUTIONS_PATH": "self_contributions.npy",
}


def test_the_oldest_start() -> None:
    loaded = load({**OLDEST, "USE_LORA_PEFT": True, "LORA_RANK": 4, "LORA_ALPHA": 4})
    own = loaded.options.finetune
    assert own.legacy_start is not None
    assert own.legacy_start.model == "best_model_state_dict"
    assert own.legacy_start.all_species == "all_species.npy"
    assert own.legacy_start.self_contributions == "self_contributions.npy"
    assert own.method == "lora"
    assert loaded.options.is_finetuning
    assert sum("older spelling" in line for line in loaded.notices) == 6


def test_the_oldest_start_trains_everything_by_default() -> None:
    assert load(OLDEST).options.finetune.method == "full"


def test_nulls_of_the_oldest_start_mean_nothing() -> None:
    assert load(dict.fromkeys(OLDEST)).options == load().options


@pytest.mark.parametrize("left_out", list(OLDEST))
def test_the_oldest_start_needs_all_three_files(left_out: str) -> None:
    (line,) = problems({key: value for key, value in OLDEST.items() if key != left_out})
    assert line.startswith(f"{FINETUNE}.legacy_start.")
    assert "missing." in line
    assert left_out in line


def test_the_oldest_start_beside_another() -> None:
    (line,) = problems(OLDEST, "m.ckpt")
    assert "cannot start from these files (MODEL_TO_START_WITH...) and from -c (m.ckpt)" in line
    (line,) = problems({**OLDEST, "finetune": {"read_from": "m.ckpt"}})
    assert "and from finetune.read_from (m.ckpt) at once" in line


def test_the_options_given_are_left_as_they_are() -> None:
    raw = {"training_set": "a.xyz", "architecture": {"training": {"LORA_RANK": 4}}}
    loaded = parse_options(raw, "m.ckpt")
    assert raw["architecture"] == {"training": {"LORA_RANK": 4}}
    assert loaded.raw == raw
    assert loaded.raw is not raw


def test_sections_with_nothing_under_their_name_are_the_defaults() -> None:
    empty = {"method": "full", "read_from": "base.ckpt", "config": None, "inherit_heads": None}
    loaded = load({"finetune": empty})
    assert loaded.options.finetune.config == FinetuneConfig()
    assert loaded.options.finetune.inherit_heads == {}
