"""Published sets: their known faults are found, and nothing else is called one."""

from __future__ import annotations

import pytest

from inspected import codes, look, read

#: Warnings that each set deserves (its README says why); none has an error.
SETS = {
    "3bpa_test_300K": set(),
    "LiMnO_val": {"units-unchecked"},  # relaxed, and energies that scatter
    "carbon_reduced_100": set(),
    "ethanol_reduced_100": set(),
    "mattersim_mpf_alkali_TP": set(),
    "mlearn_Ge_train": {"duplicates"},
    "qm9_reduced_100_Eonly": set(),
    "water_dpmd_val": {"net-force"},
    "water_revPBE0D3_train30": {"net-force"},
}
NOTES = {
    "3bpa_test_300K": {"single-composition"},
    "qm9_reduced_100_Eonly": {"energies-only"},
    "water_revPBE0D3_train30": {"single-composition", "compressed-bonds"},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", SETS)
def test_known_faults_and_no_others(shared_dir, name):
    inspection = look(read(shared_dir / "data" / f"{name}.xyz"))
    assert codes(inspection, "error") == set()
    assert codes(inspection, "warning") == SETS[name]
    assert codes(inspection, "note") >= NOTES.get(name, set())
