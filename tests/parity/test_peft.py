"""Our adapters against Hugging Face's peft: the same mathematics and the same folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import METHODS, all_structures, random_potential, trained_adapter
from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.adapters.adapter_config import AdapterConfig, linear_layers
from pet_finetune.adapters.inject import adapter_state, inject, lora_layers, merged_copy
from pet_finetune.adapters.layers import is_adapter_tensor
from pet_finetune.adapters.peft_files import load_adapter, save_adapter
from pet_finetune.config.finetune import DEFAULT_TARGET_MODULES
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential

peft = pytest.importorskip("peft", reason="peft comes with the test extra")

#: float64; peft adds the update to the outputs, we add it to the weights.
TOLERANCE = 1e-12


@pytest.fixture
def base() -> Potential:
    return random_potential(num_attention_layers=2, targets=("energy", "energy/pbe"))


@pytest.fixture
def batch(base: Potential) -> Batch:
    return batch_from_atoms(list(all_structures().values()), base.cutoff)


def outputs(network: nn.Module, batch: Batch, target: str = "energy") -> Tensor:
    """Raw outputs of a network for each atom."""
    with torch.no_grad():
        return network.eval()(batch, (target,))[target]


def peft_model(base: Potential, **config: Any) -> nn.Module:
    """peft's own LoRA on a copy of the network."""
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, **config}
    model = peft.get_peft_model(copy.deepcopy(base.network), peft.LoraConfig(**options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def deviation(one: Tensor, other: Tensor) -> float:
    found = float((one - other).detach().abs().max())
    print(f"deviation {found:.1e}")
    return found


def test_the_same_factors_give_the_same_output(base: Potential, batch: Batch):
    ours = copy.deepcopy(base)
    config = inject(ours, AdapterConfig(rank=3, alpha=5.0, modules_to_save=[]))
    theirs = peft_model(base, target_modules=list(config.target_modules))
    wrapped = theirs.get_base_model()
    for path, layer in lora_layers(ours):
        factors = wrapped.get_submodule(path)
        with torch.no_grad():
            layer.lora_A.copy_(factors.lora_A["default"].weight)
            layer.lora_B.copy_(factors.lora_B["default"].weight)
    before = outputs(base.network, batch)
    assert (outputs(ours.network, batch) - before).abs().max() > 1e-3
    assert deviation(outputs(ours.network, batch), outputs(theirs, batch)) < TOLERANCE


def test_the_same_layers_and_counts_train(base: Potential):
    ours = copy.deepcopy(base)
    config = inject(ours, AdapterConfig(rank=3, alpha=5.0))
    theirs = peft_model(
        base,
        target_modules=list(DEFAULT_TARGET_MODULES),
        modules_to_save=list(config.modules_to_save or ()),
    )
    counts = [
        sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        for network in (ours.network, theirs)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "prompt"])
def test_peft_opens_every_method(base: Potential, batch: Batch, method: str, tmp_path: Path):
    """Outputs with the adapter beside the weights and merged into them.

    Prompts aside, which peft knows for a few language models only.
    """
    ours = trained_adapter(copy.deepcopy(base), **METHODS[method])
    save_adapter(ours, tmp_path / "adapter", "base.ckpt")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.network), tmp_path / "adapter")
    expected = outputs(ours.network, batch)
    assert deviation(outputs(theirs, batch), expected) < TOLERANCE
    merged = theirs.merge_and_unload()
    assert deviation(outputs(merged, batch), expected) < TOLERANCE
    for path in adapter_state(ours).config.target_modules:
        weight = merged.get_submodule(path).weight
        assert deviation(weight, merged_copy(ours).network.get_submodule(path).weight) < TOLERANCE


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "dora everywhere"])
def test_gradients_are_pefts(base: Potential, batch: Batch, method: str, tmp_path: Path):
    """DoRA's norm counts as a constant in both."""
    ours = trained_adapter(copy.deepcopy(base), **METHODS[method])
    save_adapter(ours, tmp_path / "adapter", "base.ckpt")
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(base.network), tmp_path / "adapter", is_trainable=True
    ).eval()
    for network in (ours.network, theirs):
        network(batch, ("energy",))["energy"].square().sum().backward()
    found = dict(theirs.get_base_model().named_parameters())
    compared = 0
    for name, parameter in ours.network.named_parameters():
        if is_adapter_tensor(name):
            gradient = found[f"{name}.default.weight"].grad
            assert deviation(parameter.grad, gradient) < 1e-10 * float(gradient.abs().max() + 1)
            compared += 1
    assert compared >= 16


