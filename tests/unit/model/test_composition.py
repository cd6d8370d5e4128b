"""Baselines per species: what least squares must give, and what it must not invent."""

from __future__ import annotations

import pytest
import torch

from pet_finetune.model.terms import Composition, fit_composition

RIDGE = 1e-5


def counts_of(seed=0, structures=30, species=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 9, (structures, species), generator=generator)


def energies_of(counts, weights):
    return counts.to(torch.float64) @ torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [RIDGE, 0.0])
def test_exact_energies_give_exact_baselines(ridge):
    counts = counts_of()
    weights = [-13.6, -1030.5, -2041.0]
    fitted = fit_composition(counts, energies_of(counts, weights), ridge)
    torch.testing.assert_close(
        fitted, torch.tensor(weights, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_noise_gives_the_least_squares_answer_per_atom():
    counts = counts_of()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(counts), generator=generator, dtype=torch.float64)
    energies = energies_of(counts, [-1.0, 2.0, 3.0]) + noise
    atoms = counts.sum(1).to(torch.float64)
    fractions = counts / atoms.unsqueeze(1)
    expected = torch.linalg.lstsq(fractions, (energies / atoms).unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(
        fit_composition(counts, energies, RIDGE), expected, atol=1e-4, rtol=0
    )


def test_a_single_composition_is_explained_with_the_smallest_baselines():
    counts = torch.tensor([[4, 1, 1]]).repeat(6, 1)  # methanol only
    energies = torch.full((6,), -3000.0, dtype=torch.float64)
    fitted = fit_composition(counts, energies, RIDGE)
    torch.testing.assert_close(counts[0].to(torch.float64) @ fitted, energies[0])
    # Nothing tells the species apart, so each gets its share in proportion to its count.
    share = counts[0].to(torch.float64) / (counts[0] ** 2).sum()
    torch.testing.assert_close(fitted, -3000.0 * share)


def test_species_that_do_not_occur_get_nothing():
    counts = counts_of()
    counts[:, 1] = 0
    fitted = fit_composition(counts, energies_of(counts, [-1.0, 5.0, -2.0]), RIDGE)
    torch.testing.assert_close(
        fitted, torch.tensor([-1.0, 0.0, -2.0], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_a_strong_ridge_shrinks():
    counts = counts_of()
    energies = energies_of(counts, [-10.0, -20.0, -30.0])
    plain = fit_composition(counts, energies, RIDGE)
    shrunk = fit_composition(counts, energies, 100.0)
    assert shrunk.norm() < 0.5 * plain.norm()


def test_atoms_of_left_out_species_still_count_in_the_size():
    counts = counts_of()
    energies = energies_of(counts, [-1.0, -2.0, -3.0])
    others = energies_of(counts[:, :1], [-1.0])
    fitted = fit_composition(counts[:, 1:], energies - others, RIDGE, counts.sum(1))
    torch.testing.assert_close(
        fitted, torch.tensor([-2.0, -3.0], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_nothing_left_to_fit():
    counts = counts_of()
    fitted = fit_composition(counts[:, :0], torch.zeros(len(counts)), RIDGE, counts.sum(1))
    assert fitted.shape == (0,)


def test_a_composition_adds_up_atoms_in_double_precision():
    composition = Composition((1, 6, 8))
    assert composition.get("energy").tolist() == [0.0, 0.0, 0.0]
    composition.set("energy", torch.tensor([1.5, 2.5, 3.5]))
    composition.to(torch.float32)
    energies = composition(torch.tensor([8, 1, 1, 6]), "energy")
    assert energies.dtype == torch.float64
    assert energies.tolist() == [3.5, 1.5, 1.5, 2.5]
    with pytest.raises(ValueError, match="expected 3 baselines"):
        composition.set("energy", torch.zeros(2))
