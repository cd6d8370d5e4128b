"""Options that changed since a run began, and defaults that did."""

from __future__ import annotations

import pytest

from pet_finetune.config.load import parse_options
from pet_finetune.runs import changed_options, with_defaults_of


def options(**training):
    raw = {
        "training_set": {"systems": "a.xyz", "targets": {"energy": {"unit": "eV"}}},
        "architecture": {"training": training},
    }
    return parse_options(raw).options


OLD = {"architecture": {"training": {"optimizer": "adamw", "ema": None, "num_epochs": 7}}}


@pytest.mark.parametrize("before", [OLD, {}])
def test_a_run_goes_on_with_the_defaults_it_began_with(before):
    training = with_defaults_of(options(num_epochs=7), before).training
    assert (training.optimizer, training.ema) == ("adamw", None)
    assert training.track_energy_offset == 0.0
    assert training.num_epochs == 7


def test_what_is_written_out_is_heeded_and_told():
    given = with_defaults_of(options(ema=0.5, num_epochs=7), OLD)
    assert (given.training.optimizer, given.training.ema) == ("adamw", 0.5)
    told = {change.name.rpartition(".")[2] for change in changed_options(given, OLD)}
    assert "ema" in told
    assert not told & {"optimizer", "num_epochs"}


def test_a_run_of_now_keeps_the_defaults_of_now():
    now = options()
    kept = with_defaults_of(now, now.resolved())
    assert (kept.training.optimizer, kept.training.ema) == ("soap", 0.99)
    assert not list(changed_options(kept, now.resolved()))


@pytest.mark.parametrize("given", [{}, {"batch_size": None, "num_epochs": None}])
def test_what_a_run_chose_by_its_data_stays(given):
    before = {"architecture": {"training": {"batch_size": 5, "num_epochs": 300}}}
    kept = with_defaults_of(options(**given), before)
    assert (kept.training.batch_size, kept.training.num_epochs) == (5, 300)
    for now in (kept, options(**given)):
        names = {change.name.rpartition(".")[2] for change in changed_options(now, before)}
        assert not names & {"batch_size", "num_epochs"}
