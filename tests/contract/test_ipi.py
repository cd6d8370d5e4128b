"""Exported models in i-PI, for real: dynamics, path integrals, and what a committee says."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms

from models import ethanol, random_potential, trained_adapter
from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.export.export import export_model

pytest.importorskip("ipi", reason="i-PI comes with the test extra")
pytestmark = pytest.mark.slow

_INPUT = """
<simulation verbosity='low'>
  <output prefix='out'>
    <properties filename='txt' stride='1'>
      [ step, conserved{{electronvolt}}, kinetic_md{{electronvolt}}, potential{{electronvolt}} ]
    </properties>
    {outputs}
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>31415</seed></prng>
  <ffdirect name='model' pbc='false'>
    <pes>metatomic</pes>
    <parameters> {{template: start.xyz, model: model.pt, energy_ensemble: {ensemble}}} </parameters>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='model'/> </forces>
    <motion mode='dynamics'>
      <dynamics mode='{mode}'>
        <timestep units='femtosecond'> {step} </timestep> {thermostat}
      </dynamics>
    </motion>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
  </system>
</simulation>
"""
_PILE = "<thermostat mode='pile_g'> <tau units='femtosecond'> 50 </tau> </thermostat>"


_EACH = "<trajectory filename='each' extra_type='committee_pot'> extras </trajectory>"


def boxed() -> Atoms:
    atoms = ethanol()
    atoms.set_cell([20.0, 20.0, 20.0])
    atoms.center()
    return atoms


def simulate(
    folder: Path, mode: str, *, steps: int, step: float, beads: int = 1, ensemble: bool = False
) -> np.ndarray:
    """Run i-PI on ``model.pt``; for each step its number, conserved, kinetic, potential energy."""
    ase.io.write(folder / "start.xyz", boxed())
    settings = {"mode": mode, "steps": steps, "step": step, "beads": beads, "ensemble": ensemble}
    settings |= {"thermostat": _PILE * (mode == "nvt"), "outputs": _EACH * ensemble}
    (folder / "input.xml").write_text(_INPUT.format(**settings))
    command = [sys.executable, str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return np.loadtxt(folder / "out.txt")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A float32 model of large energies, and its exported file."""
    base = random_potential(dtype=torch.float32, num_gnn_layers=1)
    base.composition.set("energy", base.composition.get("energy") - 500.0)
    checkpoint = save_checkpoint(tmp_path / "base.ckpt", base)
    export_model(checkpoint, tmp_path / "model.pt")
    return checkpoint


def test_a_short_nve_run(model: Path) -> None:
    rows = simulate(model.parent, "nve", steps=40, step=0.1)
    atoms = boxed()
    atoms.calc = PETCalculator(model, device="cpu")
    assert rows[0, 3] == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
    assert np.ptp(rows[:, 3]) > 20 * np.ptp(rows[:, 1])
    shorter = simulate(model.parent, "nve", steps=80, step=0.05)
    # The conserved quantity fluctuates with the square of the time step.
    assert 2.5 < np.ptp(rows[:, 1]) / np.ptp(shorter[:, 1]) < 6.0


def test_a_short_path_integral_run(model: Path) -> None:
    rows = simulate(model.parent, "nvt", steps=20, step=0.1, beads=4)
    assert np.isfinite(rows).all()
    assert np.ptp(rows[:, 3]) > 20 * np.ptp(rows[:, 1])


def test_a_committee_is_seen(model: Path) -> None:
    folder = model.parent
    base = random_potential(dtype=torch.float32, num_gnn_layers=1)
    save_checkpoint(model, base)
    for seed in range(3):
        save_adapter(trained_adapter(copy.deepcopy(base), seed=seed), folder / f"a{seed}", "base")
    adapters = [folder / f"a{seed}" for seed in range(3)]
    export_model(model, folder / "model.pt", adapter=adapters)
    simulate(folder, "nve", steps=2, step=0.1, ensemble=True)
    atoms = boxed()
    atoms.calc = PETCalculator(model, adapters=adapters, device="cpu")
    atoms.get_potential_energy()
    (file,) = folder.glob("out.each*")
    said = 27.211386245988 * np.loadtxt(file)[0]
    np.testing.assert_allclose(said, atoms.calc.results["energy_ensemble"], rtol=1e-6)
