"""Options of replay, anchor and forgetting report: short forms, contradictions, round trips."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config import Options, parse_options
from pet_finetune.errors import ConfigError
from tiny_data import data_section

FINETUNE = "architecture.training.finetune"


def parse(finetune: dict[str, Any], checkpoint: str | None = "base.ckpt", **top: Any) -> Any:
    content = {
        "architecture": {"training": {"finetune": {"method": "full", **finetune}}},
        "training_set": "train.xyz",
        **top,
    }
    return parse_options(content, checkpoint)


def options(finetune: dict[str, Any]) -> Options:
    return parse(finetune).options


@pytest.mark.parametrize(
    ("given", "wanted", "file"),
    [
        ({}, True, None),
        ({"retention": None}, True, None),
        ({"retention": False}, False, None),  # YAML's off
        ({"retention": "off"}, False, None),
        ({"retention": "kept.xyz"}, True, "kept.xyz"),
        ({"retention": {"every": 3}}, True, None),
        ({"retention": {"read_from": data_section("kept.xyz")}}, True, "kept.xyz"),
    ],
)
def test_ways_to_write_the_report(given, wanted, file):
    retention = options(given).finetune.retention
    assert retention.wanted is wanted
    assert (retention.read_from and retention.read_from.systems.read_from) == file


@pytest.mark.parametrize(
    ("given", "num_epochs", "interval"), [(None, 100, 5), (None, 7, 1), (4, 100, 4)]
)
def test_the_report_comes_some_twenty_times(given, num_epochs, interval):
    retention = options({"retention": {"every": given}}).finetune.retention
    assert retention.interval(num_epochs) == interval


def test_an_anchor_may_be_just_its_type():
    assert options({"anchor": "l2sp"}).finetune.anchor.factor == 30.0
    assert options({"anchor": "ewc"}).finetune.anchor.factor == 100.0
    assert options({"anchor": {"type": "ewc", "strength": 5}}).finetune.anchor.factor == 5.0


def test_one_name_is_a_list_of_one():
    assert options({"replay": {"structures": "probe"}}).finetune.replay.structures == ("probe",)


@pytest.mark.parametrize(
    "finetune",
    [
        {"retention": "off"},
        {"retention": "kept.xyz", "replay": {}, "anchor": "l2sp"},
        {"replay": {"read_from": "old.xyz", "fraction": 0.5}, "anchor": "ewc"},
        {"replay": {"structures": ["probe", "more.xyz"], "weight": 2}},
    ],
)
def test_what_a_run_writes_reads_back_as_the_same(finetune):
    first = options(finetune)
    assert parse_options(first.resolved()).options.finetune == first.finetune


WRONG = {
    "fraction above 1": ({"replay": {"fraction": 1.5}},
                         ("replay.fraction", "between 0 and 1", "1.5")),
    "fraction of nothing": ({"replay": {"fraction": 0}}, ("replay.fraction", "both excluded")),
    "weight": ({"replay": {"weight": -1}}, ("replay.weight", "a positive number")),
    "two sources": ({"replay": {"read_from": "a.xyz", "structures": "probe"}},
                    ("replay.structures", "Keep one of them")),
    "no structures": ({"replay": {"structures": []}}, ("replay.structures", "empty")),
    "distorted probe": ({"replay": {"structures": "probe", "rattle": 0.3}},
                        ("replay.rattle", "only the training structures are distorted")),
    "two targets": (
        {"replay": {"read_from": {"systems": "a.xyz", "targets": {"energy": {}, "u": {}}}}},
        ("replay.read_from.targets", "expected one target", "energy, u")),
    "no energy": (
        {"retention": {"read_from": {"systems": "a.xyz", "targets": {"dipole": {"unit": "D"}}}}},
        ("retention.read_from.targets.dipole", "expected an energy")),
    "unit": (
        {"retention": {"read_from": data_section("a.xyz", unit="eV/atom")}},
        ("retention.read_from.targets.energy.unit", "'eV/atom'")),
    "every": ({"retention": {"every": 0}}, ("retention.every", "a positive integer")),
    "spelling": ({"replay": {"fractoin": 0.2}}, ("fractoin", "Did you mean 'fraction'?")),
    "anchor type": ({"anchor": "l2s"}, ("anchor.type", "l2sp, ewc", "Did you mean 'l2sp'?")),
    "anchor strength": ({"anchor": {"type": "ewc", "strength": 0}}, ("anchor.strength",)),
    "quantised base": ({"method": "qlora", "anchor": "ewc"},
                       ("anchor.type", "with quant_bits", "Use l2sp")),
    "samples of l2sp": ({"anchor": {"type": "l2sp", "samples": 9}},
                        ("anchor.samples", "belongs to type ewc")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant(case):
    finetune, words = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        options(finetune)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("section", [{"replay": {}}, {"anchor": "ewc"}])
def test_without_a_model_there_is_nothing_to_keep(section):
    (name,) = section
    with pytest.raises(ConfigError, match=f"finetune.{name}: keeps what a model knew"):
        parse(section, checkpoint=None)


@pytest.mark.parametrize(
    ("finetune", "told"),
    [
        ({"replay": {"structures": ["training", "probe"]}}, True),
        ({"replay": {"read_from": "a.xyz"}, "retention": "a.xyz"}, True),
        ({"replay": {"structures": ["training", "probe"]}, "retention": "a.xyz"}, False),
        ({"replay": {"structures": "probe"}, "retention": "off"}, False),
        ({"replay": {}}, False),
        ({}, False),
    ],
)
def test_a_report_on_what_is_replayed_is_told(finetune, told):
    notices = parse(finetune).notices
    assert any("forgetting report looks at" in notice for notice in notices) is told
