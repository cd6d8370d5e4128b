"""Options of fine-tuning: new elements, ensembles, what keeps the foundation's knowledge."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.errors import ConfigError
from tiny_data import data_section, options

FINETUNE = "architecture.training.finetune"


def parse(finetune: dict[str, Any], checkpoint: str | None = "base.ckpt", **top: Any) -> Any:
    content = {
        "architecture": {"training": {"finetune": {"method": "full", **finetune}}},
        "training_set": "train.xyz",
        **top,
    }
    return parse_options(content, checkpoint)


def kept(finetune: dict[str, Any]) -> Options:
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
    retention = kept(given).finetune.retention
    assert retention.wanted is wanted
    assert (retention.read_from and retention.read_from.systems.read_from) == file


@pytest.mark.parametrize(
    ("given", "num_epochs", "interval"), [(None, 100, 5), (None, 7, 1), (4, 100, 4)]
)
def test_the_report_comes_some_twenty_times(given, num_epochs, interval):
    retention = kept({"retention": {"every": given}}).finetune.retention
    assert retention.interval(num_epochs) == interval


def test_an_anchor_may_be_just_its_type():
    assert kept({"anchor": "l2sp"}).finetune.anchor.factor == 0.001
    assert kept({"anchor": "ewc"}).finetune.anchor.factor == 10.0
    assert kept({"anchor": {"type": "ewc", "strength": 5}}).finetune.anchor.factor == 5.0


def test_one_name_is_a_list_of_one():
    assert kept({"replay": {"structures": "probe"}}).finetune.replay.structures == ("probe",)


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
    first = kept(finetune)
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
        kept(finetune)
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


def committee(method="lora", read_from="base.ckpt", **finetune):
    section = {"method": method, "read_from": read_from, **finetune}
    return parse_options(options({"finetune": section})).options.finetune


def test_defaults_train_one_model():
    found = committee()
    assert (found.ensemble, found.bootstrap, found.member) == (None, True, None)
    assert committee(ensemble=4, member=3).member == 3


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        ({"ensemble": 1}, "finetune.ensemble.*at least 2 members, found 1"),
        ({"ensemble": 0}, "finetune.ensemble.*positive integer"),
        ({"ensemble": 4, "method": "full"}, "members are adapters.*the method is full"),
        ({"ensemble": 4, "method": "heads"}, "members are adapters.*the method is heads"),
        ({"ensemble": 4, "member": 4}, "no member 4 of 4: they are counted from 0 to 3"),
        ({"member": 0}, "member 0 of what"),
        ({"bootstrap": "perhaps"}, "finetune.bootstrap.*true or false"),
        ({"ensembel": 4}, "ensemble"),
    ],
)
def test_contradictions(finetune, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        committee(**finetune)
