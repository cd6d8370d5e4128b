"""The page: all sections in their order, whatever there is, and nothing of the user's unescaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.report import figures
from pet_finetune.report.page import render
from pet_finetune.report.run_record import RunRecord
from reports import about, committee, epochs, predicted, record, stressed
from tiny_data import crystals, label, molecules

SECTIONS = ["verdict", "curves", "parity", "errors", "kept", "baselines", "trained", "provenance",
            "use"]  # fmt: skip
_VOID = {"meta", "link", "br", "img", "input"}


class Outline(HTMLParser):
    """Sections of a page, and whether its elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.open, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "section":
            self.sections.append(found["id"])
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def many_times(found, count):
    """The same structures again and again."""

    def tiled(values):
        return np.tile(values, (count,) + (1,) * (values.ndim - 1))

    def of(group):
        return {name: tiled(values) for name, values in group.items()}

    arrays = {
        name: tiled(getattr(found, name))
        for name in ("sizes", "numbers", "positions", "cells", "pbc", "frames", "source_index")
    }
    return replace(
        found,
        labels=of(found.labels),
        baselines=of(found.baselines),
        models={name: of(values) for name, values in found.models.items()},
        **arrays,
    )


def page(run):
    text = render(run, "1.2.3")
    outline = Outline(text)
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    return text, outline.sections


@pytest.fixture
def plain(monkeypatch):
    """As on a machine without matplotlib, which also takes no time."""
    monkeypatch.setattr(figures, "available", lambda: False)


def test_everything_in_the_order_that_a_reader_needs():
    pytest.importorskip("matplotlib")
    text, sections = page(record(stressed()))
    assert sections == SECTIONS
    assert text.count('class="plot"') == 5 + 6 + 2 + 1 + 2
    assert "http://" not in re.sub(r'xmlns(:xlink)?="http://[^"]*"', "", text)
    assert "https://" not in text
    assert len(text) < 3_000_000


def test_without_matplotlib_there_are_tables_and_a_hint(plain):
    text, sections = page(record())
    assert sections == [name for name in SECTIONS if name != "parity"]
    assert "pip install &#39;pet-finetune[plots]&#39;" in text or "pet-finetune[plots]" in text
    assert 'class="plot"' not in text
    assert "2.6 times" in text or "times smaller" in text


def test_an_ensemble_has_its_committee(plain):
    run = record(predicted(spread=True), committee=committee(), epochs=[epochs(), epochs(4)],
                 files={}, dimers=None)  # fmt: skip
    text, sections = page(run)
    assert "committee" in sections
    assert 'href="member_1/report.html"' in text
    assert "adapters=&#39;outputs/run&#39;" in text
    assert "committee of 2, LoRA from base" in text


def test_a_last_layer_has_its_calibration(plain):
    curves = {"energy": committee().calibration["energy"]}
    text, sections = page(record(predicted(spread=True), last_layer=curves))
    assert "uncertainty" in sections
    assert "committee" not in sections
    assert "<td>0.300</td><td>0.050</td>" in text
    assert 'href="#uncertainty"' in text


def test_a_run_that_was_stopped_at_once(plain):
    run = record(status="interrupted", before={}, after={}, predicted=None, dimers=None,
                 epochs=[[]], files={}, start={})  # fmt: skip
    text, sections = page(run)
    assert sections == ["verdict", "curves", "trained", "provenance", "use"]
    assert "No epoch has been finished yet" in text
    assert "--restart outputs/run" in text


def test_a_run_without_forces(plain):
    found = predicted()
    bare = {name: {"energy": values["energy"]} for name, values in found.models.items()}
    found = replace(found, labels={"energy": found.labels["energy"]}, models=bare)
    text, _ = page(record(found))
    assert "By element" not in text
    assert "By structure" in text
    assert "worst atom" not in text