@pytest.mark.parametrize("targets", [("energy",), ("energy", "energy/pbe")], ids=["one", "two"])
@pytest.mark.parametrize("layers", [DEFAULT_TARGET_MODULES, "all-linear"], ids=["default", "all"])
def test_peft_opens_our_folder(
    base: Potential,
    batch: Batch,
    targets: tuple[str, ...],
    layers: str | tuple[str, ...],
    tmp_path: Path,
):
    ours = trained_adapter(copy.deepcopy(base), targets=targets, target_modules=layers)
    save_adapter(ours, tmp_path / "adapter", "base.ckpt")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.network), tmp_path / "adapter")
    all_expected = {target: outputs(ours.network, batch, target) for target in targets}
    for target, expected in all_expected.items():
        assert deviation(outputs(theirs, batch, target), expected) < TOLERANCE
        assert (expected - outputs(base.network, batch, target)).abs().max() > 1e-3
    merged = theirs.merge_and_unload()
    for target, expected in all_expected.items():
        assert deviation(outputs(merged, batch, target), expected) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["attention.input_linear", "mlp.w_out"]},
        {"target_modules": r".*gnn_layers\.1\..*(input_linear|w_in)"},
        {
            "target_modules": ["attention.input_linear", "compress.0"],
            "modules_to_save": ["node_heads.energy.0", "edge_last_layers.energy.0.energy___0"],
            "r": 2,
            "lora_alpha": 7,
            "lora_dropout": 0.25,
        },
        {
            "target_modules": ["attention.input_linear", "mlp.w_in"],
            "use_rslora": True,
            "rank_pattern": {"w_in": 5, r"gnn_layers\.1\..*input_linear": 2},
            "alpha_pattern": {"input_linear": 9},
        },
        {"target_modules": ["attention.output_linear", "compress.2"], "use_dora": True},
    ],
    ids=["suffixes", "regex", "modules_to_save", "rslora", "dora"],
)
def test_we_open_pefts_folder(base: Potential, batch: Batch, config: dict[str, Any], tmp_path):
    theirs = peft_model(base, **config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = copy.deepcopy(base)
    resolved = load_adapter(ours, tmp_path / "adapter")
    expected = outputs(theirs, batch)
    assert deviation(outputs(ours.network, batch), expected) < TOLERANCE
    assert (expected - outputs(base.network, batch)).abs().max() > 1e-3
    assert (resolved.rank, resolved.alpha) == (config.get("r", 3), config.get("lora_alpha", 5))
    assert resolved.dropout == config.get("lora_dropout", 0.0)
    assert sorted(resolved.modules_to_save) == sorted(config.get("modules_to_save", ()))


def test_a_folder_goes_there_and_back(base: Potential, batch: Batch, tmp_path: Path):
    """Ours, opened and saved by peft, opened by us: the same tensors."""
    ours = trained_adapter(copy.deepcopy(base))
    save_adapter(ours, tmp_path / "ours", "base.ckpt")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.network), tmp_path / "ours")
    # Without the second argument peft looks for the base on the network.
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    back = copy.deepcopy(base)
    load_adapter(back, tmp_path / "theirs")
    assert torch.equal(outputs(back.network, batch), outputs(ours.network, batch))
    for name, value in ours.network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], value), name
    assert adapter_state(back).config.target_modules == adapter_state(ours).config.target_modules


def test_pefts_shortened_lists_of_many_layers_are_understood(
    base: Potential, batch: Batch, tmp_path: Path
):
    """From 20 layers on peft keeps the shortest endings that mean the same layers."""
    layers = linear_layers(base.network)
    theirs = peft_model(base, target_modules=list(layers))
    theirs.save_pretrained(tmp_path / "adapter")
    kept = theirs.peft_config["default"].target_modules
    assert len(kept) < len(layers)
    ours = copy.deepcopy(base)
    resolved = load_adapter(ours, tmp_path / "adapter")
    assert list(resolved.target_modules) == layers
    assert deviation(outputs(ours.network, batch), outputs(theirs, batch)) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"lora_bias": True}, "lora_bias|does not fit"),
        (
            {"layers_to_transform": [0], "layers_pattern": "gnn_layers"},
            "layers_to_transform|not fit",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_would_mean_something_else_is_refused(
    base: Potential, config: dict[str, Any], message: str, tmp_path: Path
):
    base = base.float()  # peft's PiSSA asks for it
    theirs = peft_model(base, target_modules=["attention.input_linear", "mlp.w_in"], **config)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=message):
        load_adapter(copy.deepcopy(base), tmp_path / "adapter")


def test_other_methods_of_peft_are_refused(base: Potential, tmp_path: Path):
    config = peft.IA3Config(target_modules=["mlp.w_out"], feedforward_modules=[])
    peft.get_peft_model(copy.deepcopy(base.network), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="IA3 adapter"):
        load_adapter(copy.deepcopy(base), tmp_path / "adapter")


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, -0.4)], ids=str)
def test_blends_are_pefts(
    base: Potential, batch: Batch, combination: str, weights: tuple[float, float], tmp_path: Path
):
    """peft blends the factors alone (hence no heads here), with weights in single precision."""
    folders = []
    for seed in (1, 2):
        one = trained_adapter(copy.deepcopy(base), seed=seed, modules_to_save=[])
        folders.append(save_adapter(one, tmp_path / f"a{seed}", "base.ckpt"))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.network), folders[0], "a1")
    theirs.load_adapter(folders[1], "a2")
    theirs.add_weighted_adapter(["a1", "a2"], list(weights), "mix", combination_type=combination)
    theirs.set_adapter("mix")
    ours = AdaptedPotential(copy.deepcopy(base))
    for folder in folders:
        ours.load_adapter(folder, name=folder.name)
    ours.add_weighted_adapter(dict(zip(("a1", "a2"), weights, strict=True)), "mix", combination)
    ours.set_adapter("mix")
    found = outputs(ours.potential.network, batch)
    assert deviation(found, outputs(theirs, batch)) < 1e-6
    assert (found - outputs(base.network, batch)).abs().max() > 1e-3
