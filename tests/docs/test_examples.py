"""The example scripts run as their docstrings say, on what the repository ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from pet_finetune.config.named_runs import read_named_runs


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
