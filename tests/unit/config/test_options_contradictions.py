"""Options that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune import installation
from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.config.training import first_epoch
from pet_finetune.errors import ConfigError


def problems(model: Any = None, training: Any = None, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(model, training, **kwargs)
    return caught.value.problems


def load(model: Any = None, training: Any = None, **kwargs: Any) -> Options:
    raw = {"training_set": "a.xyz", "architecture": {"model": model, "training": training}}
    return parse_options(raw, **kwargs).options


def test_heads_must_share_the_width() -> None:
    (line,) = problems({"d_pet": 130})
    assert line == (
        "architecture.model.num_heads: 8 heads cannot share d_pet = 130 equally. Allowed: "
        "divisors of 130, for instance 5."
    )


@pytest.mark.parametrize("width", [64, 128, 200])
def test_heads_that_do_share_the_width(width: int) -> None:
    assert load({"d_pet": width}).model.d_pet == width


def test_long_range_features_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pet_finetune.installation.find_spec", lambda library: None)
    (line,) = problems({"long_range": {"enable": True}})
    assert line == (
        "architecture.model.long_range.enable: needs the library torchpme, which is not installed. "
        "Install it with: pip install 'pet-finetune[long-range]'."
    )
    assert load({"long_range": {"enable": False, "smearing": 2.0}}).model.long_range.smearing == 2.0


def test_the_step_fits_inside_the_cutoff() -> None:
    (line,) = problems({"cutoff": 0.4})
    assert line.startswith("architecture.model.cutoff_width: 0.5 Å is wider than the cutoff")


def test_the_adaptive_method_without_a_number_is_fine() -> None:
    assert load({"adaptive_cutoff_method": "grid"}).model.num_neighbors_adaptive is None


def test_no_batch_would_be_left() -> None:
    (line,) = problems(training={"max_atoms_per_batch": 100, "min_atoms_per_batch": 200})
    assert line.startswith("architecture.training.min_atoms_per_batch: 200 is more than")


@pytest.mark.parametrize(
    ("method", "key", "owner"),
    [
        ("lora", "head_modules", "heads"),
        ("lora", "num_prompts", "prompt"),
        ("heads", "rank", "lora"),
        ("heads", "alpha", "lora"),
        ("heads", "quant_bits", "lora"),
        ("heads", "modules_to_save", "lora and prompt"),
        ("full", "quant_bits", "lora"),
        ("full", "num_prompts", "prompt"),
        ("prompt", "quant_bits", "lora"),
        ("prompt", "rank", "lora"),
        ("prompt", "use_dora", "lora"),
    ],
)
def test_settings_of_another_method(method: str, key: str, owner: str) -> None:
    value: Any = {"head_modules": ["a"], "modules_to_save": ["a"], "use_dora": True}.get(key, 4)
    finetune = {"read_from": "m.ckpt", "method": method, "config": {key: value}}
    (line,) = problems(training={"finetune": finetune})
    assert line.startswith(
        f"architecture.training.finetune.config.{key}: belongs to method {owner}, but the "
        f"method is {method}."
    )


def test_quantised_weights_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = {"method": "qlora", "read_from": "m.ckpt"}
    monkeypatch.setattr(installation, "find_spec", lambda name: object())
    assert load(training={"finetune": finetune}).finetune.config.quant_bits == 4
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    (line,) = problems(training={"finetune": finetune})
    assert line == (
        "architecture.training.finetune.config.quant_bits: needs the library bitsandbytes, which "
        "is not installed. Install it with: pip install 'pet-finetune[quant]'."
    )
    assert load(training={"finetune": {**finetune, "method": "lora"}}).finetune.method == "lora"


@pytest.mark.parametrize("mode", ["keep", "refit"])
def test_baselines_of_a_starting_model_need_one(mode: str) -> None:
    baseline = {"baseline": {"mode": mode}}
    (line,) = problems(training=baseline)
    assert f"{mode} needs a model to start from" in line
    assert load(training=baseline, checkpoint="m.ckpt").baseline_mode() == mode


def test_given_baselines_and_their_mode() -> None:
    (line,) = problems(training={"baseline": {"mode": "values"}})
    assert "values needs the numbers: give atomic_baseline." in line
    both = {"baseline": {"mode": "keep"}, "atomic_baseline": {"energy": 1.0}}
    (line,) = problems(training=both, checkpoint="m.ckpt")
    assert "keep contradicts atomic_baseline" in line


@pytest.mark.parametrize(
    "training",
    [
        {"loss": {"enrgy": "mae"}},
        {"atomic_baseline": {"enrgy": 1.0}},
        {"fixed_scaling_weights": {"enrgy": 1.0}},
        {"finetune": {"inherit_heads": {"enrgy": "energy"}}},
        {"per_structure_targets": ["enrgy"]},
    ],
)
def test_options_may_only_name_targets_of_the_data(training: Any) -> None:
    (line,) = problems(training=training)
    assert "enrgy" in line
    assert "Did you mean 'energy'?" in line
    assert "Targets: energy." in line


@pytest.mark.parametrize(
    "loss",
    [
        {"forces": "mae", "gradients": {"positions": "mse"}},
        {"stress": "mae", "virial": "mse"},
        {"virial": "mae", "gradients": {"strain": "mse"}},
    ],
)
def test_one_loss_given_twice(loss: Any) -> None:
    (line,) = problems(training={"loss": {"energy": loss}})
    assert "set the same loss. Keep one of them." in line


def test_weights_that_are_all_zero() -> None:
    zero = {"weight": 0, "forces": {"weight": 0}, "stress": {"weight": 0}}
    (line,) = problems(training={"loss": {"energy": zero}})
    assert "all weights are zero" in line
    assert (
        load(training={"loss": {"energy": {"weight": 0}}}).training.loss_for("energy").weight == 0
    )


def test_gradient_losses_of_something_without_gradients() -> None:
    raw = {
        "training_set": {"systems": "a", "targets": {"dipole": {"quantity": "dipole"}}},
        "architecture": {"training": {"loss": {"dipole": {"forces": "mae"}}}},
    }
    with pytest.raises(ConfigError, match="only an energy has forces and stress"):
        parse_options(raw)


@pytest.mark.parametrize("metric", ["forces_mae", "energy_mae"])
def test_a_metric_the_data_do_not_have(metric: str) -> None:
    raw = {
        "training_set": {"systems": "a", "targets": {"dipole": {"quantity": "dipole"}}},
        "architecture": {"training": {"best_model_metric": metric}},
    }
    with pytest.raises(ConfigError, match=f"{metric} needs"):
        parse_options(raw)
    assert load(training={"best_model_metric": metric}).training.best_model_metric == metric


def loaded(training: Any, **top: Any) -> Options:
    return parse_options(
        {"training_set": "a.xyz", "architecture": {"training": training}, **top}
    ).options


def finetune(**options: Any) -> dict[str, Any]:
    return {"finetune": {"read_from": "m.ckpt", "method": "full", **options}}


@pytest.mark.parametrize(
    ("training", "where", "why"),
    [
        ({"swa": {}, "ema": 0.9}, "swa", "only one average"),
        ({"swa": {"start": 1.5}}, "swa.start", "a number between 0 and 1"),
        ({"swa": {"start": 0.9}, "num_epochs": 5}, "swa.start", "Allowed: up to 0.8."),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", "a positive integer"),
        ({"precision": "bf16"}, "precision", "expected one of bf16-mixed or null"),
        ({"loss_schedule": [{"start": 0.5}, {"start": 0.5}]}, "loss_schedule[1].start",
         "0.5 is not after the start of the stage before it, 0.5"),
        ({"loss_schedule": [{"energy": 2.0}]}, "loss_schedule[0].start", "missing. Part of"),
        ({"loss_schedule": {"start": 0.99}, "num_epochs": 10}, "loss_schedule[0].start",
         "it would never begin"),
        ({"loss_schedule": {"start": 0, "energy": 0, "forces": 0, "stress": 0}},
         "loss_schedule[0]", "all factors are zero"),
        ({"label_noise": {"energy": -1}}, "label_noise.energy", "a non-negative number"),
        ({"rotational_consistency": 0}, "rotational_consistency.weight", "a positive number"),
        ({"rotational_consistency": {"fraction": 1.1}}, "rotational_consistency.fraction",
         "a number above 0, at most 1"),
        (finetune(method="lora", unfreeze=5), "finetune.unfreeze", "method lora decides"),
        (finetune(method="heads", unfreeze=5), "finetune.unfreeze", "method heads decides"),
        ({"finetune": {"unfreeze": 5}}, "finetune.unfreeze", "training is from scratch"),
        (finetune(unfreeze={}), "finetune.unfreeze", "give either every or stages"),
        (finetune(unfreeze={"every": 2, "stages": {0: "heads"}}), "finetune.unfreeze",
         "give either every or stages"),
        (finetune(unfreeze=100), "finetune.unfreeze.every", "only the heads would train"),
        (finetune(unfreeze={"stages": {3: "all"}}), "finetune.unfreeze.stages",
         "nothing would train at first"),
        (finetune(unfreeze={"stages": {0: "heads", 100: "all"}}),
         "finetune.unfreeze.stages.100", "the run has 50 epochs, the fewest where num_epochs"),
        (finetune(unfreeze={"stages": {0: []}}), "finetune.unfreeze.stages", "names nothing"),
        (finetune(unfreeze={"stages": {"a": "all"}}), "finetune.unfreeze.stages",
         "'a' is not a number of epochs"),
        (finetune(config={"layer_decay": 1.5}), "finetune.config.layer_decay", "at most 1"),
        (finetune(method="lora", config={"layer_decay": 0.5}), "finetune.config.layer_decay",
         "belongs to method full"),
        (finetune(method="lora", config={"loraplus_lr_ratio": 0}),
         "finetune.config.loraplus_lr_ratio", "a positive number"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(training: Any, where: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(training)
    (line,) = caught.value.problems
    assert line.startswith(f"architecture.training.{where}: ")
    assert why in line


def test_fewer_and_more_digits_at_once() -> None:
    with pytest.raises(ConfigError, match="base_precision 64 asks for more"):
        loaded({"precision": "bf16-mixed"}, base_precision=64)


@pytest.mark.parametrize(
    "training",
    [
        {"swa": {"start": 0.8}, "num_epochs": 5},
        {"loss_schedule": {"start": 0.5, "energy": 10}},
        {"loss_schedule": None, "gradient_accumulation_steps": 4.0, "precision": "bf16-mixed"},
        finetune(unfreeze={"stages": {0: "heads", 3: ["gnn_layers.1", "embeddings"]}}),
        finetune(config={"layer_decay": 1.0}),
        finetune(method="lora", config={"loraplus_lr_ratio": 16}),
    ],
)
def test_what_is_written_down_gives_the_same_run(training: Any) -> None:
    options = loaded(training)
    again = parse_options(options.resolved()).options
    assert again.resolved() == options.resolved()


def test_short_ways() -> None:
    options = loaded({**finetune(unfreeze=5), "loss_schedule": {"start": 0.5, "energy": 10}})
    assert options.finetune.unfreeze is not None
    assert options.finetune.unfreeze.every == 5
    (stage,) = options.training.loss_schedule
    assert (stage.start, stage.energy, stage.forces, stage.stress) == (0.5, 10.0, 1.0, 1.0)
    stages = loaded(finetune(unfreeze={"stages": {4: "all", 0: "heads"}})).finetune.unfreeze
    assert stages is not None
    assert stages.stages == {0: ("heads",), 4: ("all",)}


@pytest.mark.parametrize(
    ("start", "epochs", "first"),
    [(0.0, 10, 0), (0.75, 100, 75), (0.75, 10, 8), (0.28, 25, 7), (0.99, 10, 10), (0.1, 3, 1)],
)
def test_a_part_of_the_run_begins_with_a_whole_epoch(start: float, epochs: int, first: int) -> None:
    assert first_epoch(start, epochs) == first
