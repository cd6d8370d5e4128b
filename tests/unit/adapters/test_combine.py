"""Blending adapters: exact sums, approximations, and what cannot be blended."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from models import random_potential, trained_adapter
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.at_rest import Adapter, capture, install
from pet_finetune.adapters.combine import combine
from pet_finetune.adapters.inject import inject, merged_copy
from pet_finetune.errors import AdapterError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential


@pytest.fixture(scope="module")
def base() -> Potential:
    return random_potential()


def adapter(base: Potential, seed: int, **config) -> Adapter:
    return replace(
        capture(trained_adapter(copy.deepcopy(base), seed=seed, **config)), name=f"a{seed}"
    )


def weights(base: Potential, one: Adapter) -> dict[str, torch.Tensor]:
    """The network's weights with an adapter merged."""
    model = copy.deepcopy(base)
    install(model, one)
    return dict(merged_copy(model).network.named_parameters())


DIFFERENT = [{"rank": 2}, {"rank": 3, "use_rslora": True}, {"rank_pattern": {"mlp.w_in": 1}}]


@pytest.mark.parametrize("factors", [(0.5, 0.2, 0.3), (1.0, 1.0, -0.5)], ids=str)
def test_cat_is_the_exact_sum_of_the_changes(base: Potential, factors):
    parts = [adapter(base, seed, **config) for seed, config in enumerate(DIFFERENT)]
    mixed = combine(list(zip(parts, factors, strict=True)), "cat", base=copy.deepcopy(base))
    start = dict(base.network.named_parameters())
    ends = [weights(base, one) for one in parts]
    for name, value in weights(base, mixed).items():
        changes = (w * (end[name] - start[name]) for w, end in zip(factors, ends, strict=True))
        torch.testing.assert_close(value, start[name] + sum(changes), msg=name)
    left = 1.0 - sum(factors)
    expected = left * base.composition.get("energy")
    expected = expected + sum(
        w * one.targets[0].composition for w, one in zip(factors, parts, strict=True)
    )
    torch.testing.assert_close(mixed.targets[0].composition, expected)


def test_svd_of_enough_rank_is_exact_and_of_less_the_nearest(base: Potential):
    parts = [(adapter(base, 1), 0.4), (adapter(base, 2), 0.6)]
    exact = weights(base, combine(parts, "cat"))
    path = "gnn_layers.0.trans.layers.0.mlp.w_in.weight"
    change = exact[path] - base.network.state_dict()[path]
    for rank, name in ((4, "exact"), (1, "nearest")):
        found = weights(base, combine(parts, "svd", rank=rank))
        difference = torch.linalg.matrix_norm(found[path] - exact[path])
        smallest = torch.linalg.svdvals(change)[rank:].square().sum().sqrt()
        assert float(difference) == pytest.approx(float(smallest), abs=1e-12), name
    default = combine(parts, "svd")
    assert default.config.rank == 2


def test_linear_of_one_adapter_is_that_adapter(base: Potential):
    one = adapter(base, 1)
    found = weights(base, combine([(one, 1.0)], "linear"))
    for name, value in weights(base, one).items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize(
    ("change", "combination", "message"),
    [
        ({"rank": 3}, "linear", r"are 2 in 'a1' and 3 in 'a2'\. Use cat or svd"),
        ({"target_modules": ["mlp.w_in"]}, "linear", "2 in 'a1' and 0 in 'a2'"),
        ({"modules_to_save": ["node_heads.energy.0"]}, "cat", "bring different heads"),
        ({"use_dora": True}, "cat", "'a2' is a DoRA adapter"),
        ({}, "cats", "Did you mean 'cat'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_go_together(base: Potential, change, combination: str, message: str):
    parts = [(adapter(base, 1), 0.5), (adapter(base, 2, **change), 0.5)]
    with pytest.raises(AdapterError, match=message):
        combine(parts, combination)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "f" * 64}, "the base of the one is"),
        ({"scale": 9.0}, "the scale of 'energy' of the one is"),
        (
            {"inherited_from": "energy/b"},
            "start of the heads of 'energy' of the one is None, that of",
        ),
    ],
)
def test_adapters_of_different_origin(base: Potential, change, message: str):
    one = adapter(base, 1)
    if "fingerprint" not in change:
        change = {"targets": (replace(one.targets[0], **change),)}
    with pytest.raises(AdapterError, match=message):
        combine([(one, 0.5), (replace(one, name="b", **change), 0.5)])


@pytest.mark.parametrize("inherited", [None, "energy"])
def test_heads_that_began_at_random_do_not_blend(base: Potential, inherited):
    parts, source = [], {"energy/b": inherited} if inherited else {}
    for seed in (1, 2):
        model = copy.deepcopy(base)
        model.add_target(TargetSpec("energy/b"), inherit_from=inherited)
        inject(model, AdapterConfig(targets=["energy/b"]), inherited=source)
        own = replace(capture(model), fingerprint=None, name=f"a{seed}")
        parts.append((own, 0.5))
    if inherited is None:
        with pytest.raises(AdapterError, match="'a1' and 'a2'.*began at random.*inherit_heads"):
            combine(parts, base=base)
        assert combine(parts[:1], base=base).config.targets == ("energy/b",)
    else:
        assert combine(parts, base=base).config.targets == ("energy/b",)


def test_weights_that_do_not_sum_to_one_need_the_base(base: Potential):
    with pytest.raises(AdapterError, match="do not sum to 1"):
        combine([(adapter(base, 1), 0.7)])


@pytest.mark.parametrize(
    ("parts", "rank", "message"),
    [(0, None, "nothing to combine"), (1, 3, "can be chosen for svd alone")],
)
def test_requests_that_make_no_sense(base: Potential, parts: int, rank, message: str):
    with pytest.raises(AdapterError, match=message):
        combine([(adapter(base, 1), 1.0)] * parts, "cat", rank=rank)
