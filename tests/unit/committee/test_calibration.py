"""From spreads to uncertainties: factors, coverage, areas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from models import random_potential, trained_adapter
from pet_finetune.adapters.inject import merged_copy
from pet_finetune.committee.calibration import LEVELS, Deviations, collect, miscalibration_area
from pet_finetune.committee.committee import Committee
from pet_finetune.data.loader import Loader
from tiny_data import crystals, molecules, structures_of


def gaussian(factor, count=20000):
    """Errors that are ``factor`` times what their spread says."""
    rng = np.random.default_rng(0)
    spreads = rng.uniform(0.5, 2.0, size=count)
    return Deviations(factor * spreads * rng.normal(size=count), spreads)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_factor_restores_a_gaussian(factor):
    found = gaussian(factor)
    assert found.factor == pytest.approx(factor, rel=0.03)
    after = miscalibration_area(found.scaled(found.factor).coverage())
    assert after < 0.01
    assert found.scaled(found.factor).factor == pytest.approx(1.0)


def test_the_area_of_too_small_a_spread():
    """At half the width p becomes erf(erfinv(p) / 2); the area below the diagonal by quadrature."""
    levels = torch.linspace(0, 1, 200001, dtype=torch.float64)[:-1]
    expected = float((levels - torch.erf(torch.erfinv(levels) / 2)).mean())
    assert miscalibration_area(gaussian(2.0).coverage()) == pytest.approx(expected, abs=0.005)


def test_the_ends_of_the_area():
    errors = np.linspace(-1, 1, 11)[::2]
    never = Deviations(errors + 0.01, np.zeros(6)).coverage()
    always = Deviations(errors, np.full(6, 1e9)).coverage()
    for curve in (never, always):
        assert miscalibration_area(curve) == pytest.approx(0.5, abs=0.011)
    assert never[-1] == 1.0
    assert miscalibration_area(LEVELS) == 0.0


def test_the_area_is_exact_where_the_curve_crosses_the_diagonal():
    expected = np.array([0.0, 1.0])
    assert miscalibration_area(np.array([0.5, 0.75]), expected) == pytest.approx(
        0.5 * (0.5**2 + 0.25**2) / 0.75
    )


def test_members_that_agree_leave_the_factor_alone():
    assert Deviations(np.ones(3), np.zeros(3)).factor == 1.0


def test_deviations_are_those_of_the_labels():
    base = random_potential()
    members = [merged_copy(trained_adapter(copy.deepcopy(base), seed=s)) for s in range(3)]
    committee = Committee(members, "energy")
    structures = structures_of([*molecules(2), *crystals(2)])
    loader = Loader(structures, base.cutoff, batch_size=3, dtype=torch.float64)
    found = collect(committee, loader, {"energy": (True, True)})
    sizes = [s.num_atoms for s in structures]
    assert {kind: len(d.errors) for kind, d in found.items()} == {
        "energy": 4,
        "forces": 3 * sum(sizes),
        "stress": 9 * 2,  # of the crystals; molecules have none
    }
    for index, batch in enumerate(
        Loader(structures, base.cutoff, batch_size=1, dtype=torch.float64)
    ):
        one = committee.predict(batch.graph, "energy")
        error = float(one.energy[0] - structures[index].labels["energy"]) / sizes[index]
        assert found["energy"].errors[index] == pytest.approx(error, rel=1e-10)
        spread = float(one.members.energy.std()) / sizes[index]
        assert found["energy"].spreads[index] == pytest.approx(spread, rel=1e-10)
    without = collect(committee, loader, {"energy": (False, False)})
    assert list(without) == ["energy"]
