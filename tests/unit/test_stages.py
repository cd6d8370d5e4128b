"""Stages are silent until someone listens, and then tell of what runs within them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from pet_finetune.stages import each, listening, stage


def listener(heard):
    @contextmanager
    def listen(name):
        heard.append(f"{name} begins")
        try:
            yield
        finally:
            heard.append(f"{name} ends")

    return listen


def test_stages_are_heard_only_while_someone_listens():
    heard = []
    with stage("before"):
        pass
    with listening(listener(heard)), stage("outer"), stage("inner"):
        heard.append("work")
    with stage("after"), stage("within"):
        pass
    assert heard == ["outer begins", "inner begins", "work", "inner ends", "outer ends"]


def test_an_error_ends_the_stage_and_the_listening():
    heard = []
    with pytest.raises(ValueError, match="broken"), listening(listener(heard)), stage("outer"):
        raise ValueError("broken")
    with stage("after"):
        pass
    assert heard == ["outer begins", "outer ends"]


def test_making_an_item_is_a_stage_and_using_it_is_not():
    heard = []
    with listening(listener(heard)):
        for item in each("make", iter("ab")):
            heard.append(item)
    making = ["make begins", "make ends"]
    assert heard == [*making, "a", *making, "b", *making]
    assert list(each("make", range(3))) == [0, 1, 2]
