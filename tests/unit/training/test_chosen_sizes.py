"""Batch size and number of epochs where the options leave them to the training set."""

from __future__ import annotations

import pytest
from tests import tiny_data

from pet_finetune.config.load import parse_options
from pet_finetune.training.sets import default_batch_size, default_num_epochs, with_chosen_sizes

NULL = {"batch_size": None, "num_epochs": None}


@pytest.mark.parametrize(
    ("structures", "atoms", "batch", "epochs"),
    [
        (1, 9, 1, 300),  # fewest updates in all: bounded by the epochs
        (50, 450, 5, 300),
        (200, 4200, 10, 150),
        (1000, 9000, 16, 50),
        (50, 50 * 500, 3, 177),  # large structures: few in a batch
    ],
)
def test_sizes_follow_the_training_set(structures, atoms, batch, epochs):
    assert default_batch_size(structures, atoms) == batch
    assert default_num_epochs(-(-structures // batch)) == epochs


@pytest.mark.parametrize(
    ("given", "batch", "epochs"),
    [
        ({}, 2, 300),
        ({"batch_size": 1, "num_epochs": 7}, 1, 7),
        ({"batch_size": None, "num_epochs": 7}, 2, 7),
        ({"batch_size": 4}, 4, 300),
        ({"max_atoms_per_batch": 9, "num_epochs": 7}, 2, 7),
    ],
)
def test_what_is_given_stays(given, batch, epochs):
    options = parse_options(tiny_data.options(NULL | given)).options
    structures = tiny_data.structures_of(tiny_data.molecules(4))
    training = with_chosen_sizes(options, structures).training
    assert (training.batch_size, training.num_epochs) == (batch, epochs)


def test_many_batches_make_few_epochs_however_they_are_cut():
    structures = 100 * tiny_data.structures_of(tiny_data.molecules(2))  # 6 and 3 atoms
    for given, epochs in [
        ({"batch_size": 10}, 150),
        ({"batch_size": 10, "gradient_accumulation_steps": 2}, 300),
        ({"max_atoms_per_batch": 45}, 150),
    ]:
        options = parse_options(tiny_data.options(NULL | given)).options
        assert with_chosen_sizes(options, structures).training.num_epochs == epochs
