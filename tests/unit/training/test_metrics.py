"""Errors by hand, whatever the batches, and the number that picks the best model."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.table import Table

from models import random_potential
from pet_finetune.data.loader import Loader
from pet_finetune.errors import TrainingError
from pet_finetune.model.prediction import Prediction
from pet_finetune.terminal import print_rich, table_text
from pet_finetune.training.loggers import error_table
from pet_finetune.training.metrics import Metrics, evaluate
from pet_finetune.training.objectives import best_metric, check_metric
from tiny_data import crystals, molecules, structures_of

FORCES, STRESS = "energy/forces", "energy/stress"


@pytest.fixture(scope="module")
def model():
    return random_potential()


@pytest.fixture(scope="module")
def structures():
    return structures_of([*molecules(3), *crystals(2)])


def errors_of(model, structures):
    """Errors of energy per atom, forces and stress, structure by structure."""
    energies, forces, stresses = [], [], []
    for structure in structures:
        (batch,) = Loader([structure], model.cutoff, batch_size=1, dtype=model.dtype)
        found = model.predict(batch.graph, stress=True)
        if "energy" in structure.labels:
            difference = found.energy[0] - structure.labels["energy"]
            energies.append(float(difference) / structure.num_atoms)
        if FORCES in structure.labels:
            forces += (found.forces - structure.labels[FORCES]).flatten().tolist()
        if STRESS in structure.labels:
            stresses += (found.stress[0] - structure.labels[STRESS]).flatten().tolist()
    return {"energy": energies, "forces": forces, "stress": stresses}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_errors_do_not_depend_on_the_batches(model, structures, batch_size):
    loader = Loader(structures, model.cutoff, batch_size=batch_size, dtype=model.dtype)
    found = evaluate(model, loader, {"energy": (True, True)})["energy"]
    assert found.kinds == ["energy", "forces", "stress"]
    for kind, errors in errors_of(model, structures).items():
        assert found.mae(kind) == pytest.approx(np.mean(np.abs(errors)), rel=1e-9)
        assert found.rmse(kind) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-9)


def test_missing_labels_do_not_count(model, structures):
    first = replace(structures[0], labels={"energy": structures[0].labels["energy"]})
    some = [first, *structures[1:]]
    loader = Loader(some, model.cutoff, batch_size=5, dtype=model.dtype)
    found = evaluate(model, loader, {"energy": (True, True)})["energy"]
    errors = errors_of(model, some)
    assert found.mae("forces") == pytest.approx(np.mean(np.abs(errors["forces"])), rel=1e-9)
    none = replace(structures[0], labels={})
    loader = Loader([none], model.cutoff, batch_size=5, dtype=model.dtype)
    empty = evaluate(model, loader, {"energy": (True, True)})["energy"]
    assert empty.kinds == []
    assert math.isnan(empty.mae("energy"))
    assert empty.as_dict() == {}


def test_a_prediction_that_is_nan_counts(structures):
    (batch,) = Loader(structures, 3.0, batch_size=5, dtype=torch.float64)
    energy = batch.labels["energy"].clone()
    energy[1] = math.nan
    metrics = Metrics("energy")
    metrics.update(batch, Prediction(energy, torch.zeros(batch.graph.num_atoms)))
    assert math.isnan(metrics.mae("energy"))
    said = table_text(error_table({"": {"other": {}, "model": {"energy": metrics}}}))
    assert re.search(r"MAE .* - .* nan ", said)  # a dash is what was not evaluated


def test_sums_go_on_from_a_saved_state(model, structures):
    first, second = Loader(structures, model.cutoff, batch_size=3, dtype=model.dtype)
    whole, part = Metrics("energy"), Metrics("energy")
    for batch in (first, second):
        whole.update(batch, model.predict(batch.graph, stress=True))
    part.update(first, model.predict(first.graph, stress=True))
    resumed = Metrics("energy", part.state())
    resumed.update(second, model.predict(second.graph, stress=True))
    assert resumed.as_dict() == whole.as_dict()
    assert set(whole.as_dict()) == {
        "energy_mae", "energy_rmse", "forces_mae", "forces_rmse", "stress_mae", "stress_rmse",
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_model_in_its_mode(model, structures, training):
    model.train(training)
    evaluate(model, Loader(structures, model.cutoff, batch_size=5, dtype=model.dtype), {})
    assert model.training is training
    model.eval()


def sums(mae, rmse, count=4):
    return [mae * count, rmse**2 * count, count]


METRICS = {
    "a": Metrics("a", {"energy": sums(2.0, 3.0), "forces": sums(5.0, 7.0)}),
    "b": Metrics("b", {"energy": sums(10.0, 11.0), "forces": [0.0, 0.0, 0]}),
}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("mae_prod", 2.0 * 5.0 * 10.0),
        ("rmse_prod", 3.0 * 7.0 * 11.0),
        ("energy_mae", 2.0 * 10.0),
        ("forces_mae", 5.0),
        ("loss", 42.0),
    ],
)
def test_the_metric_that_picks_the_best_model(kind, value):
    assert best_metric(METRICS, kind, lambda: 42.0) == pytest.approx(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_the_worst(value):
    assert best_metric({}, "loss", lambda: value) == math.inf
    broken = {"a": Metrics("a", {"energy": [value, value, 4]})}
    assert best_metric(broken, "mae_prod", lambda: 0.0) == math.inf


def test_metrics_without_labels_are_refused_before_training():
    wanted = {"energy": (True, False)}
    for kind in ("mae_prod", "rmse_prod", "loss", "energy_mae", "forces_mae"):
        check_metric(kind, ("energy", FORCES), wanted)
    with pytest.raises(TrainingError, match="'forces_mae' needs labels that no validation"):
        check_metric("forces_mae", ("energy",), wanted)
    with pytest.raises(TrainingError, match="'energy_mae' needs labels that no validation"):
        check_metric("energy_mae", (FORCES,), wanted)
    with pytest.raises(TrainingError, match="'mae_prod' needs labels that no validation"):
        check_metric("mae_prod", ("other",), wanted)
    with pytest.raises(TrainingError, match="needs forces, but none are trained"):
        check_metric("forces_mae", ("energy", FORCES), {"energy": (False, False)})


def test_a_narrow_terminal_cuts_off_no_name(monkeypatch, capsys):
    table = Table("error of forgetting", "unit")
    table.add_row("forgetting: energy RMSE", "meV/atom")
    monkeypatch.setattr("pet_finetune.terminal._WIDTH", 18)
    print_rich(table)
    assert "\N{HORIZONTAL ELLIPSIS}" not in capsys.readouterr().out
