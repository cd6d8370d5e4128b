"""Where a model errs: numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pet_finetune.report.frame_errors import by_element, by_magnitude, by_structure, ratio_interval
from pet_finetune.report.run_record import Quantity
from reports import predicted, stressed

ENERGY = Quantity("energy", "energy", "energy", 1000.0, "meV/atom")
FORCES = Quantity("energy", "forces", "forces", 1000.0, "meV/Å")
STRESS = Quantity("energy", "stress", "stress", 1000.0, "meV/Å³")


def with_errors(found, name, errors, model="after"):
    """The same with given errors of one model."""
    values = {**found.models[model], name: found.labels[name] + errors}
    return replace(found, models={**found.models, model: values})


def test_the_error_of_a_structure_is_the_mean_over_its_atoms():
    found = predicted()
    errors = np.zeros((len(found.numbers), 3))
    errors[found.starts[2] : found.starts[3]] = [0.0, -0.3, 0.6]
    errors[found.starts[4], 0] = np.nan
    values = by_structure(with_errors(found, "energy/forces", errors), FORCES, "after")
    assert values[2] == pytest.approx(0.3)
    assert values[[0, 1, 3]] == pytest.approx(0.0, abs=1e-6)
    assert values[4] == pytest.approx(0.0, abs=1e-6)  # what is known of it


def test_energies_count_per_atom_and_stresses_by_component():
    found = predicted()
    values = by_structure(with_errors(found, "energy", -found.sizes * 0.5), ENERGY, "after")
    assert values == pytest.approx(0.5)
    found = stressed()
    values = by_structure(with_errors(found, "energy/stress", -0.02), STRESS, "after")
    assert values == pytest.approx(0.02, abs=1e-6)
    assert by_structure(found, Quantity("dipole", "value", "dipole", 1.0, ""), "after") is None


def test_elements_have_their_own_errors():
    found = predicted()
    errors = np.where(found.numbers[:, None] == 8, 0.5, 0.1) * np.ones(3)
    parts = {part.name: part for part in by_element(with_errors(found, "energy/forces", errors),
                                                    FORCES)}  # fmt: skip
    assert list(parts) == ["H", "C", "O"]
    assert parts["O"].errors["after"] == pytest.approx(0.5, abs=1e-6)
    assert parts["H"].errors["after"] == pytest.approx(0.1, abs=1e-6)
    assert sum(part.count for part in parts.values()) == len(found.numbers)


def test_bins_of_the_force_hold_every_atom_once():
    found = predicted()
    sizes = np.linalg.norm(found.labels["energy/forces"], axis=1)
    parts = by_magnitude(with_errors(found, "energy/forces", sizes[:, None] * np.ones(3)), FORCES)
    assert sum(part.count for part in parts) == len(found.numbers)
    assert [part.size for part in parts] == sorted(part.size for part in parts)
    # An error as large as the force must show as one that grows.
    for part in parts:
        assert part.errors["after"] == pytest.approx(part.size, rel=1e-3)


def test_the_interval_holds_the_ratio_and_knows_what_chance_explains():
    found = predicted()
    low, high = ratio_interval(found, FORCES)
    ratio = np.nanmean(
        np.abs(found.models["after"]["energy/forces"] - found.labels["energy/forces"])
    ) / np.nanmean(np.abs(found.models["before"]["energy/forces"] - found.labels["energy/forces"]))
    assert low < ratio < high < 1.0
    # Another draw of errors of the same size: no change.
    errors = 0.3 * np.random.default_rng(5).normal(size=found.labels["energy/forces"].shape)
    low, high = ratio_interval(with_errors(found, "energy/forces", errors), FORCES)
    assert low < 1.0 < high
    only = replace(found, models={"after": found.models["after"]})
    assert ratio_interval(only, FORCES) is None
