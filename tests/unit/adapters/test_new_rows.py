"""Rows of new elements train; those of known elements keep every bit, whatever pulls at them."""

from __future__ import annotations

import copy

import pytest
import torch
from ase import Atoms

from laws_of_species import assert_same_energies
from models import all_structures, random_potential
from pet_finetune.adapters.inject import freeze, trainable_report
from pet_finetune.adapters.layers import grown_tables, merge_new_rows, train_new_rows
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms

FRAMES = [Atoms("NCLi", [[0, 0, 0], [0, 0.3, 1.2], [1.5, 0, 0]]), *all_structures().values()]


@pytest.fixture(params=["feedforward", "residual"])
def base(request):
    model = random_potential(featurizer_type=request.param, num_gnn_layers=3)
    model.add_species([7, 3], {7: 6})
    return model


@pytest.fixture
def training(base):
    """The same model with only the new rows training."""
    model = copy.deepcopy(base)
    freeze(model, ["node_heads.energy"])
    train_new_rows(model, [3, 7])
    return model


def step(model, **kwargs):
    """One step of AdamW on energies and forces."""
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, **kwargs)
    batch = batch_from_atoms(FRAMES, model.cutoff, model.dtype)
    predicted = model.predict(batch, create_graph=True)
    (predicted.energy.square().sum() + predicted.forces.square().sum()).backward()
    optimizer.step()


def test_nothing_changes_until_they_train(base, training):
    assert_same_energies(base, training, FRAMES)


def test_new_rows_move_and_known_rows_do_not(base, training):
    step(training, weight_decay=0.5)
    tables = base.network.species_embeddings()
    assert len(tables) == (4 if base.network.feedforward else 6)
    assert dict(grown_tables(training)).keys() == tables.keys()
    for path, table in grown_tables(training):
        before, after = tables[path].weight, table.table()
        same = (before == after).all(1).tolist()
        assert same == [True, False, True, False, True, True], path


def test_merged_is_the_same_in_plain_tables(base, training):
    step(training)
    merged = merge_new_rows(copy.deepcopy(training))
    assert merged.network.state_dict().keys() == base.network.state_dict().keys()
    assert_same_energies(training, merged, FRAMES)
    assert not list(grown_tables(merged))


def test_a_checkpoint_holds_the_trained_rows(training, tmp_path):
    step(training)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "a.ckpt", training)).model
    assert_same_energies(training, loaded, FRAMES)
    assert list(grown_tables(training)), "saving must leave the model as it was"


def test_the_report_names_them(training):
    report = trainable_report(training)
    widths = [table.new_rows.shape[1] for _, table in grown_tables(training)]
    assert report.groups["embeddings of new elements"] == 2 * sum(widths)
    assert set(report.groups) == {"node_heads", "embeddings of new elements"}


def test_without_new_elements_nothing_is_replaced(base):
    train_new_rows(base, [])
    assert not list(grown_tables(base))


def test_a_model_whose_rows_train_takes_no_more_elements(training):
    with pytest.raises(AssertionError, match="rows that train apart"):
        training.add_species([9])
