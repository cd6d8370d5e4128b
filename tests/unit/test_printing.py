"""Tables on the terminal hold the names of files as they are."""

from __future__ import annotations

import sys

from pet_finetune.terminal import facts_table, show


def test_names_in_brackets_are_no_markup(capsys):
    text = show(facts_table("[/b] :smile:.xyz", {"[red]": "[/x]"}))
    for said in (text, capsys.readouterr().out):
        assert "[/b] :smile:.xyz" in said
        assert "[red]" in said
        assert "[/x]" in said


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert "name" in show(facts_table("", {"name": "value"}))
