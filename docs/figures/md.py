"""Draws docs/figures/md_ethanol.svg and md_committee.svg: two simulations of ethanol.

    make demo
    pet-finetune train options.yaml -r architecture.training.finetune.ensemble=3 \
        -r architecture.training.num_epochs=15 -o outputs/committee
    python docs/figures/md.py outputs/DATE/TIME/best_model.ckpt outputs/committee

The plots are those that ``pet-finetune md`` writes by itself.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import ase.io

from pet_finetune.api import MDSettings, ModelChoice, run_md

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main(model: str, committee: str) -> None:
    """Simulate with both, and keep the plots."""
    frames = ase.io.read(ROOT / "datasets" / "molecules_pbe0_test.xyz", ":")
    ethanol = next(frame for frame in frames if frame.get_chemical_formula() == "C2H6O")
    foundation = str(ROOT / "checkpoints" / "pet-xtb-v0.ckpt")
    runs = {
        "ethanol": (ModelChoice(model), MDSettings(ensemble="nve", steps=2000, seed=1)),
        "committee": (ModelChoice(foundation, (committee,)), MDSettings(steps=400, seed=1)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        structure = Path(scratch, "ethanol.xyz")
        ase.io.write(structure, ethanol)
        for name, (choice, settings) in runs.items():
            run_md(choice, structure, settings, Path(scratch, name))
            shutil.copy(Path(scratch, name, "md.svg"), HERE / f"md_{name}.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
