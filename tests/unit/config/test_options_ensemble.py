"""Options of an ensemble, and what contradicts them."""

from __future__ import annotations

import pytest

from pet_finetune.config.load import parse_options
from pet_finetune.errors import ConfigError
from tiny_data import options


def parse(method="lora", read_from="base.ckpt", **finetune):
    section = {"method": method, "read_from": read_from, **finetune}
    return parse_options(options({"finetune": section})).options.finetune


def test_defaults_train_one_model():
    found = parse()
    assert (found.ensemble, found.bootstrap, found.member) == (None, True, None)
    assert parse(ensemble=4, member=3).member == 3


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
        parse(**finetune)
