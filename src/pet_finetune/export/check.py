"""Whether an exported model says what the model says that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    ModelEvaluationOptions,
    ModelOutput,
    NeighborListOptions,
    System,
    load_atomistic_model,
    register_autograd_neighbors,
)
from torch import Tensor

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.llpr import LastLayerPrediction, fresh, predict_uncertain
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import edge_vectors, structure_neighbors
from pet_finetune.data.structure import Structure
from pet_finetune.errors import CheckpointError
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property

from .targets import uncertainty_outputs

__all__ = ["ModelCheck", "make_system"]

#: How much numbers may differ, relative to 1 plus the largest of them.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
#: The columns of a neighbour list, as metatomic orders them.
_PAIR = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]


def make_system(structure: Structure, options: NeighborListOptions, dtype: torch.dtype) -> System:
    """A structure as metatomic has it, with its neighbour list; positions carry gradients.

    Args:
        structure: in Angstrom.
        options: the list to add.
        dtype: of positions and cell.
    """
    positions, cell = structure.positions, structure.cell
    system = System(
        types=structure.numbers.to(torch.int32),
        positions=positions.to(dtype, copy=True).requires_grad_(True),
        cell=cell.to(dtype),
        pbc=structure.pbc,
    )
    pairs = structure_neighbors(structure, options.engine_cutoff("angstrom"))
    rows = torch.cat([pairs.centers[:, None], pairs.neighbors[:, None], pairs.shifts], dim=1)
    neighbors = TensorBlock(
        values=edge_vectors(positions, cell, pairs).to(dtype).unsqueeze(-1),
        samples=Labels(_PAIR, rows.to(torch.int32)),
        components=[Labels(["xyz"], torch.arange(3).unsqueeze(1))],
        properties=Labels(["distance"], torch.zeros(1, 1, dtype=torch.int32)),
    )
    register_autograd_neighbors(system, neighbors, check_consistency=False)
    system.add_neighbor_list(options, neighbors)
    system.add_data("charge", _number("charge", structure.charge, dtype))
    system.add_data("spin_multiplicity", _number("spin_multiplicity", structure.spin, dtype))
    return system


def _number(name: str, value: int, dtype: torch.dtype) -> TensorMap:
    """One number of a system, as metatomic hands it to models that ask for it."""
    block = TensorBlock(
        values=torch.tensor([[value]], dtype=dtype),
        samples=Labels(["system"], torch.zeros(1, 1, dtype=torch.int32)),
        components=[],
        properties=Labels([name], torch.zeros(1, 1, dtype=torch.int32)),
    )
    return TensorMap(Labels(["_"], torch.zeros(1, 1, dtype=torch.int32)), [block])


class ModelCheck:
    """Compares a file with the predictions of the models that it is made of.

    Args:
        potentials: without adapters, on the CPU, one or the members of a committee; asked at once,
            since writing gives them up.
        structures: to ask both about.
        outputs: the file's name of each output, and the target it is.
        dtype: floating type of what the file is given; None for that of the models.
        calibration: of the spread of a committee.
    """

    def __init__(
        self,
        potentials: Sequence[Potential],
        structures: Sequence[Structure],
        outputs: Mapping[str, str],
        dtype: torch.dtype | None = None,
        calibration: float = 1.0,
    ) -> None:
        first = potentials[0]
        self.structures, self.outputs, self.inside = structures, outputs, first.dtype
        self.dtype = dtype or first.dtype
        pairs = [(s, structure_neighbors(s, first.cutoff)) for s in structures]
        wanted = {name: (first.target(name).is_energy, False) for name in outputs.values()}
        graph = collate(pairs, first.dtype).graph
        layers = {} if len(potentials) > 1 else fresh(first)
        found = [predict_uncertain(potential, graph, wanted, layers) for potential in potentials]
        self.expected = {
            output: _mean([of_member[target] for of_member in found])
            for output, target in outputs.items()
        }
        #: For each energy with an uncertainty this, and what members say.
        self.uncertain: dict[str, Tensor] = {}
        spreads, ensembles = uncertainty_outputs(potentials, outputs)
        for output, name in spreads.items():
            said = [of_member[outputs[output]] for of_member in found]
            if isinstance(said[0], LastLayerPrediction):
                each, sure = said[0].members.energy.T, said[0].uncertainty("energy").unsqueeze(1)
            else:
                each = torch.stack([_energy(one) for one in said], dim=1)
                sure = calibration * each.std(1, keepdim=True)
            self.uncertain[name] = sure
            if output in ensembles:
                self.uncertain[ensembles[output]] = each
        #: The largest difference found, relative to 1 plus the largest number.
        self.difference = 0.0

    def __call__(self, path: Path) -> None:
        """Ask the file.

        Raises:
            CheckpointError: it says something else.
        """
        model = load_atomistic_model(str(path))
        (options,) = model.requested_neighbor_lists()
        for output, expected in self.expected.items():
            systems = [make_system(s, options, self.dtype) for s in self.structures]
            kind = model.capabilities().outputs[output].sample_kind
            of_atoms = not isinstance(expected, Prediction) and expected.spec.per_atom
            request = ModelOutput(sample_kind=kind if of_atoms else "system")
            evaluation = ModelEvaluationOptions("angstrom", {output: request})
            values = model(systems, evaluation, check_consistency=True)[output].block().values
            if isinstance(expected, Prediction):
                self._compare(output, values.squeeze(1), expected.energy)
                positions = [system.positions for system in systems]
                slopes = torch.autograd.grad(values.sum(), positions, materialize_grads=True)
                assert expected.forces is not None
                self._compare(output, -torch.cat(slopes), expected.forces)
            else:
                self._compare(output, values.reshape(expected.values.shape), expected.values)
        for output, numbers in self.uncertain.items():
            systems = [make_system(s, options, self.dtype) for s in self.structures]
            evaluation = ModelEvaluationOptions(
                "angstrom", {output: ModelOutput(sample_kind="system")}
            )
            values = model(systems, evaluation, check_consistency=True)[output].block().values
            self._compare(output, values, numbers)

    def read_back(self, path: Path, targets: Mapping[str, str]) -> None:
        """Read a checkpoint again and ask the model in it.

        Args:
            path: the checkpoint.
            targets: its name of each target, and the model's.

        Raises:
            CheckpointError: it says something else.
        """
        again = load_checkpoint(path).model
        pairs = [(s, structure_neighbors(s, again.cutoff)) for s in self.structures]
        wanted = {name: (again.target(name).is_energy, False) for name in targets}
        graph = collate(pairs, self.inside).graph
        found = predict_uncertain(again, graph, wanted, fresh(again))
        for name, target in targets.items():
            new, expected = found[name], self.expected[target]
            if isinstance(expected, LastLayerPrediction):
                assert isinstance(new, LastLayerPrediction), f"the uncertainty of {name} is lost"
                self._compare(name, new.uncertainty("energy"), expected.uncertainty("energy"))
                if len(expected.members.energy):
                    self._compare(name, new.members.energy, expected.members.energy)
            if isinstance(new, Prediction):
                assert isinstance(expected, Prediction)
                assert new.forces is not None
                assert expected.forces is not None
                self._compare(name, new.energy, expected.energy)
                self._compare(name, new.forces, expected.forces)
            else:
                assert not isinstance(expected, Prediction)
                self._compare(name, new.values, expected.values)

    def _compare(self, output: str, found: Tensor, expected: Tensor) -> None:
        found, expected = found.detach().double(), expected.detach().double()
        difference = float((found - expected).abs().max() / (1.0 + expected.abs().max()))
        self.difference = max(self.difference, difference)
        if not difference <= _TOLERANCE[self.inside]:
            raise CheckpointError(
                f"The exported model's '{output}' differs from the model's by {difference:.1e} "
                "of its size, which must not happen: nothing was written. Please report it, with "
                "the version of torch."
            )


def _mean(predictions: Sequence[Prediction | Property]) -> Prediction | Property:
    """The mean of what several models say of one target."""
    first, *others = predictions
    if not others:
        return first
    if isinstance(first, Property):
        values = [one.values for one in predictions if isinstance(one, Property)]
        return replace(first, values=torch.stack(values).mean(0))
    energies = [one for one in predictions if isinstance(one, Prediction)]
    forces = [one.forces for one in energies if one.forces is not None]
    return replace(
        first,
        energy=torch.stack([one.energy for one in energies]).mean(0),
        forces=torch.stack(forces).mean(0),
    )


def _energy(prediction: Prediction | Property) -> Tensor:
    assert isinstance(prediction, Prediction)
    return prediction.energy
