"""The laws that every potential and every adapter obeys, as functions to call with any model.

Each raises an AssertionError where its law is broken, and where it would hold of a model or an
adapter that does nothing: ``test_negative_controls.py`` shows each of them a fault that it must
find. Models are in float64 unless said otherwise; structures are ASE's.

Equal to the last bit is asked only where the same operations run in the same order on the same
shapes; whatever is added up in another order agrees to a tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.inject import (
    adapter_tensors,
    eject,
    inject,
    merge,
    merged_copy,
    unmerge,
)
from pet_finetune.adapters.layers import is_adapter_tensor
from pet_finetune.adapters.peft_files import load_adapter, save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.epochs import random_rotations
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import CheckpointError
from pet_finetune.graph import Batch, rotate_graphs
from pet_finetune.model.pet import HEAD_GROUPS
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction


def predict(
    model: Potential, frames: Sequence[Atoms], target: str = "energy", stress: bool = True
) -> Prediction:
    """What a model says of some structures in one batch, without graphs."""
    return predict_batch(model, batch_from_atoms(frames, model.cutoff, model.dtype), target, stress)


def predict_batch(
    model: Potential, batch: Batch, target: str = "energy", stress: bool = True
) -> Prediction:
    """The same for a batch."""
    found = model.predict(batch, target, stress=stress)
    parts = (found.energy, found.atom_energies, found.forces, found.stress)
    return Prediction(*(None if part is None else part.detach() for part in parts))


def assert_same(one: Prediction, other: Prediction) -> None:
    """Every number of two predictions is the same, to the last bit."""
    for name in ("energy", "atom_energies", "forces", "stress"):
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a, b), f"{name} differs by up to {(a - b).abs().max():.2e}"


def assert_agree(one: Prediction, other: Prediction, tolerance: float) -> None:
    """As :func:`assert_same` where the tolerance is zero, else :func:`assert_close`."""
    if tolerance:
        assert_close(one, other, tolerance)
    else:
        assert_same(one, other)


def assert_differs(one: Prediction, other: Prediction) -> None:
    """Energies and forces differ: guards a law against holding of nothing."""
    assert (one.energy - other.energy).abs().max() > 1e-5
    assert (one.forces - other.forces).abs().max() > 1e-5


def assert_not_constant(found: Prediction) -> None:
    """There are energies and forces: guards a law against a model that predicts nothing."""
    assert found.energy.abs().min() > 1e-5
    assert found.forces.abs().max() > 1e-3


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Two state dicts have the same names and, to the last bit, the same numbers."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    changed = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not changed, changed


# Adapters ---------------------------------------------------------------------------------------


def injection_is_the_identity(
    base: Potential, frames: Sequence[Atoms], config: AdapterConfig
) -> None:
    """A fresh adapter changes no bit of any prediction, in evaluation and while training.

    Once moved it does.
    """
    before = [predict(base, frames, target) for target in config.targets]
    adapted = copy.deepcopy(base)
    inject(adapted, config)
    for target, original in zip(config.targets, before, strict=True):
        assert_same(predict(adapted.eval(), frames, target), original)
        assert_same(predict(adapted.train(), frames, target), original)
    assert adapted.adapter is not None
    own = adapter_tensors(adapted)
    with torch.no_grad():
        for name, parameter in adapted.network.named_parameters():
            if name in own:
                parameter += 0.1
    for target, original in zip(config.targets, before, strict=True):
        assert_differs(predict(adapted.eval(), frames, target), original)


def merged_equals_unmerged(
    adapted: Potential, base: Potential, frames: Sequence[Atoms], tolerance: float = 0.0
) -> None:
    """Merging, in place or in a copy, changes no bit of any prediction (0) or next to nothing.

    The adapter is trained, so what is merged differs from the base, and once merged the factors are
    read no more.
    """
    before = predict(adapted, frames)
    known = [index for index, frame in enumerate(frames) if set(frame.numbers) <= set(base.species)]
    original = predict(base, [frames[index] for index in known])
    assert (before.energy[known] - original.energy).abs().max() > 1e-5
    merge(adapted)
    try:
        assert_agree(predict(adapted, frames), before, tolerance)
        with _factors_lost(adapted):
            assert_agree(predict(adapted, frames), before, tolerance)
        _assert_plain(merged_copy(adapted))
        assert_agree(predict(merged_copy(adapted), frames), before, tolerance)
    finally:
        unmerge(adapted)
    assert_same(predict(adapted, frames), before)
    with _factors_lost(adapted) as lost:
        assert not lost or (predict(adapted, frames).energy - before.energy).abs().max() > 1e-5
    _assert_plain(merged_copy(adapted))
    assert_agree(predict(merged_copy(adapted), frames), before, tolerance)


@contextmanager
def _factors_lost(adapted: Potential) -> Iterator[list[torch.Tensor]]:
    """The factors of the low-rank updates are other numbers within; gives what they were."""
    factors = [p for n, p in adapted.network.named_parameters() if ".lora_" in n]
    kept = [factor.detach().clone() for factor in factors]
    with torch.no_grad():
        for factor in factors:
            factor += 1.0
    try:
        yield kept
    finally:
        with torch.no_grad():
            for factor, value in zip(factors, kept, strict=True):
                factor.copy_(value)


def _assert_plain(model: Potential) -> None:
    """There is nothing of an adapter in a model, but for prompts that became part of it."""
    assert model.adapter is None
    assert not [name for name in predict_state(model) if is_adapter_tensor(name)]


def unmerging_returns_the_base(adapted: Potential, base: Potential) -> None:
    """The base's weights survive merging and unmerging, any number of times, bit for bit.

    In between they are others, but for prompts, which have nothing to merge into.
    """
    frozen = {n: p for n, p in base.network.named_parameters() if n not in _trained(adapted)}
    assert frozen
    before = predict_state(adapted)
    adapts_layers = any(".lora_" in name for name in before)
    for _ in range(3):
        merge(adapted)
        merge(adapted)
        merged = adapted.network.state_dict()
        untouched = [n for n, p in merged.items() if n in before and torch.equal(p, before[n])]
        assert (len(untouched) < len(merged)) == adapts_layers, "merging changed no weight"
        unmerge(adapted)
    after = adapted.network.state_dict()
    assert_same_weights(after, before)
    assert_same_weights({name: after[name] for name in frozen}, frozen)


def _trained(model: Potential) -> set[str]:
    return {name for name, value in model.network.named_parameters() if value.requires_grad}


def predict_state(model: Potential) -> dict[str, torch.Tensor]:
    """A copy of the network's state dict."""
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def ejected_is_the_base(adapted: Potential, base: Potential, frames: Sequence[Atoms]) -> None:
    """Taking an adapter out, merged or not, gives the base back: weights, targets, predictions."""
    assert_differs(predict(adapted, frames), predict(base, frames))
    for merged in (False, True):
        model = copy.deepcopy(adapted)
        if merged:
            merge(model)
        eject(model)
        assert model.adapter is None
        assert model.targets == base.targets
        assert_same_weights(model.network.state_dict(), base.network.state_dict())
        assert_same(predict(model, frames), predict(base, frames))


