"""A base in few bits under an adapter: forces, gradients and memory, beside the dense model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from laws import (
    assert_agree,
    assert_close,
    assert_same,
    forces_are_finite_differences,
    predict,
)

from models import crystal, ethanol, random_potential, trained_adapter
from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.at_rest import capture
from pet_finetune.adapters.base_weights import quantize_base
from pet_finetune.adapters.combine import combine
from pet_finetune.adapters.inject import inject, merge, merged_copy, trainable_report
from pet_finetune.adapters.layers import LoraLinear
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError
from pet_finetune.nn.quantized import QuantizedLinear, QuantizedWeight, held_bytes

pytest.importorskip("bitsandbytes")

FRAMES = [ethanol(), crystal()]
WIDE = {"d_pet": 64, "d_node": 128, "d_head": 32, "d_feedforward": 64, "num_heads": 4}


@pytest.fixture(params=[4, 8])
def bits(request):
    return request.param


def dense_twin(model):
    """The same adapters over the dequantised weights, as plain layers."""
    twin = copy.deepcopy(model)
    for module in list(twin.network.modules()):
        if isinstance(module, LoraLinear) and module.quantized is not None:
            weight = module.base_weight()
            module.quantized = None
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    for path, module in list(twin.network.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = module.to_linear(twin.dtype).requires_grad_(False)
            parent, _, name = path.rpartition(".")
            twin.network.get_submodule(parent)._modules[name] = plain
    assert not any(isinstance(m, QuantizedWeight) for m in twin.network.modules())
    return twin


def force_loss_gradients(model):
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff, model.dtype)
    found = model.predict(batch, stress=True, create_graph=True)
    loss = found.energy.sum() + found.forces.pow(2).sum() + found.stress.pow(2).sum()
    trained = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"use_rslora": True}, {"dropout": 0.5}])
def test_a_force_loss_has_the_gradients_of_the_dequantised_model(bits, method):
    """Through the energy's own derivative: each quantised product is differentiated twice."""
    model = trained_adapter(random_potential(), quant_bits=bits, **method)
    model.train()
    torch.manual_seed(3)
    found = force_loss_gradients(model)
    torch.manual_seed(3)
    expected = force_loss_gradients(dense_twin(model))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name] / size, value / size, rtol=0, atol=1e-11, msg=name)
    assert max(float(v.abs().max()) for n, v in found.items() if "lora_B" in n) > 1e-3


def test_a_model_that_is_not_rounded_is_told_apart(bits):
    """The bounds are far below what rounding changes: of the twin they ask the rounded weights."""
    found = force_loss_gradients(trained_adapter(random_potential(), quant_bits=bits))
    exact = force_loss_gradients(trained_adapter(random_potential()))
    same = found.keys() & exact.keys()
    assert max(float((found[n] - exact[n]).abs().max()) for n in same) > 1e-4


def test_forces_are_finite_differences_at_any_width(bits):
    model = trained_adapter(random_potential(**WIDE), quant_bits=bits)
    forces_are_finite_differences(model, crystal())


def test_frozen_layers_and_no_others_are_quantised():
    model = random_potential()
    config = AdapterConfig(
        target_modules=["attention.input_linear"],
        modules_to_save=["node_heads.energy", "gnn_layers.0.compress"],
        quant_bits=4,
    )
    inject(model, config)
    small = {
        name.removesuffix(".quantized")
        for name, module in model.network.named_modules()
        if isinstance(module, QuantizedWeight)
    }
    beginning = "gnn_layers.0.trans.layers.0"
    assert {f"{beginning}.attention.input_linear", f"{beginning}.mlp.w_in"} <= small
    assert {f"{beginning}.center_mlp.w_out", "gnn_layers.1.compress.0"} <= small
    assert not any(name.startswith(("gnn_layers.0.compress", "node_heads")) for name in small)
    assert not any(name.endswith("edge_embedder") for name in small)


