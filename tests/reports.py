"""Records of runs that never ran, for tests of the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pet_finetune.committee.calibration import Curves
from pet_finetune.data.predicted import Predicted
from pet_finetune.forgetting.dimers import DimerRow
from pet_finetune.report.run_record import CommitteeRecord, Dimers, RunRecord
from tiny_data import crystals, molecules, structures_of

#: Size of the errors that the models of :func:`predicted` make, eV and Å.
ERRORS = {"before": 0.3, "after": 0.1}


def predicted(frames: list[Any] | None = None, seed: int = 0, spread: bool = False) -> Predicted:
    """A test set with predictions of two models, whose errors are normal with :data:`ERRORS`."""
    made = Predicted.of(structures_of(molecules(12) if frames is None else frames), "test")
    rng = np.random.default_rng(seed)
    models = {}
    for model, size in ERRORS.items():
        models[model] = {
            name: label + size * rng.normal(size=label.shape) for name, label in made.labels.items()
        }
        if spread and model == "after":
            models[model] |= {
                f"{name}~spread": np.abs(size * rng.normal(size=label.shape))
                for name, label in made.labels.items()
            }
    return replace(made, models=models, baselines={"energy": made.labels["energy"].round(0)})


def stressed() -> Predicted:
    """As :func:`predicted`, periodic, with stress."""
    return predicted(crystals(12))


def errors_of(found: Predicted, model: str) -> dict[str, dict[str, float]]:
    """Errors of a model over the set, as ``results.json`` has them."""
    values: dict[str, float] = {}
    for name, label in found.labels.items():
        errors = found.models[model][name] - label
        if name == "energy":
            errors = errors / found.sizes
        kind = name.rpartition("/")[2]
        values |= {
            f"{kind}_mae": float(np.abs(errors).mean()),
            f"{kind}_rmse": float((errors**2).mean() ** 0.5),
        }
    return {"energy": values}


def epochs(count: int = 6) -> list[dict[str, float]]:
    """Rows of a table of epochs whose errors fall."""
    rows = []
    for epoch in range(1, count + 1):
        row = {"epoch": epoch, "learning_rate": 1e-3 / epoch, "loss": 1.0 / epoch, "best": 1.0,
               "metric": 1.0 / epoch, "seconds": 2.0, "structures_per_second": 50.0}  # fmt: skip
        for group in ("train", "validation"):
            row |= {f"{group}/energy/energy_mae": 0.02 / epoch,
                    f"{group}/energy/forces_mae": 0.3 / epoch}  # fmt: skip
        if epoch % 2:
            row["retention/energy/forces_mae"] = 0.01 * epoch
        rows.append(row)
    return rows


def about(**changes: Any) -> dict[str, Any]:
    """What ``run.json`` says."""
    sets = {"train": 30, "validation": 6, "test": 12}
    return {
        "parent": "base",
        "parent_fingerprint": "0123abcd",
        "new_elements": {},
        "data": {
            name: {"structures": count, "fingerprint": f"f{count}", "files": [f"{name}.xyz"]}
            for name, count in sets.items()
        },
        "versions": {"pet-finetune": "1", "torch": "2"},
        "written": "2026-01-02 03:04:05",
        "data_species": ["H", "C", "O"],
        "targets": {"energy": {"is_energy": True, "unit": "eV", "shown": [1000.0, "meV/atom"]}},
        "baseline_mode": "refit",
        "baselines": [
            {"target": "energy", "mode": "refit", "unit": "eV", "scale": 0.2,
             "rows": [["H", 100, -13.0, -14.5], ["C", 20, None, -1030.0]]}
        ],
        "trainable": {"trainable": 1000, "total": 20000, "groups": {"adapters": 1000}},
        "machine": {"device": "CPU", "threads": 2, "python": "3.11", "system": "Linux"},
        **changes,
    }  # fmt: skip


def dimers() -> Dimers:
    """One pair whose wall is kept and one that lost it."""
    distances = [0.5, 1.0, 1.5, 2.0]
    rows = [
        DimerRow("C-O", {"before": [9.0, -5, -2, 0], "after": [8.0, -6, -2, 0]}, 0.9, "kept"),
        DimerRow("H-H", {"before": [5.0, -4, -1, 0], "after": [-9.0, -4, -1, 0]}, 0.65, "lost"),
    ]
    return Dimers(distances, rows)


def committee() -> CommitteeRecord:
    """Two members and a calibration."""
    levels = np.linspace(0.0, 1.0, 11)
    curve = Curves(levels, levels**3, levels**1.1, 0.3, 0.05, 4.0)
    errors = {"test": {"energy": {"energy_mae": 0.02, "forces_mae": 0.12}}}
    reports = ["member_0/report.html", "member_1/report.html"]
    return CommitteeRecord([errors, errors], {"energy": curve, "forces": curve}, reports)


def record(found: Predicted | None = None, **changes: Any) -> RunRecord:
    """A finished run of LoRA with everything that a single model can have."""
    found = predicted() if found is None else found
    errors = {model: {"test": errors_of(found, model)} for model in ERRORS}
    for model, drift in (("before", 0.0), ("after", 0.4)):
        errors[model]["retention"] = {"energy": {"energy_mae": drift, "forces_mae": drift}}
    finetune = {"method": "lora", "read_from": "base.ckpt", "config": {"rank": 4, "alpha": 4.0}}
    return replace(
        RunRecord(
            folder="outputs/run",
            status="finished",
            options={"seed": 3, "architecture": {"training": {"num_epochs": 6,
                                                              "finetune": finetune}}},
            options_text="seed: 3\n",
            start=about(),
            before=errors["before"],
            after=errors["after"],
            memory={"process": 512.0},
            epochs=[epochs()],
            predicted=found,
            dimers=dimers(),
            files={"best_model.ckpt": 2_000_000, "adapter": 90_000},
        ),
        **changes,
    )  # fmt: skip
