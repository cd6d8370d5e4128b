"""The example scripts run as their docstrings say, on what the repository ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import pytest
from ase.build import bulk

from pet_finetune.config.named_run_options import read_named_runs


def test_nve_example_keeps_the_energy_and_draws_it(repository: Path, tmp_path: Path) -> None:
    plot = tmp_path / "nve.png"
    command = [
        *(sys.executable, "examples/nve.py", "checkpoints/pet-xtb-v0.ckpt"),
        *("datasets/molecules_pbe0_test.xyz", "--steps", "40", "--plot", str(plot)),
    ]
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    departure = re.search(r"largest departure from the start: ([\d.]+) meV/atom", done.stdout)
    assert departure, done.stdout
    assert 0.0 < float(departure[1]) < 2.0
    assert plot.stat().st_size > 1000


def test_vibrations_of_ethanol(repository: Path) -> None:
    command = [sys.executable, "examples/vibrations.py", "checkpoints/pet-xtb-s.ckpt", "ethanol"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line, zero_point = done.stdout.splitlines()[-2:]
    found = [float(value) for value in line.partition(":")[2].split()]
    assert len(found) == 3 * 9 - 6
    assert found[0] > 0  # a minimum
    assert 3400 < found[-1] < 4000  # the O-H stretch; GFN2-xTB has it near 3550
    assert all(2700 < value < 3300 for value in found[-6:-1])  # five C-H stretches
    assert 1.9 < float(zero_point.split()[-2]) < 2.3


def test_phonons_of_diamond(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("phonopy", reason="phonopy is not installed")
    crystal = tmp_path / "diamond.xyz"
    ase.io.write(crystal, bulk("C", "diamond", a=3.57))
    command = [sys.executable, "examples/phonons.py", "checkpoints/pet-xtb-s.ckpt", str(crystal)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    centre = next(line for line in done.stdout.splitlines() if line.startswith("centre"))
    found = [float(value) for value in centre.partition(":")[2].split()]
    assert found[:3] == pytest.approx([0, 0, 0], abs=0.05)
    assert found[3:] == pytest.approx([40, 40, 40], abs=1.5)  # 39.9 in Raman spectra
    assert 8 < float(re.search(r"300 K: ([\d.]+)", done.stdout)[1]) < 18  # 12.3 measured


def test_many_molecules_relax_together(repository: Path) -> None:
    pytest.importorskip("torch_sim", reason="torch-sim is not installed")
    command = [sys.executable, "examples/relax_many.py", "checkpoints/pet-xtb-s.ckpt"]
    done = subprocess.run(
        [*command, "--count", "4", "--fmax", "0.2"],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 of 4 at rest" in done.stdout


def test_the_named_runs_of_the_example_train(repository: Path, tmp_path: Path) -> None:
    file = "examples/finetune_configs.json"
    short = ["num_epochs=1", "batch_size=30", "dataset_path=datasets/molecules_pbe0_val.xyz"]
    assert len(read_named_runs(repository / file, None, short, tmp_path)) == 4
    command = [
        *(sys.executable, "-m", "pet_finetune", "train", "--config", file),
        *("--run-name", "molecules_r8_dora", "-o", str(tmp_path)),
        *(part for text in short for part in ("-r", text)),
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "32bits_r8_dora/molecules_r8_dora/adapter").is_dir()


def test_the_notebook_goes_from_atoms_to_dynamics(repository: Path) -> None:
    """It is stored without outputs, runs from top to bottom and ends with a better model."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(repository / "examples/notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    resources = {"metadata": {"path": str(repository / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()

    def shown(cell: Any, kind: str) -> str:
        (result,) = [one for one in cell.outputs if one.output_type == "execute_result"]
        return result.data[kind]

    _, inspected, trained, history, errors, dynamics = cells
    assert "findings" in shown(inspected, "text/html")
    assert "<svg" in shown(trained, "text/html")
    assert "energy MAE" in shown(trained, "text/html")
    assert len(re.findall(r"0\.\d+", shown(history, "text/plain"))) == 4
    before, after = map(float, re.findall(r"\d\.\d+", shown(errors, "text/plain")))
    assert after < 0.8 * before
    temperatures = [float(t) for t in re.findall(r"\d+\.\d+", shown(dynamics, "text/plain"))]
    assert len(temperatures) == 11
    assert 0 < temperatures[-1] < 2000
