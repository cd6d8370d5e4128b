"""Elements added to a model: what it knew stays, what is new has a place everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii

from laws_of_species import assert_same_energies
from models import SPECIES, all_structures, random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.errors import PetFinetuneError

KINDS = {
    "zbl": {"zbl": True, "num_neighbors_adaptive": 4.0},
    "residual": {"featurizer_type": "residual", "d_node": 8},
    "conditioned": {"system_conditioning": True, "targets": ("energy", "other")},
}
NEW = {7: 6, 3: 1, 55: 14}  # between, below and beyond the known ones; caesium is large


def grown(model):
    model = copy.deepcopy(model)
    assert model.add_species(NEW, NEW) == (3, 7, 55)
    return model


@pytest.fixture(params=KINDS)
def base(request):
    return random_potential(**KINDS[request.param])


def test_known_elements_predict_what_they_did(base):
    assert_same_energies(base, grown(base), list(all_structures().values()))


def test_known_elements_predict_what_they_did_in_single_precision(base):
    base = base.to(torch.float32)
    assert_same_energies(base, grown(base), list(all_structures().values()))


def test_a_new_element_starts_as_the_one_it_is_like():
    base = random_potential()
    carbon, nitrogen = Atoms("CC", [[0, 0, 0], [0, 0, 1.3]]), Atoms("NN", [[0, 0, 0], [0, 0, 1.3]])
    assert_same_energies(base, grown(base), [carbon], [nitrogen])


def test_everything_is_ordered_by_atomic_number(base):
    model = grown(base)
    assert model.species == (1, 3, 6, 7, 8, 14, 55)
    sources = [SPECIES.index(NEW.get(z, z)) for z in model.species]
    old = base.network.species_embeddings()
    tables = model.network.species_embeddings()
    assert tables.keys() == old.keys()
    for path, table in tables.items():
        assert torch.equal(table.weight, old[path].weight[sources]), path
        assert table.weight.requires_grad
    for target in base.targets:
        before = base.composition.get(target)
        assert torch.equal(model.composition.get(target), before[sources])
    if base.zbl is not None:
        expected = [float(covalent_radii[z]) for z in model.species]
        assert model.zbl.covalent_radii.tolist() == expected


def test_radii_of_known_elements_are_those_of_the_model():
    base = random_potential(zbl=True)
    base.zbl.covalent_radii += 0.1
    radii = grown(base).zbl.covalent_radii
    assert torch.equal(radii[[0, 2, 4, 5]], base.zbl.covalent_radii)
    assert float(radii[1]) == covalent_radii[3]


def test_random_rows_scatter_as_the_known_ones_do():
    base = random_potential(d_pet=400, num_heads=2)
    torch.manual_seed(3)
    model = copy.deepcopy(base)
    model.add_species([3, 7])
    known = base.network.edge_embedder.weight.detach()
    rows = model.network.edge_embedder.weight.detach()[[1, 3]]
    scatter = (rows - known.mean(0)) / known.std(0, correction=0)
    assert not torch.equal(rows[0], rows[1])
    assert float(scatter.mean()) == pytest.approx(0.0, abs=0.15)
    assert float(scatter.std()) == pytest.approx(1.0, abs=0.1)
    weights = base.composition.get("energy")
    torch.testing.assert_close(model.composition.get("energy")[[1, 3]], weights.mean().expand(2))
    torch.manual_seed(3)
    again = copy.deepcopy(base)
    again.add_species([7, 3])
    assert torch.equal(again.network.edge_embedder.weight, model.network.edge_embedder.weight)


@pytest.mark.parametrize(
    ("numbers", "like", "message"),
    [([7, 6], {}, r"has the species \[6\] already"), ([7], {7: 9}, r"lacks the species \[9\]")],
)
def test_what_cannot_be_added(numbers, like, message):
    model = random_potential()
    with pytest.raises(PetFinetuneError, match=message):
        model.add_species(numbers, like)
    assert model.species == SPECIES


def test_a_checkpoint_keeps_them(base, tmp_path):
    model = grown(base)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "grown.ckpt", model)).model
    assert loaded.species == model.species
    frames = [Atoms("NLiCs", [[0, 0, 0], [0, 0, 1.5], [0, 2, 0]]), *all_structures().values()]
    assert_same_energies(model, loaded, frames)