def test_memory_shrinks_and_the_count_of_parameters_stays(bits):
    model = random_potential(dtype=torch.float32, **WIDE)
    before, numbers = held_bytes(model.network), model.num_parameters()
    inject(model, AdapterConfig(rank=2, quant_bits=bits, modules_to_save=[]))
    added = trainable_report(model).trainable
    assert model.num_parameters() == trainable_report(model).total == numbers + added
    assert held_bytes(model.network) - 4 * added < {4: 0.26, 8: 0.36}[bits] * before
    floats = [p for p in model.network.parameters() if p.numel() > 64 * 64]
    assert len(floats) == 0


def test_the_report_names_bytes(bits):
    model = random_potential(**WIDE)
    inject(model, AdapterConfig())
    config = AdapterConfig(quant_bits=bits, target_modules=(), modules_to_save=())
    report = quantize_base(model, config)
    assert report.before > report.after == held_bytes(model.network)
    assert f"held in {bits} bits: the network takes" in str(report)


def test_merging_in_place_holds_floats_and_unmerging_gives_them_up(bits):
    model = trained_adapter(random_potential(), quant_bits=bits)
    before = held_bytes(model.network)
    merge(model)
    merge(model)
    assert held_bytes(model.network) > before
    plain = merged_copy(model)
    assert not any(isinstance(m, (QuantizedWeight, LoraLinear)) for m in plain.network.modules())
    for module in model.network.modules():
        if isinstance(module, LoraLinear):
            module.unmerge()
    assert held_bytes(model.network) == before


def test_bits_that_there_are_not():
    with pytest.raises(AdapterError, match="quant_bits is 4 or 8, got 3"):
        inject(random_potential(), AdapterConfig(quant_bits=3))
    with pytest.raises(AdapterError, match="not with prompts"):
        inject(random_potential(), AdapterConfig(quant_bits=4, num_prompts=2))


def test_switching_from_a_quantised_adapter_gives_the_base_back(bits, tmp_path):
    """A model that predicts rounds the weights as floats, so that others can be put on after it."""
    base = random_potential()
    tuned = {
        "small": trained_adapter(copy.deepcopy(base), quant_bits=bits, target_modules="all-linear"),
        "plain": trained_adapter(copy.deepcopy(base), seed=2),
        "prompt": trained_adapter(copy.deepcopy(base), seed=3, num_prompts=2),
    }
    model = AdaptedPotential(copy.deepcopy(base))
    for name, one in tuned.items():
        model.load_adapter(save_adapter(one, tmp_path / name), name)
    for name in ("plain", "small", "prompt", "small", "plain"):
        model.set_adapter(name)
        tolerance = 1e-10 if name == "small" else 0.0
        assert_agree(predict(model.potential, FRAMES), predict(tuned[name], FRAMES), tolerance)
    model.set_adapter("small")
    model.disable_adapters()
    assert_same(predict(model.potential, FRAMES), predict(base, FRAMES))
    carried = AdaptedPotential(tuned["small"])
    assert_close(predict(carried.potential, FRAMES), predict(tuned["small"], FRAMES), 1e-10)


def test_blends_are_of_one_kind_of_base(bits):
    base = random_potential()
    small = [
        replace(
            capture(trained_adapter(copy.deepcopy(base), seed=seed, quant_bits=bits)), name="small"
        )
        for seed in (1, 2)
    ]
    mixed = combine([(one, 0.4) for one in small], base=copy.deepcopy(base))
    assert mixed.config.quant_bits == bits
    plain = replace(capture(trained_adapter(copy.deepcopy(base))), name="plain")
    with pytest.raises(AdapterError, match="number of bits of the base"):
        combine([(small[0], 0.5), (plain, 0.5)])
    prompt = replace(capture(trained_adapter(copy.deepcopy(base), num_prompts=2)), name="prompt")
    with pytest.raises(AdapterError, match="'prompt' holds prompts"):
        combine([(prompt, 1.0)])
