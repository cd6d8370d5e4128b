"""Label structures with a model's own means over orientations, for it to learn to agree with them.

    python scripts/foundation/symmetrize.py MODEL WORK/train.xyz WORK/means.xyz --every 2

What training on labels leaves of the orientation is small beside the other errors, so the loss does
not ask for less of it. Beside the model's own mean it is all that is left. Writes the structures
with mean energies and forces as their labels. It can be stopped: what is in the file stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from pet_finetune import kernels
from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.data.batch import batch_from_atoms
from pet_finetune.model import Potential
from pet_finetune.model.orientations import ORIENTATIONS, orientations, predict_mean

#: Written at once; what a stop loses.
PART = 2048

#: Atoms predicted at once, those of all orientations together.
ATOMS = 1500


def batches(frames: list[Atoms], most: int) -> Iterator[list[int]]:
    """Indices of structures of like size, with at most so many atoms together (or one of more)."""
    part: list[int] = []
    atoms = 0
    for index in sorted(range(len(frames)), key=lambda i: len(frames[i])):
        if part and atoms + len(frames[index]) > most:
            yield part
            part, atoms = [], 0
        part.append(index)
        atoms += len(frames[index])
    if part:
        yield part


def means(model: Potential, frames: list[Atoms], rotations: torch.Tensor) -> list[Atoms]:
    """The structures, in their order, with the mean predictions as labels (eV, eV/Angstrom)."""
    labelled: dict[int, Atoms] = {}
    for part in batches(frames, ATOMS // len(rotations)):
        batch = batch_from_atoms([frames[i] for i in part], model.cutoff, torch.float32)
        mean = predict_mean(batch, rotations, lambda b: model.predict(b, "energy"))
        ends = np.cumsum([len(frames[i]) for i in part])[:-1]
        forces = np.split(mean.forces.double().numpy(), ends)
        for index, energy, own in zip(part, mean.energy.double().numpy(), forces, strict=True):
            atoms = frames[index].copy()
            atoms.calc = SinglePointCalculator(atoms, energy=float(energy), forces=own)
            labelled[index] = atoms
    return [labelled[i] for i in range(len(frames))]


def main() -> None:
    """Label what is not yet in the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("structures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--every", type=int, default=1, help="of the structures, one of so many")
    parser.add_argument("--orientations", type=int, default=4, choices=ORIENTATIONS[1:])
    arguments = parser.parse_args()
    kernels.prepare()
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
