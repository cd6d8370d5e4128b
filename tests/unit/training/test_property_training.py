"""Baselines, losses and errors of targets that are no energies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models import PROPERTIES, SPECIES, crystal, ethanol, property_potential
from pet_finetune.config.load import parse_options
from pet_finetune.config.target import TargetLoss
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.loader import Loader
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.errors import TrainingError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.prediction import Property
from pet_finetune.training.baselines import prepare_baselines
from pet_finetune.training.metrics import Metrics
from pet_finetune.training.objectives import Objective, batch_loss, best_metric, check_metric

BY_NAME = {spec.name: spec for spec in PROPERTIES}
VALUES = {1: 0.3, 6: -1.0, 8: 2.0, 14: 0.5}


def structures(spec: TargetSpec, value: Any) -> list[Structure]:
    """Molecules and crystals whose label ``value(atoms)`` is."""
    frames = []
    for seed in range(4):
        for atoms in (ethanol(), crystal()):
            if seed:
                del atoms[[-1, -2][: seed % 2 + 1]]
            atoms.rattle(0.02, seed=seed)
            frames.append(atoms)
    return [
        atoms_to_structure(
            atoms,
            index,
            labels={spec.name: torch.as_tensor(np.asarray(value(atoms)), dtype=torch.float64)},
            kinds={spec.name: spec.label_kind},
        )
        for index, atoms in enumerate(frames)
    ]


def options_of(spec: TargetSpec, checkpoint: bool, **training: Any) -> Any:
    target: dict[str, Any] = {"num_subtargets": spec.num_subtargets, "quantity": spec.quantity}
    target["sample_kind"] = "atom" if spec.per_atom else "system"
    target["type"] = {"cartesian": {"rank": spec.rank}} if spec.rank else "scalar"
    raw = {
        "training_set": {"systems": "a.xyz", "targets": {spec.name: target}},
        "architecture": {"training": training},
    }
    return parse_options(raw, checkpoint="base.ckpt" if checkpoint else None).options


def sums(atoms: Any) -> float:
    return sum(VALUES[z] for z in atoms.numbers.tolist())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gap", sums),
        ("dos", lambda atoms: [sums(atoms), -2.0 * sums(atoms)]),
        ("charges", lambda atoms: [VALUES[z] for z in atoms.numbers.tolist()]),
    ],
)
@pytest.mark.parametrize("refit", [False, True], ids=["fit", "refit"])
def test_what_the_composition_explains_becomes_the_baseline(
    name: str, value: Any, refit: bool
) -> None:
    spec, model = BY_NAME[name], property_potential()
    data = structures(spec, value)
    if refit:  # what is left over after the model's own predictions, which take their own part
        with torch.no_grad():
            for module in model.network.head_modules(name).values():
                for parameter in module.parameters():
                    parameter.zero_()
    fresh = () if refit else (name,)
    (table,) = prepare_baselines(
        options_of(spec, refit), model, Loader(data, model.cutoff, batch_size=3), [name], fresh
    )
    expected = torch.tensor([VALUES[z] for z in SPECIES], dtype=torch.float64)
    if name == "dos":
        expected = torch.stack([expected, -2.0 * expected], dim=1)
    torch.testing.assert_close(model.composition.get(name), expected, rtol=0, atol=1e-4)
    assert table.mode == ("refit" if refit else "fit")
    assert len(table.rows) == 4 * spec.num_subtargets
    assert table.unit == spec.unit


def test_atoms_without_a_value_do_not_count() -> None:
    spec, model = BY_NAME["charges"], property_potential()

    def value(atoms: Any) -> np.ndarray:
        values = np.array([VALUES[z] for z in atoms.numbers.tolist()])
        values[atoms.numbers == 8] = math.nan
        values[0] = math.nan
        return values

    loader = Loader(structures(spec, value), model.cutoff, batch_size=3)
    prepare_baselines(options_of(spec, False), model, loader, ["charges"], ["charges"])
    expected = torch.tensor([VALUES[z] if z != 8 else 0.0 for z in SPECIES], dtype=torch.float64)
    torch.testing.assert_close(model.composition.get("charges"), expected)
    assert float(model.scale.get("charges")) == 1.0  # nothing is left over


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("dipole", lambda s: 2.0 / s.num_atoms),
        ("non_conservative_force", lambda s: 2.0),
        ("non_conservative_stress", lambda s: 2.0 * s.volume / s.num_atoms),
    ],
)
def test_vectors_and_tensors_have_a_scale_and_no_baseline(name: str, scale: Any) -> None:
    spec, model = BY_NAME[name], property_potential()
    before = model.composition.get(name).clone()
    shape = (*spec.shape,)
    data = structures(
        spec, lambda atoms: np.full((len(atoms), *shape) if spec.per_atom else shape, -2.0)
    )
    data = [s for s in data if not spec.per_volume or s.volume > 0]
    loader = Loader(data, model.cutoff, batch_size=3)
    (table,) = prepare_baselines(options_of(spec, False), model, loader, [name], [name])
    counted = [scale(s) ** 2 for s in data for _ in range(s.num_atoms if spec.per_atom else 1)]
    assert float(model.scale.get(name)) == pytest.approx(math.sqrt(np.mean(counted)))
    assert torch.equal(model.composition.get(name), before)
    assert table.rows == []


@pytest.mark.parametrize("spec", PROPERTIES, ids=lambda spec: spec.name)
def test_loss_and_errors_count_what_is_known(spec: TargetSpec) -> None:
    """Against plain numpy, structure by structure, with one number unknown."""
    data = _labelled(spec)
    batch = collate([(s, structure_neighbors(s, 3.5)) for s in data], torch.float64)
    truth = batch.labels[spec.name]
    guess = torch.zeros_like(truth)
    found = batch_loss(
        batch,
        {spec.name: Property(spec, guess)},
        {spec.name: Objective(spec.name, TargetLoss(weight=3.0), False, False, scale=2.0)},
    )
    counted, shown = [], []
    for s in data:
        errors = s.labels[spec.name].numpy().reshape(-1)
        divided = not (spec.per_atom or spec.intensive or spec.per_volume)
        factor = s.volume if spec.per_volume else 1.0
        per_atom = s.num_atoms if divided or spec.per_volume else 1
        counted += [errors * factor / per_atom / 2.0]
        shown += [errors / (s.num_atoms if divided else 1)]
    assert float(found) == pytest.approx(3.0 * np.nanmean(np.concatenate(counted) ** 2))
    metrics = Metrics(spec.name)
    metrics.update(batch, Property(spec, guess))
    assert metrics.mae("value") == pytest.approx(np.nanmean(np.abs(np.concatenate(shown))))
    assert metrics.kinds == ["value"]


def _labelled(spec: TargetSpec) -> list[Structure]:
    """Two molecules around two crystals with random labels, one number of which is unknown."""
    rng = np.random.default_rng(0)
    data = []
    for index, atoms in enumerate((ethanol(), crystal(), crystal(), ethanol())):
        rows = (len(atoms),) if spec.per_atom else ()
        label = torch.from_numpy(np.asarray(rng.normal(size=(*rows, *spec.shape))))
        if index == 1 and label.dim():
            label.reshape(-1)[0] = math.nan
        data.append(
            atoms_to_structure(
                atoms, index, labels={spec.name: label}, kinds={spec.name: spec.label_kind}
            )
        )
    return data


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gap", ("gap", 1.0, "")),
        ("charges", ("charges", 1.0, "e")),
        ("dipole", ("dipole", 1.0, "D/atom")),
        ("non_conservative_force", ("non_conservative_force", 1000.0, "meV/A")),
        ("non_conservative_stress", ("non_conservative_stress", 1000.0, "meV/A^3")),
    ],
)
def test_errors_are_shown_in_the_unit_of_the_target(
    name: str, expected: tuple[str, float, str]
) -> None:
    spec = replace(BY_NAME[name], unit="") if name == "gap" else BY_NAME[name]
    assert Metrics(name, spec=spec).shown("value") == expected


def test_the_best_model_is_that_of_all_targets() -> None:
    metrics = {
        "energy": Metrics("energy", {"energy": [2.0, 4.0, 1]}),
        "gap": Metrics("gap", {"value": [3.0, 9.0, 1]}, BY_NAME["gap"]),
    }
    assert best_metric(metrics, "mae_prod", lambda: 0.0) == 6.0
    assert best_metric(metrics, "energy_mae", lambda: 0.0) == 2.0
    wanted = dict.fromkeys(metrics, (False, False))
    check_metric("mae_prod", ["gap"], wanted, ["energy"])
    with pytest.raises(TrainingError, match="'energy_mae' needs labels that no validation"):
        check_metric("energy_mae", ["gap"], wanted, ["energy"])
