"""What the name and the form of a target imply, and what they rule out."""

from __future__ import annotations

from typing import Any

import pytest

from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.errors import ConfigError


def options(targets: dict[str, Any], **training: Any) -> Options:
    raw = {
        "training_set": {"systems": "a.xyz", "targets": targets},
        "architecture": {"training": training},
    }
    return parse_options(raw, checkpoint="base.ckpt").options


@pytest.mark.parametrize(
    ("name", "given", "unit", "form"),
    [
        ("non_conservative_forces", {}, "eV/A", "a vector for each atom"),
        ("non_conservative_force/pbe", {"quantity": "forces"}, "eV/A", "a vector for each atom"),
        ("non_conservative_stress", {"unit": "GPa"}, "eV/A^3", "a tensor for each structure"),
        ("energy", {"per_atom": True, "unit": "Ha"}, "eV", "a scalar for each atom"),
        ("mtt::dos", {"num_subtargets": 4, "unit": "1/eV"}, "1/eV", "4 scalars for each structure"),
    ],
)
def test_the_name_completes_a_target(
    name: str, given: dict[str, Any], unit: str, form: str
) -> None:
    loaded = options({name: given})
    spec = loaded.target_specs()[name]
    assert (spec.unit, spec.form) == (unit, form)
    assert spec.per_volume == ("stress" in name)
    assert not spec.is_energy
    target = loaded.training_set[0].targets[name]
    assert not (target.forces.wanted)
    assert not (target.stress.wanted)


def test_intensive_targets_are_those_whose_values_count_whole() -> None:
    specs = options(
        {"energy": {}, "gap": {"quantity": "gap"}, "volume": {"quantity": "volume"}},
        per_structure_targets=["gap", "energy"],
    ).target_specs()
    assert {name for name, spec in specs.items() if spec.intensive} == {"gap"}


FORCES = "non_conservative_forces"


@pytest.mark.parametrize(
    ("targets", "training", "message"),
    [
        ({FORCES: {"type": "scalar"}}, {}, f"targets.{FORCES}.type: a target named"),
        ({FORCES: {"sample_kind": "system"}}, {}, "or set `sample_kind: atom`"),
        ({FORCES: {"quantity": "energy"}}, {}, "or set `quantity: force`"),
        ({FORCES: {"num_subtargets": 2}}, {}, "or set `num_subtargets: 1`"),
        ({FORCES: {"unit": "eV"}}, {}, "Unknown force unit 'eV'"),
        ({FORCES: {"unit": "eVV/A"}}, {}, "Unknown energy unit 'eVV'. Did you mean"),
        ({"non_conservative_stress": {"unit": "Gpaa"}}, {}, "Unknown pressure unit 'Gpaa'"),
        ({"non_conservative_stress": {"unit": "eV/A"}}, {}, "an energy over a cubed length"),
        ({FORCES: {}}, {"atomic_baseline": {FORCES: 0.0}}, "only scalars have a baseline"),
        (
            {"gap": {"quantity": "gap"}},
            {"finetune": {"ensemble": 4}},
            "a committee is of one energy, but the targets are gap",
        ),
    ],
)
def test_what_cannot_be_meant(
    targets: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        options(targets, **training)
    assert message in str(caught.value)


def test_a_target_has_one_unit() -> None:
    sets = [{"systems": "a", "targets": {"d": {"unit": unit}}} for unit in ("D", "e*A")]
    with pytest.raises(ConfigError, match="its unit is 'e\\*A', but 'D' where"):
        parse_options({"training_set": sets, "validation_set": 0.1})
