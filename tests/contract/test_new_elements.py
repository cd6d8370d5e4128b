"""The laws of adapters on adapters that bring elements which their base lacks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from ase import Atoms

from models import all_structures, crystal, ethanol, random_potential
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.at_rest import capture
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.combine import combine
from pet_finetune.adapters.inject import inject
from pet_finetune.adapters.layers import grown_tables
from pet_finetune.adapters.peft_files import load_adapter, save_adapter
from pet_finetune.errors import AdapterError
from pet_finetune.model.potential import Potential

KNOWN = list(all_structures().values())
NEW = Atoms("NCLiH", [[0, 0, 0], [0, 0.3, 1.2], [1.5, 0, 0], [0, -1.0, 0.2]])
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "embeddings too": {"modules_to_save": ["edge_embedder", "node_last_layers.energy"]},
}


@pytest.fixture
def base() -> Potential:
    return random_potential(num_neighbors_adaptive=4.0, zbl=True)


@pytest.fixture
def grown(base: Potential) -> Potential:
    model = copy.deepcopy(base)
    model.add_species([7, 3], {7: 6, 3: 1})
    return model


@pytest.fixture(params=CONFIGS)
def adapted(request: pytest.FixtureRequest, base: Potential, grown: Potential) -> Potential:
    config = AdapterConfig(rank=2, alpha=3.0, **CONFIGS[request.param])
    model = copy.deepcopy(grown)
    inject(model, config, fingerprint=weights_fingerprint(base), brought_species=(3, 7))
    laws.assert_same(laws.predict(model, [*KNOWN, NEW]), laws.predict(grown, [*KNOWN, NEW]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.composition.set("energy", model.composition.get("energy") + 0.5)
    return model.eval()


def test_merged_equals_unmerged(adapted: Potential, base: Potential):
    laws.merged_equals_unmerged(adapted, base, [*KNOWN, NEW])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": []}], ids=str)
def test_only_what_is_stated_trains(grown: Potential, base: Potential, settings: dict[str, Any]):
    config, model = AdapterConfig(**settings), copy.deepcopy(grown)
    inject(model, config, fingerprint="base", brought_species=(3, 7))
    tables = [n for n, m in base.network.named_modules() if isinstance(m, torch.nn.Embedding)]
    laws.only_what_is_stated_trains(model, base, config, tables)


def test_ejected_is_the_base(adapted: Potential, base: Potential):
    laws.ejected_is_the_base(adapted, base, KNOWN)


def test_forces_are_finite_differences(adapted: Potential):
    laws.forces_are_finite_differences(adapted, NEW)


def test_saving_loses_nothing(adapted: Potential, tmp_path: Path):
    laws.saving_loses_nothing(adapted, [*KNOWN, NEW], tmp_path)


def test_saving_an_adapter_loses_nothing(adapted: Potential, base: Potential, tmp_path: Path):
    laws.saving_an_adapter_loses_nothing(adapted, copy.deepcopy(base), KNOWN, tmp_path)
    load_adapter(base, save_adapter(adapted, tmp_path / "again"))
    assert base.species == adapted.species
    laws.assert_same(laws.predict(base, [*KNOWN, NEW]), laws.predict(adapted, [*KNOWN, NEW]))


def test_resuming_loses_nothing(adapted: Potential, tmp_path: Path):
    laws.resuming_loses_nothing(adapted, [*KNOWN, NEW], tmp_path)


def test_a_damaged_adapter_leaves_the_base_as_it_was(
    adapted: Potential, base: Potential, tmp_path: Path
):
    """Its elements leave with it, when its tensors turn out not to fit."""
    before = copy.deepcopy(base)
    other = random_potential(num_neighbors_adaptive=4.0, zbl=True, d_head=7)
    folder = save_adapter(adapted, tmp_path / "adapter")
    text = (folder / "adapter_model.safetensors").read_bytes()
    names = (weights_fingerprint(base).encode(), weights_fingerprint(other).encode())
    (folder / "adapter_model.safetensors").write_bytes(text.replace(*names))
    with pytest.raises(AdapterError):
        load_adapter(other, folder)
    assert other.species == base.species
    laws.assert_same(laws.predict(base, [ethanol(), crystal()]),
                     laws.predict(before, [ethanol(), crystal()]))  # fmt: skip


def test_blends_hold_the_mean_of_the_new_embeddings(base: Potential, grown: Potential):
    parts = []
    for seed in (1, 2):
        model = copy.deepcopy(grown)
        inject(model, AdapterConfig(rank=2), fingerprint="base", brought_species=(3, 7))
        torch.manual_seed(seed)
        with torch.no_grad():
            for table in dict(grown_tables(model)).values():
                table.new_rows += torch.randn_like(table.new_rows)
        parts.append(capture(model))
    blend = combine([(part, 0.5) for part in parts], "cat")
    name = "edge_embedder.new_rows"
    expected = (parts[0].tensors[name] + parts[1].tensors[name]) / 2
    torch.testing.assert_close(blend.tensors[name], expected)
    with pytest.raises(AdapterError, match="bring elements that their base lacks"):
        combine([(part, 0.7) for part in parts], "cat", base=base)
    other = replace(parts[1], species=base.species)
    with pytest.raises(AdapterError, match="list of elements of the one is"):
        combine([(parts[0], 0.5), (other, 0.5)], "cat")
