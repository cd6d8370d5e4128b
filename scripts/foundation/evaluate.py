"""Errors of a foundation on the test molecules: by kind, by element, by rotation.

    python scripts/foundation/evaluate.py checkpoints/pet-xtb-s.ckpt WORK/test.xyz

Prints Markdown, for the model card, and with ``--json FILE`` keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms

from pet_finetune.backends import choice
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.model.potential import Potential
from pet_finetune.training.loss_features import rotational_spread

BATCH = 16
ROTATIONS = 6


def predictions(model: Potential, frames: list[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Energies, eV, and forces of each structure, eV/A."""
    energies, forces = [], []
    for start in range(0, len(frames), BATCH):
        part = frames[start : start + BATCH]
        batch = batch_from_atoms(part, model.cutoff, torch.float32)
        found = model.predict(batch, "energy")
        energies.append(found.energy.detach().numpy())
        forces += np.split(found.forces.numpy(), np.cumsum([len(f) for f in part])[:-1])
    return np.concatenate(energies), forces


def group(
    name: str, energy: np.ndarray, forces: list[np.ndarray], labels: list[np.ndarray]
) -> dict:
    """One row: errors in meV/atom and meV/A."""
    off, right = np.concatenate(forces), np.concatenate(labels)
    return {
        "group": name,
        "structures": len(forces),
        "energy_mae": 1e3 * float(np.abs(energy).mean()) if len(energy) else None,
        "energy_median": 1e3 * float(np.median(np.abs(energy))) if len(energy) else None,
        "forces_mae": 1e3 * float(np.abs(off).mean()),
        "forces_rms_of_labels": 1e3 * float(np.sqrt((right**2).mean())),
    }


def errors(model: Potential, frames: list[Atoms]) -> list[dict]:
    """Rows for all structures, for each kind, and for the atoms of each element."""
    energies, forces = predictions(model, frames)
    labels = [f.get_forces() for f in frames]
    wrong = [f - right for f, right in zip(forces, labels, strict=True)]
    energy = np.array([f.get_potential_energy() for f in frames])
    off = (energies - energy) / np.array([len(f) for f in frames])
    rows = [group("all", off, wrong, labels)]
    for kind in sorted({str(f.info["kind"]) for f in frames}):
        own = [i for i, f in enumerate(frames) if f.info["kind"] == kind]
        rows.append(group(kind, off[own], [wrong[i] for i in own], [labels[i] for i in own]))
    for symbol in sorted({s for f in frames for s in f.get_chemical_symbols()}):
        masks = [(f.symbols == symbol).nonzero()[0] for f in frames]
        has = [i for i, m in enumerate(masks) if len(m)]
        parts = ([x[i][masks[i]] for i in has] for x in (wrong, labels))
        rows.append(group(f"atoms of {symbol}", np.array([]), *parts))
    return rows


def markdown(rows: list[dict]) -> str:
    """A table."""
    lines = [
        "| | structures | E MAE (median), meV/atom | F MAE, meV/Å | RMS of the forces |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        energy = ""
        if row["energy_mae"] is not None:
            energy = f"{row['energy_mae']:.1f} ({row['energy_median']:.1f})"
        lines.append(
            f"| {row['group']} | {row['structures']:,} | {energy} | {row['forces_mae']:.0f} "
            f"| {row['forces_rms_of_labels']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("test", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rotated", type=int, default=200, help="structures rotated at random")
    arguments = parser.parse_args()
    choice.prepare()
    model = load_checkpoint(arguments.model).model.eval()
    known = set(model.species)
    frames = [f for f in ase.io.read(arguments.test, ":") if known.issuperset(f.numbers.tolist())]
    rows = errors(model, frames)
    print(markdown(rows))
    some = frames[:: max(1, len(frames) // arguments.rotated)]
    loader = Loader([atoms_to_structure(f) for f in some], model.cutoff, batch_size=BATCH)
    spread = rotational_spread(model, loader, "energy", ROTATIONS)
    energy, forces = 1e3 * spread.energy, 1e3 * spread.forces
    share = 100 * forces / rows[0]["forces_mae"]
    print(
        f"\nUnder rotations: energy {energy:.2f} meV/atom, forces {forces:.1f} meV/Å in the mean, "
        f"{share:.0f} % of the force MAE."
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "rotations": vars(spread)}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