def test_a_target_that_is_no_energy_comes_last_in_its_own_unit(plain):
    found = predicted()
    label = np.ones((len(found.sizes), 3))
    models = {
        name: {**values, "dipole": label + {"before": 0.5, "after": 0.25}[name]}
        for name, values in found.models.items()
    }
    found = replace(found, labels={"dipole": label, **found.labels}, models=models)
    start = about()
    start["targets"]["dipole"] = {"is_energy": False, "unit": "e*A", "shown": [1.0, "e*A"]}
    run = record(found, start=start)
    for errors, size in ((run.before, 0.5), (run.after, 0.25)):
        errors["test"]["dipole"] = {"value_mae": size, "value_rmse": size}
    assert [q.name for q in run.quantities()] == ["energy", "forces", "dipole"]
    text, _ = page(run)
    assert re.search(r"dipole <span class=.unit.>e\*A</span>", text)
    assert "the dipole error from 0.50 to 0.25 e*A (2.0 times smaller)" in text


def lone_atoms():
    """Three atoms alone, on which no force acts."""
    atoms = Atoms("H", [[0.0, 0.0, 0.0]])
    atoms.calc = SinglePointCalculator(atoms, energy=-13.0, forces=np.zeros((1, 3)))
    return predicted([atoms] * 3)


def models_of(change):
    found = predicted()
    return replace(found, models=change(found))


ODD = {
    "one structure": lambda: predicted(molecules(1)),
    "lone atoms": lone_atoms,
    "forces of some": lambda: predicted(
        [label(a, forces=i > 4) for i, a in enumerate(molecules(9))] + crystals(2)
    ),
    "no error at all": lambda: models_of(lambda f: {"before": f.labels, "after": f.labels}),
    "the starting model alone": lambda: models_of(lambda f: {"before": f.models["before"]}),
    "no baselines": lambda: replace(predicted(), baselines={}),
    "nothing but NaN": lambda: models_of(
        lambda f: {"after": {n: np.full_like(v, np.nan) for n, v in f.labels.items()}}
    ),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_sets_make_a_page_without_a_warning(name):
    pytest.importorskip("matplotlib")
    found = ODD[name]()
    errors = {"test": {"energy": {"energy_mae": 0.1, "forces_mae": 0.1}}}
    run = RunRecord("run", "finished", epochs=[epochs(1)], predicted=found, after=errors)
    text, _ = page(run)
    assert 'id="errors"' in text


def test_what_users_write_is_escaped(plain):
    evil = "</script><script>alert(1)</script>&"
    found = replace(predicted(), sources=(evil,))
    start = about(parent=evil)
    start["data"]["test"]["files"] = [evil]
    run = record(found, folder=f"runs/{evil}", options_text=evil, start=start)
    text, _ = page(run)
    assert "<script>alert" not in text
    assert text.count("<script") == 3  # the structures, the view, the copy buttons
    data = re.search(r'id="frames">(.*?)</script>', text, re.S)[1]
    assert json.loads(data)["frames"][0]["name"].endswith(evil)


@pytest.mark.parametrize(
    ("folder", "title"),
    [("outputs/run/", "run"), ("outputs/2026-01-02/03-04-05", "2026-01-02/03-04-05")],
)
def test_the_title_tells_runs_apart(plain, folder, title):
    text, _ = page(record(folder=folder))
    assert f"<h1>{title}</h1>" in text


def test_a_large_set_makes_a_small_page():
    pytest.importorskip("matplotlib")
    text, _ = page(record(many_times(predicted(), 125)))
    assert len(text) < 1_500_000
    assert "predictions.npz" in text
    assert text.count("<tr>") < 400


def test_what_the_foundation_learned_before_is_told():
    learned = {"teacher": "GFN2-xTB", "frames": {"training": 1700}, "seconds": 780.0,
               "gain": "held-out forces 85.0 -> 41.0 meV/A"}  # fmt: skip
    page = render(record(start=about(pretraining=learned)), "1.2.3")
    assert "1,700 frames of GFN2-xTB: held-out forces 85.0 -&gt; 41.0 meV/A" in page
    assert "13 min" in page
    assert "pre-training" not in render(record(), "1.2.3")
