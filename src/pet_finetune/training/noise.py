"""Gaussian noise on labels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch

from pet_finetune.config import LabelNoise
from pet_finetune.data.batch import LabelledBatch
from pet_finetune.keys import forces_key
from pet_finetune.rng import Stream


def add_label_noise(
    batch: LabelledBatch, targets: Collection[str], noise: LabelNoise, seed: tuple[int, int, int]
) -> LabelledBatch:
    """The batch with noise on its energies and forces; stresses stay.

    Args:
        batch: with labels, NaN where a structure lacks one.
        targets: energies whose labels get noise.
        noise: standard deviations, eV/atom and eV/Angstrom.
        seed: of the run, the epoch and the batch; the noise depends on nothing else.
    """
    if not noise.energy and not noise.forces:
        return batch
    sequence = np.random.SeedSequence([*seed, Stream.NOISE])
    # On the CPU and in float64 whatever the labels are: the same numbers everywhere.
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
    labels = dict(batch.labels)
    for target in sorted(targets):
        for name, width in ((target, noise.energy), (forces_key(target), noise.forces)):
            label = labels.get(name)
            if label is None or not width:
                continue
            drawn = torch.randn(label.shape, generator=generator, dtype=torch.float64).to(label)
            atoms = batch.graph.atoms_per_structure if name == target else 1.0
            labels[name] = label + width * atoms * drawn
    return replace(batch, labels=labels)
