"""Label structures with a model's own means over orientations, for it to learn to agree with them.

    python scripts/foundation/symmetrize.py MODEL WORK/train.xyz WORK/means.xyz --every 2

What training on labels leaves of the orientation is small beside the other errors, so the loss does
not ask for less of it. Beside the model's own mean it is all that is left. Writes the structures
with mean energies and forces as their labels. It can be stopped: what is in the file stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune.backends import choice
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.model.inference import ORIENTATIONS, orientations, predict_mean
from pet_finetune.model.potential import Potential

#: Written at once; what a stop loses.
PART = 2048

#: Atoms predicted at once, those of all orientations together (or a larger structure).
ATOMS = 1500


def means(model: Potential, frames: list[Atoms], rotations: torch.Tensor) -> list[Atoms]:
    """The structures with the mean predictions as labels (eV, eV/Angstrom)."""
    structures = [atoms_to_structure(atoms) for atoms in frames]
    most = ATOMS // len(rotations)
    left, labelled = iter(frames), []
    for batch in Loader(structures, model.cutoff, max_atoms_per_batch=most):
        mean = predict_mean(batch.graph, rotations, lambda b: model.predict(b, "energy"))
        own = mean.forces.double().split(batch.graph.atoms_per_structure.tolist())
        for energy, forces in zip(mean.energy.tolist(), own, strict=True):
            atoms = next(left).copy()
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces.numpy())
            labelled.append(atoms)
    return labelled


def main() -> None:
    """Label what is not yet in the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("structures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--every", type=int, default=1, help="of the structures, one of so many")
    parser.add_argument("--orientations", type=int, default=4, choices=ORIENTATIONS[1:])
    arguments = parser.parse_args()
    choice.prepare()
    model = load_checkpoint(arguments.model).model.eval()
    rotations = orientations(arguments.orientations)
    frames = ase.io.read(arguments.structures, f"::{arguments.every}")
    done = 0
    if arguments.output.exists():
        done = sum(1 for _ in ase.io.iread(arguments.output))
        if done % PART and done < len(frames):
            parser.error(f"{arguments.output} ends within a part: remove it and begin again.")
    while done < len(frames):
        part = means(model, frames[done : done + PART], rotations)
        ase.io.write(arguments.output, part, append=done > 0)
        done += len(part)
        print(f"{done:,} of {len(frames):,}", flush=True)


if __name__ == "__main__":
    main()