def resuming_loses_nothing(adapted: Potential, frames: Sequence[Atoms], folder: Path) -> None:
    """A checkpoint to go on from keeps the adapter apart, and every number of it."""
    path = save_checkpoint(folder / "last.ckpt", adapted, training={})
    again = load_checkpoint(path, keep_adapter=True).model
    assert again.adapter.config == adapted.adapter.config
    assert_same_weights(predict_state(again), predict_state(adapted))
    assert _trained(again) == _trained(adapted)
    assert_same(predict(again, frames), predict(adapted, frames))


def only_what_is_stated_trains(
    adapted: Potential, base: Potential, asked: AdapterConfig, new_tables: Sequence[str] = ()
) -> None:
    """The tensors of the adapter and the modules to save train: all of them, and nothing else.

    Args:
        asked: the configuration as it was asked for; layers and modules to save are named by the
            endings of their paths, or ``all-linear``.
        new_tables: the tables of embeddings that hold rows of elements new to the base.
    """
    expected = {f"{path}.new_rows" for path in new_tables}
    names = [name for name, _ in base.network.named_parameters()]
    for path, module in base.network.named_modules():
        if asked.num_prompts and path.endswith(".attention"):
            expected |= {f"{path}.prompt.adaption_{part}" for part in ("prompt", "gate")}
        elif not asked.num_prompts and _is_adapted(path, module, asked.target_modules):
            expected |= {f"{path}.lora_A", f"{path}.lora_B"}
            expected |= {f"{path}.lora_magnitude_vector"} if asked.use_dora else set()
    if asked.modules_to_save is None:
        heads = tuple(f"{group}.{target}." for group in HEAD_GROUPS for target in asked.targets)
        expected |= {name for name in names if name.startswith(heads)}
    for path in asked.modules_to_save or ():
        expected |= {name for name in names if f".{path}." in f".{name}"}
    found = _trained(adapted)
    assert found == expected, f"trains: {found - expected}, does not: {expected - found}"


