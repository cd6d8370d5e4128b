"""Time and memory of a run from one measured step; suggested method and options."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pet_finetune.adapters.adapter_config import AdapterConfig, default_modules_to_save
from pet_finetune.adapters.inject import freeze, inject
from pet_finetune.config.finetune import FinetuneConfig
from pet_finetune.data.labelled_batch import collate
from pet_finetune.data.neighbors import find_pairs, structure_neighbors
from pet_finetune.data.structure import Structure
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential
from pet_finetune.training.sets import default_batch_size, default_num_epochs
from pet_finetune.units import duration

#: Edges that a measured step should have: enough to be no overhead, few enough for seconds.
_EDGES, _MOST_ATOMS = 8000, 400
#: Structures, and atoms in them, that edges are counted on.
_SAMPLE, _SAMPLE_ATOMS = 200, 40_000
_MIB = 2**20


@dataclass(frozen=True)
class Load:
    """Size of the computation.

    Attributes:
        structures, atoms, edges: of the training set; edges are directed pairs within the cutoff,
            extrapolated from a sample.
        neighbours: an atom has on average, and at most.
        held_out: edges of validation.
    """

    structures: int
    atoms: int
    edges: float
    neighbours: float
    most_neighbours: int
    held_out: float


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a method.

    Attributes:
        method: ``full``, ``lora`` or ``heads``.
        trainable: parameters that train.
        seconds: of an epoch with validation.
        memory: at the peak of a step, MiB: weights, gradients, optimiser, and what the step keeps;
            without what torch itself takes.
    """

    method: str
    trainable: int
    seconds: float
    memory: float


def load_of(training: Sequence[Structure], validation: Sequence[Structure], cutoff: float) -> Load:
    """Count edges on a sample that is spread over the sets."""
    edges, atoms, most = _edges_of(training, cutoff)
    held, held_atoms, _ = _edges_of(validation, cutoff)
    total = sum(s.num_atoms for s in training)
    others = sum(s.num_atoms for s in validation)
    each = edges / max(1, atoms)
    held_out = held / max(1, held_atoms) * others
    return Load(len(training), total, each * total, each, most, held_out)


