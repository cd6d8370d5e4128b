"""The files that both tools read: structures and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import yaml
from ase import Atoms
from ase.build import molecule
from benchmarks.accuracy import ADAMW, Run, dataset
from benchmarks.accuracy import options as accuracy_options
from benchmarks.speed.settings import EVALUATION_FILE, OURS, Settings, TrainingSet
from scipy.spatial.transform import Rotation

SPECIES = [1, 6, 7, 8]
TARGET = "energy"
SEED = 0
#: Neither tool is judged by what it learns here, so both get the same rate and stay close to
#: where they start.
LEARNING_RATE = 1e-5
#: The weights of the benchmark's model stay as they were drawn.
NO_LEARNING = 1e-12

WATER_SPACING = 3.104  # A between oxygens on a cubic grid: 29.9 A^3 a molecule, 1 g/cm^3


def water_box(cells: tuple[int, int, int]) -> Atoms:
    """Molecules rotated at random on a grid, at the density of the liquid."""
    random = np.random.default_rng(SEED)
    one = molecule("H2O")
    centers = np.indices(cells).reshape(3, -1).T * WATER_SPACING
    rotated = [Rotation.random(random_state=random).apply(one.positions) for _ in centers]
    positions = np.concatenate([p + c for p, c in zip(rotated, centers, strict=True)])
    symbols = one.get_chemical_symbols() * len(centers)
    return Atoms(symbols, positions, cell=np.array(cells) * WATER_SPACING, pbc=True)


def write_structure(work: Path, name: str, atoms: Atoms) -> Path:
    """One structure as a file, under a name that says which."""
    path = work / "inputs" / f"{name}.xyz"
    path.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(path, atoms)
    return path


def write_sets(settings: Settings, source: TrainingSet) -> tuple[Path, Path]:
    """The training and validation structures of a set, drawn once."""
    frames = ase.io.read(settings.data / source.file, ":")
    order = np.random.default_rng(SEED).permutation(len(frames))
    paths = []
    begin = 0
    for part, count in (("train", source.train), ("validation", source.validation)):
        path = settings.work / "inputs" / f"{source.name}-{part}.xyz"
        path.parent.mkdir(parents=True, exist_ok=True)
        ase.io.write(path, [frames[i] for i in order[begin : begin + count]])
        paths.append(path)
        begin += count
    return paths[0], paths[1]


def _section(path: Path, target: str, stress: bool) -> dict[str, Any]:
    section = dataset(path, target)
    if stress:
        section["targets"][target]["stress"] = {"key": "stress"}
    return section


def training_options(
    settings: Settings,
    source: TrainingSet,
    tool: str,
    method: str,
    checkpoint: Path | None,
    epochs: int,
) -> Path:
    """The options file of a run; ``method`` is ``lora``, ``full`` or ``scratch``."""
    train, validation = write_sets(settings, source)
    fine_tunes = checkpoint is not None
    target = f"{TARGET}/ft" if fine_tunes else TARGET
    training: dict[str, Any] = {
        "batch_size": source.batch,
        "num_epochs": epochs,
        "learning_rate": LEARNING_RATE if fine_tunes else NO_LEARNING,
    }
    if tool == OURS:
        training |= ADAMW
    if checkpoint is not None:
        run = accuracy_options(Run(tool, method, "50"), settings.work, checkpoint)
        training["finetune"] = run["architecture"]["training"]["finetune"]
    content = {
        "seed": SEED,
        "device": settings.device,
        "base_precision": 32,
        "final_eval": False,
        "architecture": {"name": "pet", "training": training},
        "training_set": _section(train, target, source.stress),
        "validation_set": _section(validation, target, source.stress),
    }
    if not fine_tunes:
        content["architecture"]["atomic_types"] = SPECIES
    path = settings.work / "inputs" / f"{tool}-{method}-{source.name}-{epochs}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def evaluation_options(settings: Settings, count: int) -> Path:
    """The options file of an evaluation of ``count`` structures."""
    frames = ase.io.read(settings.data / EVALUATION_FILE, f":{count}")
    structures = settings.work / "inputs" / f"evaluation-{count}.xyz"
    structures.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(structures, frames)
    path = structures.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(dataset(structures, TARGET)))
    return path
