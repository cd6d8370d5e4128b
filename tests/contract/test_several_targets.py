"""The laws of adapters, on adapters of several targets: energies and a property, known or new."""

from __future__ import annotations

import copy
from pathlib import Path

import laws
import pytest
import torch
from torch import Tensor

from models import METHODS, QUANTISED, all_structures, random_potential, trained_adapter
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.at_rest import capture, install
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.combine import combine
from pet_finetune.adapters.inject import (
    adapter_state,
    eject,
    inject,
    merge,
    merged_copy,
    unmerge,
)
from pet_finetune.adapters.peft_files import load_adapter, save_adapter
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

FRAMES = list(all_structures().values())
TARGETS = ("energy", "energy/pbe", "charges")
BROUGHT = {"inherited": {"energy/pbe": "energy"}, "brought_targets": TARGETS[1:]}
CONFIGS = {name: {**METHODS, **QUANTISED}[name] for name in ("lora", "dora", "prompt", "qlora 8")}

Said = dict[str, list[Tensor]]


def said(model: Potential, targets: tuple[str, ...] = TARGETS) -> Said:
    """All that a model says of each target."""
    batch = batch_from_atoms(FRAMES, model.cutoff, model.dtype)
    wanted = dict.fromkeys(targets, (True, True))
    return {
        name: [value.detach() for value in vars(found).values() if isinstance(value, Tensor)]
        for name, found in model.predict_targets(batch, wanted).items()
    }


