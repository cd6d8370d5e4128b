"""What metatomic calls the targets of a model."""

from __future__ import annotations

import pytest

from models import PROPERTIES, random_potential
from pet_finetune.export.targets import choose_outputs
from pet_finetune.keys import TargetSpec, output_name

FORCE = TargetSpec(
    "non_conservative_forces/pbe", "force", "eV/A", "vector", per_atom=True, num_outputs=3
)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (TargetSpec("energy"), "energy"),
        (TargetSpec("energy/pbe"), "energy/pbe"),
        (TargetSpec("mtt::U0"), "mtt::U0"),
        (TargetSpec("U0"), "mtt::U0"),
        (TargetSpec("energy", per_atom=True), "mtt::energy"),
        (FORCE, "non_conservative_force/pbe"),
        *((spec, spec.name) for spec in PROPERTIES[-2:]),
        (PROPERTIES[0], "mtt::gap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names(spec: TargetSpec, name: str) -> None:
    assert output_name(spec) == name


def test_the_energy_chosen_gets_the_name_that_engines_ask_for() -> None:
    model = random_potential(targets=("energy/pbe", "energy/scan"))
    model.add_target(FORCE)
    both = {
        "energy/pbe": "energy/pbe",
        "energy/scan": "energy/scan",
        "non_conservative_force/pbe": FORCE.name,
    }
    assert choose_outputs(model, None) == both
    assert choose_outputs(model, "energy/scan") == {**both, "energy": "energy/scan"}
    direct = {"energy": "energy/pbe", "non_conservative_force": FORCE.name}
    assert choose_outputs(model, "energy/pbe") == {**both, **direct}
    assert choose_outputs(model, "energy/pbe", {"energy/pbe"}) == {
        "energy/pbe": "energy/pbe",
        "energy": "energy/pbe",
    }


def test_an_energy_of_that_name_keeps_it() -> None:
    model = random_potential(targets=("energy", "energy/pbe"))
    assert choose_outputs(model, "energy") == {"energy": "energy", "energy/pbe": "energy/pbe"}
