"""Labels that a model gives itself, labels moved onto another baseline, and noise on labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pet_finetune.config import LabelNoise
from pet_finetune.data.batch import LabelledBatch, on_device
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import Structure
from pet_finetune.graph import Batch
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.model import Potential, Prediction
from pet_finetune.rng import Stream

_ATOMS_AT_ONCE = 512


def evaluation_loader(structures: Sequence[Structure], model: Potential) -> Loader:
    """A loader in batches of some hundred atoms, whatever the sizes of the structures."""
    most = max(_ATOMS_AT_ONCE, *(s.num_atoms for s in structures))
    return Loader(structures, model.cutoff, max_atoms_per_batch=most, dtype=model.dtype)


def label_with(
    model: Potential, structures: Sequence[Structure], targets: Collection[str]
) -> list[Structure]:
    """Structures with the model's own energies, forces and stresses in place of their labels.

    Args:
        model: as it stands; put into evaluation mode, and back.
        structures: at least one.
        targets: the energies to predict.

    Returns:
        The structures in the same order; stresses only where there is a volume.
    """
    loader = evaluation_loader(structures, model)
    wanted = dict.fromkeys(targets, (True, True))
    labels: list[dict[str, Tensor]] = []
    training = model.training
    model.eval()
    try:
        for batch in on_device(loader, model.device, model.dtype):
            labels += _labels(batch.graph, model.predict_many(batch.graph, wanted))
    finally:
        model.train(training)
    return [replace(s, labels=own) for s, own in zip(structures, labels, strict=True)]


def _labels(batch: Batch, predictions: Mapping[str, Prediction]) -> list[dict[str, Tensor]]:
    """The predictions for each structure of a batch, as its labels."""
    labels: list[dict[str, Tensor]] = [{} for _ in range(batch.num_structures)]
    atoms, volumes = batch.atoms_per_structure.tolist(), batch.volumes.tolist()
    for target, prediction in predictions.items():
        assert prediction.forces is not None
        assert prediction.stress is not None
        energies = prediction.energy.to("cpu", torch.float64)
        forces = prediction.forces.to("cpu", torch.float64).split(atoms)
        stresses = prediction.stress.to("cpu", torch.float64)
        for index, own in enumerate(labels):
            own[target] = energies[index].clone()
            own[forces_key(target)] = forces[index].clone()
            if volumes[index] > 0:
                own[stress_key(target)] = stresses[index].clone()
    return labels


def relabelled(
    structures: Sequence[Structure],
    source: str,
    shifts: Mapping[str, Tensor],
    species: Sequence[int],
) -> list[Structure]:
    """Labels of one energy as labels of others whose baselines differ from its own.

    Args:
        structures: labelled for ``source``.
        source: the energy that the labels are of.
        shifts: for each energy wanted, the baseline that it has less that of ``source``,
            [n_species], eV.
        species: atomic numbers, in the order of the shifts.
    """
    wanted = torch.tensor(species)
    made = []
    for structure in structures:
        counts = (structure.numbers.unsqueeze(1) == wanted).sum(0).to(torch.float64)
        labels = {}
        for target, shift in shifts.items():
            for name, value in structure.labels.items():
                if name == source:
                    labels[target] = value + counts @ shift
                elif name in (forces_key(source), stress_key(source)):
                    labels[target + name.removeprefix(source)] = value
        made.append(replace(structure, labels=labels))
    return made


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
            label, whole = labels.get(name), batch.whole
            known = label is not None if whole is None else name in whole.known
            if not known or not width:
                continue
            drawn = _normal(batch, name != target, generator)
            if label is not None:
                atoms = batch.graph.atoms_per_structure if name == target else 1.0
                labels[name] = label + width * atoms * drawn.to(label)
    return replace(batch, labels=labels)


def _normal(batch: LabelledBatch, of_forces: bool, generator: torch.Generator) -> Tensor:
    """Normal numbers for energies, [b], or forces, [n, 3]: for a part those of its whole."""
    whole, graph = batch.whole, batch.graph
    if whole is None:
        count = graph.num_atoms if of_forces else graph.num_structures
    else:
        count = int(whole.atoms.sum()) if of_forces else batch.size
    shape = (count, 3) if of_forces else (count,)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn if whole is None else drawn[whole.rows(of_forces)]
