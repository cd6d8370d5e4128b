"""Each law is shown what it must reject: something that does nothing, and a fault of its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from ase import Atoms

from laws_of_species import assert_same_energies
from models import apart, crystal, ethanol, lone_atom, random_potential, trained_adapter
from pet_finetune.adapters import layers
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction

FRAMES = [ethanol(), crystal()]


# Physics ----------------------------------------------------------------------------------------


@dataclass
class Faulty:
    """A potential whose predictions go through a function."""

    model: Potential
    change: Callable[[Batch, Prediction], Prediction]

    def __post_init__(self) -> None:
        self.cutoff, self.dtype = self.model.cutoff, self.model.dtype

    def predict(self, batch: Batch, *args: Any, **options: Any) -> Prediction:
        return self.change(batch, self.model.predict(batch, *args, **options))


def constant(batch: Batch, found: Prediction) -> Prediction:
    """One energy for everything, and no force."""
    parts = (None if p is None else torch.zeros_like(p) for p in (found.forces, found.stress))
    return Prediction(torch.ones_like(found.energy), torch.zeros_like(found.atom_energies), *parts)


def off_by(name: str, change: Callable[[Batch, torch.Tensor], torch.Tensor]):
    """A fault in one of the quantities."""

    def changed(batch: Batch, found: Prediction) -> Prediction:
        value = getattr(found, name)
        return found if value is None else replace(found, **{name: change(batch, value)})

    return changed


def a_little_more(batch: Batch, value: torch.Tensor) -> torch.Tensor:
    return value * (1 + 1e-4)


def by_the_batch(batch: Batch, value: torch.Tensor) -> torch.Tensor:
    return value + 1e-9 * batch.num_structures


def everywhere(batch: Batch, value: torch.Tensor) -> torch.Tensor:
    return value + 1e-9


def by_the_place(batch: Batch, value: torch.Tensor) -> torch.Tensor:
    return value + 1e-9 * torch.arange(len(value)).view(-1, *[1] * (value.dim() - 1))


def skewed(batch: Batch, value: torch.Tensor) -> torch.Tensor:
    return value + 1e-12 * torch.arange(9.0, dtype=value.dtype).view(3, 3)


PHYSICS: dict[str, tuple[Callable[[Any], Any], Callable[[Batch, Prediction], Prediction]]] = {
    "forces": (
        lambda model: laws.forces_are_finite_differences(model, ethanol()),
        off_by("forces", a_little_more),
    ),
    "stress": (
        lambda model: laws.stress_is_finite_differences(model, crystal()),
        off_by("stress", a_little_more),
    ),
    "symmetric stress": (
        lambda model: laws.stress_is_finite_differences(model, crystal()),
        off_by("stress", skewed),
    ),
    "alone": (
        lambda model: laws.alone_equals_in_a_batch(model, FRAMES),
        off_by("energy", by_the_batch),
    ),
    "no neighbours": (
        lambda model: laws.atoms_without_neighbors_work(model, lone_atom(), apart()),
        off_by("forces", everywhere),
    ),
    "extensive": (
        lambda model: laws.energy_is_extensive(model, ethanol()),
        off_by("energy", everywhere),
    ),
    "permutation": (
        lambda model: laws.permutation_changes_nothing(model, ethanol()),
        off_by("atom_energies", by_the_place),
    ),
}


@pytest.mark.parametrize("law", PHYSICS)
def test_a_law_of_physics_finds_its_fault(law: str):
    obeys, fault = PHYSICS[law]
    model = random_potential()
    obeys(Faulty(model, lambda batch, found: found))
    with pytest.raises(AssertionError):
        obeys(Faulty(model, fault))


def test_a_sum_in_another_order_is_no_fault():
    """The tolerances leave room for what rounding does in float64."""
    rounding = 1 + 2.0**-51
    model = Faulty(random_potential(), off_by("forces", lambda batch, value: value * rounding))
    for obeys, _ in PHYSICS.values():
        obeys(model)


LAWS_OF_MODELS: dict[str, Callable[[Any], Any]] = {
    **{name: obeys for name, (obeys, _) in PHYSICS.items()},
    "translation": lambda model: laws.translation_changes_nothing(model, ethanol()),
    "periodic images": lambda model: laws.periodic_images_change_nothing(model, crystal()),
}


@pytest.mark.parametrize("law", LAWS_OF_MODELS)
def test_a_constant_model_obeys_no_law(law: str):
    with pytest.raises(AssertionError):
        LAWS_OF_MODELS[law](Faulty(random_potential(), constant))


@pytest.mark.parametrize("law", ["translation", "periodic images"])
def test_positions_in_single_precision_are_found(law: str, monkeypatch: pytest.MonkeyPatch):
    """What depends on where the origin lies."""
    made = laws.batch_from_atoms

    def rounded(frames: list[Atoms], *args: Any) -> Batch:
        copies = [frame.copy() for frame in frames]
        for frame in copies:
            frame.positions = frame.positions.astype("float32")
        return made(copies, *args)

    model = random_potential()
    LAWS_OF_MODELS[law](model)
    monkeypatch.setattr(laws, "batch_from_atoms", rounded)
    with pytest.raises(AssertionError):
        LAWS_OF_MODELS[law](model)


# Adapters ---------------------------------------------------------------------------------------


@pytest.fixture
def base() -> Potential:
    return random_potential()


@pytest.fixture
def adapted(base: Potential) -> Potential:
    return trained_adapter(copy.deepcopy(base))


def nothing(*args: Any, **options: Any) -> None:
    """Instead of whatever it replaces."""


def as_it_is(model: Potential, *args: Any, **options: Any) -> Potential:
    return model


def adds_up(model: Potential) -> None:
    """A merge that does not notice that it was done already."""
    with torch.no_grad():
        for module in model.network.modules():
            if isinstance(module, layers.LoraLinear):
                module.weight += module.delta()


def subtracts(model: Potential) -> None:
    """An unmerging that takes the update off again, with its rounding errors."""
    with torch.no_grad():
        for module in model.network.modules():
            if isinstance(module, layers.LoraLinear) and module.merged:
                base = module.weight - module.delta()
                module.unmerge()
                module.weight.copy_(base)


def half_injected(model: Potential, config: AdapterConfig) -> None:
    """An adapter in a state that moves the predictions already."""
    inject(model, config)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith("lora_B"):
                parameter += 1e-12


@pytest.mark.parametrize("fault", [nothing, half_injected])
def test_injection(fault, base: Potential, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(laws, "inject", fault)
    with pytest.raises(AssertionError):
        laws.injection_is_the_identity(base, FRAMES, AdapterConfig())


@pytest.mark.parametrize(
    ("name", "fault"),
    [("merge", nothing), ("unmerge", nothing), ("merged_copy", as_it_is), ("merge", adds_up)],
)
def test_merging(name, fault, base: Potential, adapted: Potential, monkeypatch):
    monkeypatch.setattr(laws, name, fault)
    with pytest.raises(AssertionError):
        laws.merged_equals_unmerged(adapted, base, FRAMES)


def test_merging_what_was_never_trained(base: Potential):
    adapted = copy.deepcopy(base)
    inject(adapted, AdapterConfig())
    with pytest.raises(AssertionError):
        laws.merged_equals_unmerged(adapted, base, FRAMES)


@pytest.mark.parametrize(
    "faults", [{"merge": nothing}, {"unmerge": nothing}, {"merge": adds_up}, {"unmerge": subtracts},
               {"merge": nothing, "unmerge": nothing}]
)  # fmt: skip
def test_unmerging(faults, base: Potential, adapted: Potential, monkeypatch):
    for name, fault in faults.items():
        monkeypatch.setattr(laws, name, fault)
    with pytest.raises(AssertionError):
        laws.unmerging_returns_the_base(adapted, base)


def forgets_the_adapter(model: Potential) -> None:
    """Its layers stay where they are."""
    model.adapter = None


@pytest.mark.parametrize("fault", [nothing, forgets_the_adapter])
def test_ejecting(fault, base: Potential, adapted: Potential, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(laws, "eject", fault)
    with pytest.raises(AssertionError):
        laws.ejected_is_the_base(adapted, base, FRAMES)


TOO_LITTLE = "gnn_layers.0.trans.layers.0.mlp.w_in.lora_B"
TOO_MUCH = "gnn_layers.0.trans.layers.0.norm_mlp.weight"
OTHER_HEADS = "node_heads.energy/b.0.0.weight"


@pytest.mark.parametrize(
    "wrong", [{TOO_LITTLE: False}, {TOO_MUCH: True}, {TOO_LITTLE: False, TOO_MUCH: True},
              {OTHER_HEADS: True}, {"node_heads.energy.0.0.weight": False}], ids=str
)  # fmt: skip
def test_what_trains(wrong: dict[str, bool]):
    """One tensor more, one less, or another: the number alone does not tell."""
    base = random_potential(targets=("energy", "energy/b"))
    adapted = trained_adapter(copy.deepcopy(base))
    laws.only_what_is_stated_trains(adapted, base, AdapterConfig())
    for name, trains in wrong.items():
        adapted.network.get_parameter(name).requires_grad_(trains)
    with pytest.raises(AssertionError):
        laws.only_what_is_stated_trains(adapted, base, AdapterConfig())


# Files ------------------------------------------------------------------------------------------


def flipped(model: Potential) -> Potential:
    """One weight in its last bit."""
    with torch.no_grad():
        weight = next(iter(model.network.parameters())).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0, dtype=weight.dtype))
    return model


@pytest.mark.parametrize("law", ["saving", "resuming"])
def test_a_bit_lost_in_a_checkpoint(
    law: str, adapted: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load = laws.load_checkpoint

    def damaged(*args: Any, **options: Any) -> Any:
        opened = load(*args, **options)
        return replace(opened, model=flipped(opened.model))

    monkeypatch.setattr(laws, "load_checkpoint", damaged)
    keeps = {"saving": laws.saving_loses_nothing, "resuming": laws.resuming_loses_nothing}[law]
    with pytest.raises(AssertionError):
        keeps(adapted, FRAMES, tmp_path)


def test_an_adapter_that_is_not_loaded(
    base: Potential, adapted: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(laws, "load_adapter", nothing)
    with pytest.raises(AssertionError):
        laws.saving_an_adapter_loses_nothing(adapted, base, FRAMES, tmp_path)


def test_a_save_in_place(base: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It overwrites what was there before it fails."""
    save, errors = laws.save_checkpoint, []

    def in_place(path: Path, model: Potential) -> Path:
        if errors:
            path.write_bytes(b"half a file")
            raise laws.CheckpointError("full") from errors[-1]
        return save(path, model)

    monkeypatch.setattr(laws, "save_checkpoint", in_place)
    with pytest.raises(AssertionError):
        laws.an_interrupted_save_leaves_the_old_file(base, base, tmp_path, errors.append)


# Elements ---------------------------------------------------------------------------------------


def test_an_embedding_that_changed_when_elements_came(base: Potential):
    grown = copy.deepcopy(base)
    grown.add_species([7], {7: 6})
    assert_same_energies(base, grown, FRAMES)
    next(grown.network.parameters()).data.mul_(1.001)
    with pytest.raises(AssertionError):
        assert_same_energies(base, grown, FRAMES)
