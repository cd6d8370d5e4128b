"""Computing in processes of any kind: forked, spawned, from a pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import crystal, random_potential
from pet_finetune import PETCalculator, device
from pet_finetune.errors import ConfigError

TESTS = Path(__file__).resolve().parents[1]

#: Evaluates in the parent with two threads, then in children that it starts in the way it is told.
POOL = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from models import crystal, random_potential
from pet_finetune import PETCalculator

def forces(seed, calculator=None):
    atoms = crystal() * (2, 2, 2)
    atoms.rattle(0.01, seed=seed)
    atoms.calc = calculator or PETCalculator(random_potential(d_pet=32), device="cpu")
    return atoms.get_forces()

def inherited(seed):
    return forces(seed, parents)

if __name__ == "__main__":
    assert torch.get_num_threads() == 2
    torch.ones(10**6).exp()  # shared among the threads for certain, whatever the model's size
    parents = PETCalculator(random_potential(d_pet=32), device="cpu")
    expected = [forces(seed, parents) for seed in (0, 1)]
    context = multiprocessing.get_context(sys.argv[1])
    for work in [forces, inherited] if sys.argv[1] == "fork" else [forces]:
        with context.Pool(2) as pool:
            found = pool.map(work, [0, 1])
        np.testing.assert_allclose(found, expected, atol=1e-10)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        np.testing.assert_allclose(list(pool.map(forces, [0, 1])), expected, atol=1e-10)
    print("equal")
"""


def run_script(script: Path, *arguments: str, **environment: str) -> str:
    """What a script of its own process prints; it fails where that takes a minute or an error."""
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kernels"), [("fork", "auto"), ("fork", "off"), ("spawn", "auto")]
)
def test_children_compute_what_the_parent_computed(tmp_path: Path, method: str, kernels: str):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    printed = run_script(script, method, OMP_NUM_THREADS="2", PET_FINETUNE_KERNELS=kernels)
    assert printed.strip() == "equal"


def test_a_gpu_is_refused_in_a_forked_child_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    """As torch tells it there: this machine need not have a GPU."""
    atoms = crystal()
    atoms.calc = PETCalculator(random_potential(), device="cpu")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for name in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="'spawn'"):
            device.choose_device(name)
    assert device.choose_device("cpu").type == "cpu"
    atoms.get_potential_energy()
    atoms.calc.device = torch.device("cuda")
    atoms.rattle(0.1)
    with pytest.raises(ConfigError, match="'spawn'"):
        atoms.get_potential_energy()
