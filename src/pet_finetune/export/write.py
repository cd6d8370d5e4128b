"""Writing a model as the TorchScript file that engines with metatomic's interface read, checked."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelEvaluationOptions,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
    load_atomistic_model,
    register_autograd_neighbors,
)
from torch import Tensor

from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.llpr import LastLayerPrediction, fresh, predict_uncertain
from pet_finetune.data.convert_sets import neighbor_block
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import Structure
from pet_finetune.errors import CheckpointError
from pet_finetune.files import check_room, replacing
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property

from .interface import ExportedPotential
from .targets import uncertainty_outputs

#: How much numbers may differ, relative to 1 plus the largest of them.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def make_system(structure: Structure, options: NeighborListOptions, dtype: torch.dtype) -> System:
    """A structure as metatomic has it, with its neighbour list; positions carry gradients."""
    positions, cell = structure.positions, structure.cell
    system = System(
        types=structure.numbers.to(torch.int32),
        positions=positions.to(dtype, copy=True).requires_grad_(True),
        cell=cell.to(dtype),
        pbc=structure.pbc,
    )
    pairs = structure_neighbors(structure, options.engine_cutoff("angstrom"))
    neighbors = neighbor_block(pairs, positions, cell).to(dtype)
    register_autograd_neighbors(system, neighbors, check_consistency=False)
    system.add_neighbor_list(options, neighbors)
    system.add_data("charge", _number("charge", structure.charge, dtype))
    system.add_data("spin_multiplicity", _number("spin_multiplicity", structure.spin, dtype))
    return system


def _number(name: str, value: int, dtype: torch.dtype) -> TensorMap:
    """A number of a system in metatomic's layout for additional inputs."""
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
        """Ask the file."""
        model = load_atomistic_model(str(path))
        (options,) = model.requested_neighbor_lists()

        def ask(output: str, kind: str = "system") -> tuple[Tensor, list[System]]:
            systems = [make_system(s, options, self.dtype) for s in self.structures]
            request = ModelEvaluationOptions("angstrom", {output: ModelOutput(sample_kind=kind)})
            said = model(systems, request, check_consistency=True)
            return said[output].block().values, systems

        for output, expected in self.expected.items():
            of_atoms = not isinstance(expected, Prediction) and expected.spec.per_atom
            own = model.capabilities().outputs[output].sample_kind
            values, systems = ask(output, own if of_atoms else "system")
            if isinstance(expected, Prediction):
                self._compare(output, values.squeeze(1), expected.energy)
                positions = [system.positions for system in systems]
                slopes = torch.autograd.grad(values.sum(), positions, materialize_grads=True)
                assert expected.forces is not None
                self._compare(output, -torch.cat(slopes), expected.forces)
            else:
                self._compare(output, values.reshape(expected.values.shape), expected.values)
        for output, numbers in self.uncertain.items():
            self._compare(output, ask(output)[0], numbers)

    def read_back(self, path: Path, targets: Mapping[str, str]) -> None:
        """Read a checkpoint again and ask the model in it, by its names of the targets."""
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
    """Mean prediction of several models for one target."""
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


# Of the architecture.
_PAPER = "https://arxiv.org/abs/2305.19302"
_DESCRIPTION = (
    "A PET interatomic potential, written by pet-finetune. Energies in eV, lengths in angstrom."
)


def interaction_range(potential: Potential) -> float:
    """Interaction range: largest distance on which an atom's energy depends, Angstrom.

    Each GNN layer looks one cutoff further. The ``feedforward`` featurizer reads out messages that
    hold what the neighbour made of its own surroundings: one more; the radius of an adaptive cutoff
    depends on the surroundings of both atoms: one more. An engine that splits its box between
    processors hands each of them the atoms within this range. It is
    infinite with long-range features, as metatomic asks for: they see the whole structure.
    """
    hypers = potential.hypers
    if hypers.long_range.enable:
        return math.inf
    steps = hypers.num_gnn_layers
    steps += hypers.featurizer_type == "feedforward"
    steps += hypers.num_neighbors_adaptive is not None
    return float(max(steps * hypers.cutoff, potential.cutoff))


def write_model(
    path: Path,
    potentials: Sequence[Potential],
    outputs: Mapping[str, str],
    name: str,
    authors: Sequence[str] = (),
    card: Mapping[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    calibration: float = 1.0,
) -> None:
    """Write a model in one step: the whole new file is there, or what was there before.

    Args:
        path: the file; its folder is made when missing.
        potentials: without adapters, on the CPU, in the floating type that the networks are to
            have; one, or the members of a committee. They are given up.
        outputs: as for :class:`ExportedPotential`.
        name: of the model.
        authors: of the model.
        card: what else the file says of itself.
        check: is shown the new file before it takes its place, and raises if it is wrong.
        dtype: floating type of what engines give and get; None for that of the networks.
        calibration: as for :class:`ExportedPotential`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    first = potentials[0]
    metadata = ModelMetadata(
        name=name,
        description=_DESCRIPTION,
        authors=list(authors),
        references={"architecture": [_PAPER]},
        extra=dict(card or {}),
    )
    described = {output: _described(first.target(of)) for output, of in outputs.items()}
    for names in uncertainty_outputs(potentials, outputs):
        described |= {name: _described(first.target(outputs[of])) for of, name in names.items()}
    capabilities = ModelCapabilities(
        outputs=described,
        atomic_types=list(first.species),
        interaction_range=interaction_range(first),
        length_unit="angstrom",
        supported_devices=["cuda", "cpu"],
        dtype=str(dtype or first.dtype).removeprefix("torch."),
    )
    module = ExportedPotential([one.eval() for one in potentials], outputs, calibration)
    model = AtomisticModel(module.eval(), metadata, capabilities)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, sum(t.nbytes for t in module.state_dict().values()))
        with replacing(path) as partial:
            with _no_extensions(), _written_by_python():
                model.save(str(partial))
            if check is not None:
                check(partial)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{path}: the model cannot be written ({reason}). An earlier file of "
            "this name is as it was. Check that the folder is writable and has space left."
        ) from error


def _described(spec: TargetSpec) -> ModelOutput:
    """Description of an output for metatomic."""
    try:
        empty = ModelOutput(unit=spec.unit)
    except (RuntimeError, ValueError):  # a unit of the user's own; engines convert none then
        empty = ModelOutput(unit="")
    description = spec.description or spec.form
    # Of atoms means that sums over them can be asked for as well.
    kind = "system" if spec.per_volume else "atom"
    return ModelOutput(unit=empty.unit, sample_kind=kind, description=description)


@contextlib.contextmanager
def _no_extensions() -> Iterator[None]:
    """Hide libraries loaded into torch, such as our kernels.

    metatomic writes down all that are loaded and wants them wherever the model runs; the exported
    network uses none.
    """
    loaded: set[str] = torch.ops.loaded_libraries
    hidden = set(loaded)
    loaded.clear()
    try:
        yield
    finally:
        loaded.update(hidden)


@contextlib.contextmanager
def _written_by_python() -> Iterator[None]:
    """Let torch make TorchScript files in memory, and Python write them.

    torch's own writer, in C++, ends the whole process where a write fails (a full disk, a quota,
    a limit of file sizes), and metatomic gives it nothing but a path.
    """
    save = torch.jit.save

    def through_memory(module: Any, file: str, _extra_files: dict[str, str] | None = None) -> None:
        content = io.BytesIO()
        save(module, content, _extra_files)
        Path(file).write_bytes(content.getbuffer())

    torch.jit.save = through_memory  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.jit.save = save