def assert_same(one: Said, other: Said, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        for a, b in zip(values, other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def assert_all_differ(one: Said, other: Said) -> None:
    assert all((values[0] - other[name][0]).abs().max() > 1e-5 for name, values in one.items())


@pytest.fixture
def base() -> Potential:
    return random_potential(num_attention_layers=2, zbl=True)


@pytest.fixture
def grown(base: Potential) -> Potential:
    """The base with the targets that the adapter brings."""
    model = copy.deepcopy(base)
    model.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    model.add_target(TargetSpec("charges", "charge", "e", per_atom=True))
    return model.eval()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> AdapterConfig:
    return AdapterConfig(**{"rank": 2, "alpha": 3.0, **CONFIGS[request.param], "targets": TARGETS})


@pytest.fixture
def start(grown: Potential, base: Potential, config: AdapterConfig) -> Potential:
    """What the adapter starts from, as a model: the base, rounded where it is quantised."""
    model = copy.deepcopy(grown)
    inject(model, config, fingerprint=weights_fingerprint(base), **BROUGHT)
    return model


@pytest.fixture
def tuned(start: Potential) -> Potential:
    """With another baseline and scale for each target, and all that trains moved."""
    return moved(copy.deepcopy(start), seed=1)


def moved(model: Potential, seed: int) -> Potential:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    for name in TARGETS:
        baselines = model.composition.get(name)
        model.composition.set(name, baselines + torch.randn(len(baselines), dtype=torch.float64))
        model.scale.set(name, (1.0 + 0.1 * len(name)) * model.scale.get(name))
    return model.eval()


def tolerance(config: AdapterConfig) -> float:
    return 0.0 if config.quant_bits is None else 1e-10


def test_injection_is_the_identity(grown: Potential, start: Potential, config: AdapterConfig):
    if config.quant_bits is None:
        assert_same(said(start), said(grown))
        assert_all_differ(said(moved(start, seed=1)), said(grown))


def test_exactly_the_heads_of_all_targets_train_beside_it(
    tuned: Potential, grown: Potential, config: AdapterConfig
):
    laws.only_what_is_stated_trains(tuned, grown, config)


def test_of_several_energies_one_alone_can_train(grown: Potential):
    """The negative of the law before: heads that are not named stay."""
    config = AdapterConfig(rank=2, targets=["energy/pbe"])
    adapted = trained_adapter(copy.deepcopy(grown), **vars(config))
    laws.only_what_is_stated_trains(adapted, grown, config)
    with pytest.raises(AssertionError):
        laws.only_what_is_stated_trains(adapted, grown, AdapterConfig(rank=2, targets=TARGETS))


def test_merged_equals_unmerged(tuned: Potential, start: Potential, config: AdapterConfig):
    expected = said(tuned)
    assert_all_differ(expected, said(start))
    merge(tuned)
    assert_same(said(tuned), expected, tolerance(config))
    unmerge(tuned)
    assert_same(said(tuned), expected)
    assert_same(said(merged_copy(tuned)), expected, tolerance(config))


def test_ejected_is_the_base(tuned: Potential, base: Potential, config: AdapterConfig):
    if config.quant_bits is not None:
        return
    eject(tuned)
    assert tuned.targets == base.targets
    laws.assert_same_weights(tuned.state_dict(), base.state_dict())
    assert_same(said(tuned, ("energy",)), said(base, ("energy",)))


def test_an_adapter_folder_holds_all_of_it(
    tuned: Potential, base: Potential, config: AdapterConfig, tmp_path: Path
):
    save_adapter(tuned, tmp_path)
    model = copy.deepcopy(base)
    assert load_adapter(model, tmp_path).targets == TARGETS
    assert model.targets == tuned.targets
    assert_same(said(model.eval()), said(tuned))
    for one, other in zip(adapter_state(model).targets, adapter_state(tuned).targets, strict=True):
        assert one.inherited_from == other.inherited_from
    assert adapter_state(model).brought_targets == BROUGHT["brought_targets"]


def test_what_does_not_fit_leaves_the_base(tuned: Potential, base: Potential):
    adapter = capture(tuned)
    adapter.tensors.pop(next(name for name in adapter.tensors if "charges" in name))
    model = copy.deepcopy(base)
    with pytest.raises(AdapterError, match="tensors are missing"):
        install(model, adapter)
    assert model.adapter is None
    assert model.targets == base.targets
    laws.assert_same_weights(model.state_dict(), base.state_dict())


def test_checkpoints_hold_all_of_it(tuned: Potential, config: AdapterConfig, tmp_path: Path):
    """One to go on from keeps the adapter and the way back; one to use is plain."""
    last = save_checkpoint(tmp_path / "last.ckpt", tuned, training={})
    again = load_checkpoint(last, keep_adapter=True).model.eval()
    assert again.adapter.config == tuned.adapter.config
    assert_same(said(again), said(tuned))
    state, expected = adapter_state(again), adapter_state(tuned)
    assert state.brought_targets == expected.brought_targets
    for one, other in zip(state.targets, expected.targets, strict=True):
        assert (one.spec, one.scale) == (other.spec, other.scale)
        assert one.inherited_from == other.inherited_from
        assert torch.equal(one.composition, other.composition)
    best = load_checkpoint(save_checkpoint(tmp_path / "best.ckpt", tuned)).model
    assert_same(said(best), said(tuned), tolerance(config))


def test_a_checkpoint_that_knows_one_target_is_read_for_ever(tmp_path: Path):
    """Releases before wrote what the base has of the one target beside everything else."""
    model = trained_adapter(random_potential())
    path = save_checkpoint(tmp_path / "last.ckpt", model, training={})
    content = torch.load(path, weights_only=True)
    adapter = content["adapter"]
    (own,) = adapter.pop("targets").values()
    (adapter["config"]["target"],) = adapter["config"].pop("targets")
    adapter |= {**own, "scale": torch.tensor(own["scale"], dtype=torch.float64)}
    adapter["brought_target"] = bool(adapter.pop("brought_targets"))
    torch.save(content, path)
    again = load_checkpoint(path, keep_adapter=True).model
    assert again.adapter.config == model.adapter.config
    for one in (again, model):
        eject(one)
    assert_same(said(again, ("energy",)), said(model, ("energy",)))


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.6)], ids=str)
def test_a_blend_is_of_all_targets(base: Potential, weights: tuple[float, float]):
    model = copy.deepcopy(base)
    model.add_target(TargetSpec("energy/pbe"), inherit_from="energy")
    inherited, targets = {"energy/pbe": "energy"}, ("energy", "energy/pbe")
    config = AdapterConfig(rank=2, targets=targets)
    at_base = {name: model.composition.get(name) for name in targets}
    inject(
        model,
        config,
        fingerprint=weights_fingerprint(base),
        inherited=inherited,
        brought_targets=["energy/pbe"],
    )
    parts = []
    for seed, weight in enumerate(weights):
        one = trained_like(model, seed)
        parts.append((capture(one), weight))
    mixed = combine(parts, base=copy.deepcopy(base))
    assert [target.spec.name for target in mixed.targets] == ["energy", "energy/pbe"]
    left = 1.0 - sum(weights)
    for index, target in enumerate(mixed.targets):
        expected = left * at_base[target.spec.name]
        expected = expected + sum(w * part.targets[index].composition for part, w in parts)
        torch.testing.assert_close(target.composition, expected)
    again = copy.deepcopy(base)
    install(again, mixed)
    assert_all_differ(said(again.eval(), targets), said(model, targets))


def trained_like(model: Potential, seed: int) -> Potential:
    """The model with its adapter trained to somewhere, scales as they were."""
    torch.manual_seed(seed)
    one = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in one.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    for name in adapter_state(one).config.targets:
        one.composition.set(name, one.composition.get(name) + seed + len(name))
    return one


def test_adapters_of_other_targets_do_not_blend(grown: Potential):
    parts = [
        (capture(trained_adapter(copy.deepcopy(grown), targets=targets)), 0.5)
        for targets in (["energy"], ["energy", "energy/pbe"])
    ]
    with pytest.raises(AdapterError, match="list of targets of the one is"):
        combine(parts)


def test_an_adapter_of_nothing_is_refused(base: Potential):
    with pytest.raises(AdapterError, match="targets is empty"):
        inject(base, AdapterConfig(targets=()))
