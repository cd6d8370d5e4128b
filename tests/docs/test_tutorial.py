"""The tutorial's commands run, from the first to the last, and give what it says they give."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tutorial(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that runs the page."""
    path = repository / "scripts" / "docs" / "tutorial.py"
    spec = importlib.util.spec_from_file_location("tutorial", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tutorial", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_commands_of_the_tutorial_run(
    tutorial: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tutorial.PAGE.read_text()
    # The same commands, for fewer steps.
    short = page.replace("--steps 2000", "--steps 60").replace("--steps 500", "--steps 20")
    few = "-r architecture.training.num_epochs=2 "
    short = short.replace("-r architecture.training.log_interval=50 ", few)
    short = short.replace("-r architecture.training.num_epochs=60 ", few)
    assert short.count(few) == 2
    folder = tutorial.work_folder(tmp_path)
    monkeypatch.setattr(tutorial, "excerpt", lambda output, shown: [])
    tutorial.run_page(short, folder)
    for figure in tutorial.FIGURE.finditer(page):
        assert (folder / figure["made"]).stat().st_size > 1000
        assert (tutorial.FIGURES / figure["name"]).is_file()
    assert json.loads((folder / "run" / "results.json").read_text())["after"]


def test_an_excerpt_is_what_was_asked_for(tutorial: ModuleType) -> None:
    text = "2026-01-01 10:00:00 INFO    one\ntwo\nthree\n"
    assert tutorial.excerpt(text, "first 1") == ["one"]
    assert tutorial.excerpt(text, "last 2") == ["two", "three"]
    assert tutorial.excerpt(text, "from two") == ["two", "three"]
    assert tutorial.excerpt(text, "none") == []
    with pytest.raises(SystemExit, match="is not one of"):
        tutorial.excerpt(text, "all")
