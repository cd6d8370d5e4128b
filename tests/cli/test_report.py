"""``report.html``: written at the end of a run, made again, and never in the way of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pet_finetune.data.predicted import Predicted
from pet_finetune.report import report_file as report
from pet_finetune.training.metrics import Metrics
from tiny_data import options, write_options

PAGE = Path("run/report.html")


def test_a_run_ends_with_its_report(here, train):
    answer = train(options(), "-c", "base.ckpt")
    assert answer.err.rstrip().endswith("report: run/report.html")
    text = PAGE.read_text()
    assert 'id="verdict"' in text
    assert "4 test structures, which training never saw" in text
    assert "PETCalculator(&#39;run/best_model.ckpt&#39;)" in text
    assert "peak memory" in text


def test_predictions_are_those_that_the_errors_are_of(here, train):
    train(options(), "-c", "base.ckpt")
    found = Predicted.read(Path("run/predictions.npz"))
    results = json.loads(Path("run/results.json").read_text())
    assert found.set_name == "test"
    for model in ("before", "after"):
        expected = results[model]["test"]["energy"]
        errors = found.models[model]["energy"] - found.labels["energy"]
        assert np.abs(errors / found.sizes).mean() == pytest.approx(expected["energy_mae"])
        errors = found.models[model]["energy/forces"] - found.labels["energy/forces"]
        assert np.abs(errors).mean() == pytest.approx(expected["forces_mae"], rel=1e-5)


def test_the_test_set_is_predicted_once_by_each_model(here, train, monkeypatch):
    asked, original = [], Metrics.update

    def update(self, batch, prediction):
        if set(batch.sources) == {"test.xyz"}:
            asked.append(batch.graph.num_structures)
        return original(self, batch, prediction)

    monkeypatch.setattr(Metrics, "update", update)
    train(options(), "-c", "base.ckpt")
    assert sum(asked) == 2 * 4


def test_without_a_test_set_it_is_the_validation_set(here, train):
    train(options(test_set=0.0), "-c", "base.ckpt")
    assert Predicted.read(Path("run/predictions.npz")).set_name == "validation"
    assert "there is no test set" in PAGE.read_text()


def test_a_report_that_fails_does_not_fail_the_run(here, command, monkeypatch):
    def broken(run, version):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(report, "render", broken)
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 0
    assert "the report was not written (ZeroDivisionError: of all things)" in answer.err
    assert "pet-finetune report run" in answer.err
    assert Path("run/results.json").exists()
    assert not PAGE.exists()


def test_a_matplotlib_that_fails_does_not_fail_the_run(here, command, monkeypatch, reported):
    def broken(*ignored, **settings):
        raise RuntimeError("no fonts")

    monkeypatch.undo()  # the plots are those of a user's run
    monkeypatch.chdir(here)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    answer = command("train", "options.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 0, answer.err
    assert "dimers.svg: not drawn (RuntimeError: no fonts)" in answer.err
    assert Path("run/results.json").exists()
    assert Path("run/dimers.csv").exists()


def test_a_run_that_was_stopped_has_a_report_and_so_has_the_one_that_goes_on(here, command, stop):
    write_options(here / "mine.yaml", options({"num_epochs": 3}))
    stop(4)  # in the second epoch
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    assert answer.code == 130
    assert "Not finished: stopped after epoch 1 of 3. So far fine-tuning" in PAGE.read_text()
    answer = command("train", "mine.yaml", "--restart", "run", "-o", "elsewhere")
    assert answer.code == 0
    found = Predicted.read(Path("elsewhere/predictions.npz"))
    assert set(found.models) == {"before", "after"}
    text = Path("elsewhere/report.html").read_text()
    assert "Not finished" not in text
    assert "starting model" in text


def test_a_run_goes_on_though_what_its_report_needs_is_damaged(here, command, stop):
    write_options(here / "mine.yaml", options({"num_epochs": 2}))
    stop(2)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "run")
    for name in ("predictions.npz", "run.json"):
        Path("run", name).write_bytes(b"{ cut")
    answer = command("train", "mine.yaml", "--restart", "run")
    assert answer.code == 0, answer.err
    assert "holds no predictions" in answer.err
    assert set(Predicted.read(Path("run/predictions.npz")).models) == {"after"}
    assert PAGE.exists()


def test_a_committee_has_one_and_each_member_too(here, train):
    content = options({"num_epochs": 1, "finetune": {"ensemble": 2, "config": {"rank": 2}}})
    train(content, "-c", "base.ckpt")
    text = PAGE.read_text()
    assert 'href="member_1/report.html"' in text
    assert "miscalibration" in text.lower()
    found = Predicted.read(Path("run/predictions.npz"))
    assert set(found.models["after"]) >= {"energy~spread", "energy/forces~spread"}
    assert set(found.models["before"]) == {"energy", "energy/forces"}
    assert Path("run/member_0/report.html").exists()


def test_made_again_from_what_lies_there(here, train, command):
    train(options(), "-c", "base.ckpt")
    text = PAGE.read_text()
    PAGE.unlink()
    answer = command("report", "run")
    assert (answer.code, answer.out.strip()) == (0, "run/report.html")
    assert PAGE.read_text() == text
    # Wherever the folder went, and whatever was lost on the way.
    shutil.copytree("run", "moved")
    for name in ("predictions.npz", "run.json", "dimers.csv", "last.ckpt", "options.yaml"):
        Path("moved", name).unlink()
    Path("moved/train.csv").write_text("epoch,loss\n1,2.0\n2,")
    answer = command("report", "moved", "-o", "page.html")
    assert answer.code == 0, answer.err
    text = Path("page.html").read_text()
    assert 'id="verdict"' in text
    assert "fingerprint" in text  # of the starting model, which the checkpoint knows


def test_a_damaged_file_leaves_its_part_out(here, train, command):
    train(options(), "-c", "base.ckpt")
    for name in ("predictions.npz", "results.json", "run.json"):
        Path("run", name).write_bytes(b"{ cut")
    answer = command("report", "run")
    assert answer.code == 0, answer.err
    assert answer.err.count("The report does without.") == 3
    assert "predictions.npz" in answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "There is no folder 'nowhere'"),
        (["."], "holds no run: there is no train.csv, results.json or last.ckpt"),
        (["moved"], "'moved' holds a simulation"),
        (["a", "b", "-o", "page.html"], "-o page.html is one file, but 2 runs are named"),
    ],
)
def test_what_cannot_be_reported_is_said(here, command, arguments, words):
    (here / "moved").mkdir()
    (here / "moved" / "md.json").write_text("{}")
    answer = command("report", *arguments)
    assert answer.code == 1
    assert words in answer.err
