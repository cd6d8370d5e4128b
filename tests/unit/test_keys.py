from __future__ import annotations

import dataclasses

import pytest

from pet_finetune.keys import TargetSpec, forces_key, stress_key


def test_a_target_is_an_energy_per_structure_unless_said_otherwise() -> None:
    spec = TargetSpec("energy")
    assert spec.is_energy
    assert not spec.per_atom
    assert (spec.unit, spec.kind, spec.num_outputs) == ("eV", "scalar", 1)
    assert not TargetSpec("dipole", quantity="dipole").is_energy


def test_the_last_layer_is_named_as_in_metatrain() -> None:
    assert TargetSpec("energy").block_key == "energy___0"
    assert TargetSpec("energy/ft").block_key == "energy/ft___0"
    assert TargetSpec("energy", block="energy_other").block_key == "energy_other"


def test_a_target_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TargetSpec("energy").name = "other"  # type: ignore[misc]


def test_labels_of_the_derivatives() -> None:
    assert forces_key("energy") == "energy/forces"
    assert stress_key("energy") == "energy/stress"