def _is_adapted(path: str, module: torch.nn.Module, asked: str | Sequence[str]) -> bool:
    if not isinstance(module, torch.nn.Linear) or path.startswith(HEAD_GROUPS):
        return False
    return asked == "all-linear" or f".{path}".endswith(tuple(f".{ending}" for ending in asked))


# Physics ----------------------------------------------------------------------------------------


def forces_are_finite_differences(
    model: Potential, atoms: Atoms, step: float = 1e-5, tolerance: float = 1e-7
) -> float:
    """F = -dE/dr by central differences; returns the largest difference, eV/angstrom."""
    moved = []
    for atom in range(len(atoms)):
        for axis in range(3):
            for sign in (1, -1):
                frame = atoms.copy()
                frame.positions[atom, axis] += sign * step
                moved.append(frame)
    energies = _energies(model, moved).reshape(len(atoms), 3, 2)
    numerical = -(energies[..., 0] - energies[..., 1]) / (2 * step)
    assert numerical.abs().max() > 1e-3
    found = predict(model, [atoms]).forces
    difference = float((found - numerical).abs().max())
    assert difference < tolerance * max(1.0, float(numerical.abs().max())), difference
    return difference


def stress_is_finite_differences(
    model: Potential, atoms: Atoms, step: float = 1e-5, tolerance: float = 1e-8
) -> float:
    """Stress = dE/dstrain / V, symmetric; returns the largest difference, eV/angstrom^3."""
    strained = []
    for i in range(3):
        for j in range(3):
            for sign in (1, -1):
                deformation = np.eye(3)
                deformation[i, j] += 0.5 * sign * step
                deformation[j, i] += 0.5 * sign * step
                frame = atoms.copy()
                frame.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
                strained.append(frame)
    energies = _energies(model, strained).reshape(3, 3, 2)
    numerical = (energies[..., 0] - energies[..., 1]) / (2 * step * atoms.get_volume())
    assert numerical.abs().max() > 1e-4
    found = predict(model, [atoms]).stress[0]
    difference = float((found - numerical).abs().max())
    assert difference < tolerance * max(1.0, float(numerical.abs().max())), difference
    assert torch.equal(found, found.T)
    return difference


def _energies(model: Potential, frames: Sequence[Atoms]) -> torch.Tensor:
    batch = batch_from_atoms(frames, model.cutoff, model.dtype)
    with torch.no_grad():
        return model.predict(batch, forces=False).energy


def assert_close(
    found: Prediction, expected: Prediction, tolerance: float, order: Sequence[int] | None = None
) -> None:
    """Predictions agree to a tolerance in eV, eV/angstrom, eV/angstrom^3."""
    atoms = slice(None) if order is None else list(order)
    for name in ("energy", "atom_energies", "forces", "stress"):
        a, b = getattr(found, name), getattr(expected, name)
        b = b if name in ("energy", "stress") else b[atoms]
        difference = float((a - b).abs().max())
        assert difference <= tolerance, f"{name} differs by up to {difference:.2e}"


def alone_equals_in_a_batch(
    model: Potential, frames: Sequence[Atoms], tolerance: float = 1e-11
) -> None:
    """A structure does not notice what else is in its batch, in any order."""
    assert_not_constant(predict(model, frames))
    for order in (range(len(frames)), reversed(range(len(frames)))):
        chosen = [frames[index] for index in order]
        together = predict(model, chosen)
        first = 0
        for index, atoms in enumerate(chosen):
            last = first + len(atoms)
            part = Prediction(
                together.energy[index : index + 1],
                together.atom_energies[first:last],
                together.forces[first:last],
                together.stress[index : index + 1],
            )
            assert_close(part, predict(model, [atoms]), tolerance)
            first = last