def _edges_of(structures: Sequence[Structure], cutoff: float) -> tuple[int, int, int]:
    edges = atoms = most = 0
    total = sum(s.num_atoms for s in structures)
    step = max(1, -(-len(structures) // _SAMPLE), -(-total // _SAMPLE_ATOMS))
    for s in structures[::step]:
        first, second = find_pairs(
            s.positions.numpy(), s.cell.numpy(), s.pbc.numpy(), cutoff, "ij", full=False,
            where=s.where,
        )  # fmt: skip
        counts = np.bincount(first, minlength=s.num_atoms)
        counts = counts + np.bincount(second, minlength=s.num_atoms)
        edges += 2 * len(first)
        atoms += s.num_atoms
        most = max(most, int(counts.max()))
    return edges, atoms, most


#: How each method chooses what trains, in a copy of the model.
METHODS: dict[str, Callable[[Potential, str], object]] = {
    "full": lambda model, target: freeze(model, train=None),
    "lora": lambda model, target: inject(
        model, AdapterConfig(FinetuneConfig().rank, FinetuneConfig().alpha, targets=[target])
    ),
    "heads": lambda model, target: freeze(model, default_modules_to_save(model.network, target)),
}


def estimate(
    model: Potential,
    target: str,
    training: Sequence[Structure],
    load: Load,
    batch_size: int,
    *,
    forces: bool,
    stress: bool,
) -> list[Estimate]:
    """Measure a step of each method on a few structures and scale it to the whole set.

    Time and memory of a step grow with its edges. Validation has no backward pass, which is a
    third of the work.

    Args:
        model: which stays as it is.
        target: the energy that is trained.
        training: of which the middle-sized ones are measured.
        load: of the whole set.
        batch_size: structures in a batch.
        forces: whether forces are trained.
        stress: whether the stress is trained.
    """
    batch = _sample(training, model).to(device=model.device)
    found = []
    # The random numbers of the caller stay where they are.
    with torch.random.fork_rng(devices=[]):
        for method, choose in METHODS.items():
            own = copy.deepcopy(model)
            choose(own, target)
            found.append(_measure(method, own, target, batch, load, batch_size, forces, stress))
    return found


def _sample(structures: Sequence[Structure], model: Potential) -> Batch:
    """Structures of middle size, as many as a quick step takes."""
    order = sorted(structures, key=lambda s: s.num_atoms)
    middle = order[len(order) // 2 :] + order[: len(order) // 2][::-1]
    items, edges, atoms = [], 0, 0
    for whole in middle:
        # Long-range features see the whole structure.
        structure = whole if model.hypers.long_range.enable else _piece(whole, _MOST_ATOMS)
        pairs = structure_neighbors(structure, model.cutoff)
        items.append((structure, pairs))
        edges, atoms = edges + pairs.num_edges, atoms + structure.num_atoms
        if edges > _EDGES or atoms > _MOST_ATOMS or len(items) >= 64:
            break
    return collate(items, model.dtype).graph


def _piece(structure: Structure, atoms: int) -> Structure:
    """The atoms that are nearest to one of them, without labels, in the cell of the whole.

    What a step takes is measured for each edge, so that a piece stands for a frame of any size.
    """
    if structure.num_atoms <= atoms:
        return structure
    positions, pbc = structure.positions.numpy(), structure.pbc.numpy()
    away = positions - positions[0]
    if pbc.any():
        cell = structure.cell.numpy()[pbc]
        inside = away @ np.linalg.pinv(cell)
        away = away - np.round(inside) @ cell
    near = np.argsort((away**2).sum(axis=1), kind="stable")[:atoms]
    chosen = torch.from_numpy(np.sort(near))
    return replace(
        structure,
        numbers=structure.numbers[chosen],
        positions=structure.positions[chosen],
        labels={},
        kinds={},
    )


def _measure(
    method: str,
    model: Potential,
    target: str,
    batch: Batch,
    load: Load,
    batch_size: int,
    forces: bool,
    stress: bool,
) -> Estimate:
    model.train()
    kept: dict[int, int] = {}  # bytes of each storage that the backward pass needs

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    seconds = []
    for attempt in range(3):
        with saved if attempt == 0 else torch.enable_grad():
            started = time.perf_counter()
            said = model.predict(batch, target, forces=forces, stress=stress, create_graph=True)
            loss = said.energy.square().sum()
            for derivative in (said.forces, said.stress):
                if derivative is not None:
                    loss = loss + derivative.square().sum()
            torch.autograd.grad(loss, parameters, allow_unused=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds.append(time.perf_counter() - started)
    fastest = min(seconds[1:])
    edges = max(1, batch.num_edges)
    # Where there are no edges at all, an atom costs about what one costs.
    whole, held = max(load.edges, load.atoms), load.held_out
    epoch = fastest * (whole + held / 3) / edges
    weights = sum(p.numel() * p.element_size() for p in model.network.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters)
    of_batch = whole / max(1, load.structures) * min(batch_size, load.structures)
    memory = weights + 3 * trained + sum(kept.values()) * of_batch / edges
    return Estimate(method, sum(p.numel() for p in parameters), epoch, memory / _MIB)


#: Drawn validation structures below which energies, one number each, are right by chance too often.
_FEW_VALIDATED = 5
#: Parameters beyond which optimiser and gradients of all weights are a burden.
_LARGE = 20_000_000
#: Structures below which only the heads have enough to go by.
_FEW = 10
#: Structures from which all weights may be worth their time: with 50 and 200 of ethanol LoRA has
#: the lower errors, with 780 full fine-tuning the lower energies (docs/choosing.md).
_MANY = 500
#: Structures from which a test set can be spared.
_SPARE = 40


@dataclass(frozen=True)
class Suggestion:
    """Suggested options for the data.

    Attributes:
        options: a whole file, as plain values.
        reasons: a line for each choice.
    """

    options: dict[str, Any]
    reasons: tuple[str, ...]


def suggest(
    training_set: Any,
    load: Load,
    *,
    checkpoint: str | None,
    parameters: int = 0,
    validation: Any = None,
    test: Any = None,
    unknown: Sequence[str] = (),
    outliers: bool = False,
    forced: bool = True,
    estimates: Sequence[Estimate] = (),
) -> Suggestion:
    """Choose method, batch and epochs.

    Args:
        training_set: the section of the options.
        load: how much there is to compute.
        checkpoint: what the run starts from; None trains from scratch.
        parameters: of the checkpoint.
        validation: a section of the options; None lets a fraction be drawn.
        test: likewise.
        unknown: symbols of elements that the checkpoint lacks.
        outliers: whether some labels are doubtful.
        forced: whether every structure has forces, where the options read any.
        estimates: of the methods.
    """
    reasons = []
    batch = default_batch_size(load.structures, load.atoms)
    steps = -(-load.structures // batch)
    epochs = default_num_epochs(steps)
    training: dict[str, Any] = {"batch_size": batch, "num_epochs": epochs}
    reasons.append(
        f"batch_size {batch}, num_epochs {epochs}: {steps} steps an epoch, {steps * epochs} in all"
    )
    if checkpoint is not None:
        finetune, why = _method(load, parameters)
        finetune["read_from"] = checkpoint
        if unknown:
            finetune["new_elements"] = "nearest"
            reasons.append(
                f"new_elements: nearest, because the checkpoint lacks {' '.join(unknown)}"
            )
        training["finetune"] = finetune
        reasons.insert(0, f"method {finetune['method']}: {why}")
    else:
        reasons.insert(
            0, "from scratch, because no checkpoint is given; with one (-c) far fewer data do"
        )
    if outliers:
        training["loss"] = "huber"
        reasons.append("loss: huber, because the energies of some frames are doubtful")
    chosen = [e for e in estimates if e.method == training.get("finetune", {}).get("method")]
    for one in chosen:
        reasons.append(f"about {duration(one.seconds * epochs)} on this machine")
    if validation is None:
        validation = 0.1
        reasons.append("validation_set 0.1: drawn from the file; name a separate set if the "
                       "frames are a trajectory")  # fmt: skip
        if load.structures // 10 < _FEW_VALIDATED and forced and _have_forces(training_set):
            training["best_model_metric"] = "forces_mae"
            reasons.append("best_model_metric: forces_mae, because the energy error of so few "
                           "validation structures is noisy")  # fmt: skip
        if test is None and load.structures >= _SPARE:
            test = 0.1
    options = {
        "seed": 0,
        "device": "auto",
        "base_precision": 32,
        "architecture": {"name": "pet", "training": training},
        "training_set": training_set,
        "validation_set": validation,
        "test_set": 0.0 if test is None else test,
    }
    return Suggestion(options, tuple(reasons))


def _have_forces(training_set: Any) -> bool:
    """Whether a section of the options, or one of a list, names forces to learn."""
    sections = training_set if isinstance(training_set, list) else [training_set]
    targets = [target for section in sections for target in section["targets"].values()]
    return any(target.get("forces", "off") not in ("off", False) for target in targets)


def _method(load: Load, parameters: int) -> tuple[dict[str, Any], str]:
    """The method with its settings, and why it is chosen."""
    if load.structures < _FEW:
        why = f"{load.structures} structures are too few to train more than the heads"
        return {"method": "heads"}, why
    if parameters > _LARGE:
        why = (
            f"the foundation is large ({parameters / 1e6:.0f} M parameters): an adapter takes a "
            "fraction of the memory, and what is stored is small"
        )
        return {"method": "lora"}, why
    if load.structures < _MANY:
        why = (
            "with so few structures its errors are as low as those of full fine-tuning, or "
            "lower, in less time; the adapter is a seventh of the size (docs/choosing.md)"
        )
        return {"method": "lora"}, why
    why = (
        "with so many structures it has the lowest errors in our comparison (docs/choosing.md),"
        " and the foundation is small; lora takes two thirds of the time and a seventh of the "
        "size"
    )
    return {"method": "full"}, why


def training_section(files: Sequence[str], target: Mapping[str, Any]) -> Any:
    """The section of files that are read alike, one or a list."""
    sections = [
        {
            "systems": {"read_from": file, "length_unit": "angstrom"},
            "targets": {"energy": {"quantity": "energy", **target}},
        }
        for file in files
    ]
    return sections[0] if len(sections) == 1 else sections
