"""Averages, stages, noise, precision and unfreezing: their values and contradictions."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config import Options, first_epoch, parse_options
from pet_finetune.errors import ConfigError


def load(training: Any, **top: Any) -> Options:
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
         "finetune.unfreeze.stages.100", "the run has 100 epochs"),
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
        load(training)
    (line,) = caught.value.problems
    assert line.startswith(f"architecture.training.{where}: ")
    assert why in line


def test_fewer_and_more_digits_at_once() -> None:
    with pytest.raises(ConfigError, match="base_precision 64 asks for more"):
        load({"precision": "bf16-mixed"}, base_precision=64)


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
    options = load(training)
    again = parse_options(options.resolved()).options
    assert again.resolved() == options.resolved()


def test_short_ways() -> None:
    options = load({**finetune(unfreeze=5), "loss_schedule": {"start": 0.5, "energy": 10}})
    assert options.finetune.unfreeze is not None
    assert options.finetune.unfreeze.every == 5
    (stage,) = options.training.loss_schedule
    assert (stage.start, stage.energy, stage.forces, stage.stress) == (0.5, 10.0, 1.0, 1.0)
    stages = load(finetune(unfreeze={"stages": {4: "all", 0: "heads"}})).finetune.unfreeze
    assert stages is not None
    assert stages.stages == {0: ("heads",), 4: ("all",)}


@pytest.mark.parametrize(
    ("start", "epochs", "first"),
    [(0.0, 10, 0), (0.75, 100, 75), (0.75, 10, 8), (0.28, 25, 7), (0.99, 10, 10), (0.1, 3, 1)],
)
def test_a_part_of_the_run_begins_with_a_whole_epoch(start: float, epochs: int, first: int) -> None:
    assert first_epoch(start, epochs) == first