def atoms_without_neighbors_work(model: Potential, atoms: Atoms, far: Atoms) -> None:
    """One atom has an energy and no force, alone, in a box, and far from another structure."""
    assert len(atoms) == 1
    boxed = atoms.copy()
    boxed.cell, boxed.pbc = [4 * model.cutoff] * 3, True
    alone = predict(model, [atoms])
    assert torch.isfinite(alone.energy).all()
    assert alone.energy.abs() > 1e-5
    assert torch.equal(alone.forces, torch.zeros_like(alone.forces))
    assert torch.equal(predict(model, [boxed]).forces, alone.forces)
    assert_close(predict(model, [boxed]), alone, 1e-12)
    beside = far + atoms
    beside.positions[-1] += [0, 0, 10 * model.cutoff + np.abs(far.positions).max()]
    together = predict(model, [beside])
    expected = float(alone.energy + predict(model, [far]).energy)
    assert float(together.energy) == pytest.approx(expected, abs=1e-11)
    assert torch.equal(together.forces[-1], torch.zeros_like(together.forces[-1]))


def energy_is_extensive(model: Potential, atoms: Atoms, tolerance: float = 1e-11) -> None:
    """Two structures out of reach of each other, or a cell taken twice, have twice the energy."""
    once = predict(model, [atoms])
    assert_not_constant(once)
    periodic = np.flatnonzero(atoms.pbc)
    if len(periodic):
        repeats = [1, 1, 1]
        repeats[periodic[0]] = 2
        twice = predict(model, [atoms * repeats])
        if atoms.pbc.all():
            assert float((twice.stress - once.stress).abs().max()) < tolerance
    else:
        copied = atoms.copy()
        copied.positions += [0, 20 * model.cutoff, 0]
        twice = predict(model, [atoms + copied])
    assert float(twice.energy) == pytest.approx(2 * float(once.energy), abs=tolerance * len(atoms))
    for half in twice.forces.split(len(atoms)):
        assert float((half - once.forces).abs().max()) < tolerance


def translation_changes_nothing(model: Potential, atoms: Atoms, tolerance: float = 1e-11) -> None:
    """The origin has no meaning."""
    moved = atoms.copy()
    moved.positions += [3.21, -17.9, 0.456]
    expected = predict(model, [atoms])
    assert_not_constant(expected)
    assert_close(predict(model, [moved]), expected, tolerance)


def permutation_changes_nothing(model: Potential, atoms: Atoms, tolerance: float = 1e-11) -> None:
    """Nor has the order of the atoms, which forces and atomic energies follow."""
    order = np.random.default_rng(3).permutation(len(atoms))
    expected = predict(model, [atoms])
    assert_not_constant(expected)
    assert_close(predict(model, [atoms[order]]), expected, tolerance, order)


def periodic_images_change_nothing(
    model: Potential, atoms: Atoms, tolerance: float = 1e-10
) -> None:
    """Atoms may be any of their images, and the cell any that spans the same lattice."""
    expected = predict(model, [atoms])
    assert_not_constant(expected)
    shifts = np.random.default_rng(5).integers(-3, 4, size=(len(atoms), 3)) * atoms.pbc
    imaged = atoms.copy()
    imaged.positions += shifts @ atoms.cell.array
    wrapped = imaged.copy()
    wrapped.wrap()
    skewed = atoms.copy()
    first, second = np.flatnonzero(atoms.pbc)[:2]
    skewed.cell[second] = atoms.cell[second] + atoms.cell[first]
    for same in (imaged, wrapped, skewed):
        assert_close(predict(model, [same]), expected, tolerance)


