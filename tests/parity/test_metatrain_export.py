"""Exported models: metatrain's files and ours of the same checkpoint, output by output."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read

from pet_finetune.export.export import export_model

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from metatensor.torch import Labels
from metatomic.torch import ModelOutput
from metatomic_ase import MetatomicCalculator
from metatrain_models import random_model, save, structures
from test_metatrain_targets import TARGETS


@pytest.fixture(autouse=True)
def _plainly() -> Iterator[None]:
    """Without compiling for the shapes of a few structures, and without TorchScript's farewell."""
    with warnings.catch_warnings(), torch.jit.optimized_execution(False):
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("zbl", [False, True])
def test_every_output_is_metatrains(zbl: bool, tmp_path: Path) -> None:
    theirs = random_model(4, ("energy", "energy/pbe"), others=TARGETS, zbl=zbl)
    outcome = export_model(save(theirs, tmp_path / "random.ckpt"), tmp_path / "model.pt")
    ours = MetatomicCalculator(tmp_path / "model.pt", check_consistency=True, device="cpu")
    oracle = MetatomicCalculator(theirs.export(), check_consistency=True, device="cpu")
    frames = list(structures().values())
    # One of every system at least: metatrain's sums are not made for less.
    chosen = [[system, 0] for system in range(len(frames))] + [[0, 1]]
    selected = Labels(["system", "atom"], torch.tensor(chosen))
    known = ours.model().capabilities().outputs
    assert len(outcome.outputs) == 2 + len(TARGETS)
    for name in outcome.outputs:
        of_atoms = TARGETS.get(outcome.outputs[name], {}).get("sample_kind") == "atom"
        # metatrain has no sums over atoms of targets that are theirs.
        for kind in {known[name].sample_kind, *(() if of_atoms else ("system",))}:
            # Direct forces in kcal/mol/A are in eV/A in our file; engines say what they want.
            unit = "eV/A" if name == "non_conservative_force" else ""
            wanted = {name: ModelOutput(unit=unit, sample_kind=kind)}
            for atoms in (None, selected):
                found = ours.run_model(frames, wanted, atoms)[name].block()
                expected = oracle.run_model(frames, wanted, atoms)[name].block()
                assert found.samples.names == expected.samples.names
                assert torch.equal(found.samples.values, expected.samples.values)
                assert [c.names for c in found.components] == [c.names for c in expected.components]
                (property_name,) = expected.properties.names
                assert found.properties.names == [property_name.replace("_forces", "_force")]
                difference = (found.values - expected.values).abs().max()
                # A calorie differs in the ninth digit between the libraries.
                limit = 1e-7 if unit else 1e-9
                assert difference <= limit * (1.0 + expected.values.abs().max()), (name, kind)


def test_the_foundation_predicts_what_metatrain_says(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "foundation"
    if not (folder / "pet-xtb-v0.ckpt").is_file():
        pytest.skip("needs ../shared/foundation")
    export_model(folder / "pet-xtb-v0.ckpt", tmp_path / "model.pt")
    calculator = MetatomicCalculator(tmp_path / "model.pt", device="cpu")
    expected = json.loads((folder / "predictions.json").read_text())["pet-xtb-v0.ckpt"]
    for atoms, said in zip(read(folder / "structures.xyz", ":"), expected, strict=True):
        atoms.calc = calculator
        per_atom = (atoms.get_potential_energy() - said["energy"]) / len(atoms)
        assert abs(per_atom) < 1e-5
        np.testing.assert_allclose(atoms.get_forces(), said["forces"], rtol=5e-5, atol=1e-4)
