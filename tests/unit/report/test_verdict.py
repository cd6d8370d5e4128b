"""The verdict says what the numbers say, and says aloud when something became worse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pet_finetune.report.verdict import judge, number
from reports import about, predicted, record


def with_errors(energy, forces, train=None, **changes):
    """A run without predictions, with given errors before and after, in meV."""

    def of(which):
        values = {"energy_mae": energy[which] / 1000, "forces_mae": forces[which] / 1000}
        return {"energy": values}

    after = {"test": of(1)}
    if train is not None:
        after["train"] = {"energy": {"energy_mae": train / 1000, "forces_mae": forces[1] / 1000}}
    return replace(record(), predicted=None, dimers=None, before={"test": of(0)}, after=after,
                   **changes)  # fmt: skip


@pytest.mark.parametrize(
    ("energy", "forces", "tone", "words"),
    [
        ((6.4, 4.8), (286, 111), "better",
         "lowered the energy error from 6.40 to 4.80 meV/atom (25 % smaller) and the force error "
         "from 286 to 111 meV/Å (2.6 times smaller)."),
        ((6.4, 9.6), (286, 111), "mixed", "but raised the energy error from 6.40 to 9.60 meV/atom "
         "(50 % larger)."),
        ((6.4, 19.2), (111, 286), "worse", "made the model worse: it raised the energy error from "
         "6.40 to 19.2 meV/atom (3.0 times larger)"),
        ((6.4, 6.45), (286, 111), "better", "; the energy error did not change clearly."),
        ((6.4, 6.4), (286, 285), "same", "changed little: the energy error and the force error did "
         "not change clearly."),
    ],
)  # fmt: skip
def test_the_sentence(energy, forces, tone, words):
    verdict = judge(with_errors(energy, forces))
    assert verdict.tone == tone
    assert words in verdict.sentence
    assert any("Got worse" in warning for warning in verdict.warnings) is (
        tone in ("worse", "mixed")
    )


def test_a_change_that_chance_explains_is_none():
    found = predicted()
    drawn_again = predicted(seed=2).models["before"]
    verdict = judge(record(replace(found, models={**found.models, "after": drawn_again})))
    assert max(abs(change.ratio - 1.0) for change in verdict.changes) > 0.05
    assert {change.direction for change in verdict.changes} == {"same"}
    assert judge(record()).tone == "better"


def test_what_to_watch_out_for():
    warnings = judge(record()).warnings
    assert any("Lost repulsion at short distances: H-H." in w for w in warnings)
    assert any("Forgetting" in w and "400 meV/Å" in w for w in warnings)
    assert any("Only 12 structures" in w for w in warnings)
    few = judge(with_errors((6.4, 4.8), (286, 111), train=1.0)).warnings
    assert any("Overfitting: the energy error is 1.00 meV/atom on the training set" in w
               for w in few)  # fmt: skip


def test_the_set_is_named_and_what_it_is_worth():
    assert "which training never saw" in judge(record()).measured_on
    run = record()
    only = {"validation": run.after["test"]}
    run = replace(run, predicted=None, before=only, after=only)
    assert "also pick the best epoch" in judge(run).measured_on


def test_a_run_that_is_not_finished_or_not_evaluated():
    run = record(status="interrupted", after={}, predicted=None, dimers=None)
    verdict = judge(run)
    assert (verdict.tone, verdict.warnings) == ("open", [])
    assert "Not finished: stopped after epoch 6 of 6; nothing" in verdict.sentence
    verdict = judge(replace(run, status="finished", before={}))
    assert "final_eval is off" in verdict.sentence


def test_a_run_that_was_stopped_says_what_it_has_so_far():
    run = with_errors((6.4, 4.8), (286, 111), status="interrupted")
    sentence = judge(run).sentence
    assert sentence.startswith("Not finished: stopped after epoch 6 of 6. So far fine-tuning lower")


def test_from_scratch_there_is_no_fine_tuning():
    start = about(parent="scratch", parent_fingerprint=None)
    run = record(start=start, options={}, after=record().after)
    assert judge(run).sentence.startswith("Training lowered")
    assert run.names == ("untrained", "trained")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1,234"), (110.83, "111"), (12.346, "12.3"), (4.954, "4.95"),
     (0.0514, "0.051"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers_have_as_many_digits_as_they_deserve(value, text):
    assert number(value) == text