def rotational_errors(
    model: Potential, frames: Sequence[Atoms], rotations: int = 8, seed: int = 0
) -> dict[str, float]:
    """How much predictions depend on the orientation; PET learns invariance, it is not built in.

    Returns:
        root mean square deviation from the mean over rotations and inversions: of the energy,
        meV/atom, and of the forces rotated back, meV/angstrom.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = batch_from_atoms(frames, model.cutoff, model.dtype)
    energies, forces = [], []
    for _ in range(rotations):
        turns = random_rotations(len(frames), generator, model.dtype)
        found = predict_batch(model, rotate_graphs(batch, turns))
        back = turns[batch.structure_index].transpose(1, 2)
        energies.append(found.energy / batch.atoms_per_structure)
        forces.append((back @ found.forces.unsqueeze(-1)).squeeze(-1).double())
    spread = {"energy": torch.stack(energies), "forces": torch.stack(forces)}
    return {
        name: 1000.0 * float((values - values.mean(0)).square().mean().sqrt())
        for name, values in spread.items()
    }


# Files ------------------------------------------------------------------------------------------


def saving_loses_nothing(
    model: Potential, frames: Sequence[Atoms], folder: Path, tolerance: float = 0.0
) -> None:
    """What comes back from a checkpoint is the model, to the last bit."""
    path = save_checkpoint(folder / "model.ckpt", model, provenance={"parent": "none"})
    opened = load_checkpoint(path)
    again = opened.model
    assert opened.provenance == {"parent": "none"}
    assert again.hypers == model.hypers
    assert (again.species, again.targets, again.dtype) == (
        model.species,
        model.targets,
        model.dtype,
    )
    for target in model.targets:
        found = predict(again, frames, target)
        assert_agree(found, predict(model, frames, target), tolerance)
    expected = model if model.adapter is None else merged_copy(model)
    assert weights_fingerprint(again) == weights_fingerprint(expected)
    if tolerance:
        assert predict_state(again).keys() == predict_state(expected).keys()
    else:
        assert_same_weights(predict_state(again), predict_state(expected))


def saving_an_adapter_loses_nothing(
    adapted: Potential,
    base: Potential,
    frames: Sequence[Atoms],
    folder: Path,
    start: Potential | None = None,
) -> None:
    """An adapter put onto its base from a folder is the adapted model, to the last bit.

    Args:
        start: what the model is without its adapter, where that is not the base.
    """
    assert_differs(predict(adapted, frames), predict(start or base, frames))
    save_adapter(adapted, folder, "base")
    again = copy.deepcopy(base)
    load_adapter(again, folder)
    assert_same(predict(again, frames), predict(adapted, frames))


def an_interrupted_save_leaves_the_old_file(
    old: Potential, new: Potential, folder: Path, interrupt: Callable[[BaseException], None]
) -> None:
    """Whatever goes wrong while writing, the file is the old one and nothing lies beside it.

    Args:
        interrupt: makes the next write raise the given exception half way.
    """
    path = save_checkpoint(folder / "model.ckpt", old)
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        interrupt(error)
        with pytest.raises(
            KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
        ):
            save_checkpoint(path, new)
        assert path.read_bytes() == before
        assert [entry.name for entry in folder.iterdir()] == ["model.ckpt"]
    assert weights_fingerprint(load_checkpoint(path).model) == weights_fingerprint(old)
    assert weights_fingerprint(new) != weights_fingerprint(old)


def processes_change_nothing(
    train: Callable[[], dict[str, torch.Tensor]],
    together: Callable[[int, Callable[[], dict[str, torch.Tensor]]], list[dict[str, torch.Tensor]]],
    counts: Sequence[int] = (2, 3),
    tolerance: float = 1e-9,
) -> None:
    """Several processes train to the weights of one, all of them to the same.

    Args:
        train: trains in this process, or its part in one of several; the weights at the end.
        together: runs a function in several processes.
        counts: of processes.
        tolerance: relative to the largest weight of each tensor; sums are in another order.
    """
    alone = train()
    assert any(float(value.abs().max()) > 0 for value in alone.values())
    for count in counts:
        found = together(count, train)
        assert all(isinstance(one, dict) for one in found), f"{count} processes ended with {found}"
        for name, value in alone.items():
            scale = float(value.abs().max()) + 1e-12
            for rank, one in enumerate(found):
                difference = float((one[name] - value).abs().max()) / scale
                assert difference < tolerance, (count, rank, name, difference)
        for one in found[1:]:
            assert_same_weights(one, found[0])
