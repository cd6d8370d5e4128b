"""The example scripts run as their docstrings say, on what the repository ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


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
