"""Labels beside a foundation: units, outliers, costs, and options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inspected import codes, frames, relabel, scaled, the
from models import random_potential
from pet_finetune.config.load import parse_options
from pet_finetune.data.loader import Loader
from pet_finetune.inspection.foundation import ask
from pet_finetune.inspection.inspected import dataset_of
from pet_finetune.inspection.inspection import Foundation, inspect_sets
from pet_finetune.inspection.suggestion import Load, estimate, load_of, suggest, training_section
from pet_finetune.units import energy_to_ev

KCAL = energy_to_ev("kcal/mol")


@pytest.fixture(scope="module")
def model():
    return random_potential()


@pytest.fixture
def labelled(molecules_of, model):
    """Molecules of known elements with what the model says as labels, and other baselines."""
    structures = [s for s in molecules_of("val") if 7 not in s.numbers.tolist()]
    batch = next(iter(Loader(structures, model.cutoff, batch_size=99, dtype=model.dtype))).graph
    said = model.predict(batch, "energy")
    energies = said.energy.detach() + 100.0 * batch.atoms_per_structure
    split = torch.split(said.forces.detach(), [s.num_atoms for s in structures])
    return [
        relabel(s, energy=e, forces=f) for s, e, f in zip(structures, energies, split, strict=True)
    ]


def look(structures, model, **settings):
    settings = {"seconds": 60.0, **settings}
    foundation = Foundation(model, "energy", tuple(model.species), **settings)
    return inspect_sets({"train": structures}, "energy", {}, foundation)


def test_all_structures_are_asked_about(labelled, model):
    inspection = look(labelled, model)
    assert inspection.compared == len(labelled)
    assert inspection.errors_before["forces_mae"] < 1e-10


def test_the_foundation_tells_the_unit(labelled, model):
    labelled[3] = relabel(labelled[3], energy=labelled[3].labels["energy"] + 2.0)
    inspection = look(scaled(labelled, energy=1 / KCAL, forces=1 / KCAL), model)
    found = the(inspection, "units")
    assert found.data["unit"] == "kcal/mol"
    assert "of the foundation" in found.what
    # Outliers are looked for in the unit that was found.
    assert frames(the(inspection, "foundation-outliers")) == [labelled[3].index]


def test_a_frame_that_the_foundation_does_not_believe(labelled, model):
    labelled[3] = relabel(labelled[3], energy=labelled[3].labels["energy"] + 2.0)
    labelled[9] = relabel(labelled[9], forces=labelled[9].labels["energy/forces"].flip(0) + 3.0)
    found = the(look(labelled, model), "foundation-outliers")
    assert frames(found) == [labelled[3].index, labelled[9].index]


def test_labels_that_fit_raise_no_doubt(labelled, model):
    assert "foundation-outliers" not in codes(look(labelled, model))


@pytest.mark.parametrize("kept", [True, False])
def test_other_references_matter_where_baselines_are_kept(labelled, model, kept):
    inspection = look(labelled, model, keeps_baselines=kept)
    assert ("references" in codes(inspection, "warning")) == kept
    assert inspection.errors_before["energy_shift"] == pytest.approx(100.0)


def test_time_limits_what_is_asked(labelled, model, molecules_of):
    dataset = dataset_of({"train": [*labelled, *labelled]}, "energy")
    some = ask(model, "energy", dataset, 0.0, model.species)
    assert 0 < len(some) < len(dataset.frames)


def test_asking_changes_nothing(labelled, model):
    model.train()
    state = torch.get_rng_state()
    look(labelled, model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_unknown_elements_are_an_error(molecules_of, model):
    found = the(look(molecules_of("val"), model, advice="Do this."), "unknown-elements")
    assert found.severity == "error"
    assert "N (Z=7)" in found.what
    assert "Do this." in found.what


def test_elements_that_will_be_added_are_none(molecules_of, model):
    for new in ((7,), None):
        assert "unknown-elements" not in codes(look(molecules_of("val"), model, known_too=new))


def test_unknown_charges_are_an_error(labelled):
    conditioned = random_potential(system_conditioning=True, max_charge=2, max_spin_multiplicity=3)
    labelled[0] = replace(labelled[0], charge=7)
    inspection = look(labelled, conditioned)
    assert "unknown-charges" in codes(inspection, "error")
    assert inspection.compared == 0


class TestEstimate:
    """What a run takes."""

    def test_methods_cost_what_they_keep(self, labelled, model):
        state = torch.get_rng_state()
        before = [p.clone() for p in model.network.parameters()]
        load = load_of(labelled, labelled[:5], model.cutoff)
        found = estimate(
            model, "energy", labelled[:6], load, batch_size=4, forces=True, stress=False
        )
        full, lora, heads = found
        assert [one.method for one in found] == ["full", "lora", "heads"]
        assert full.trainable == sum(p.numel() for p in model.network.parameters())
        assert full.trainable > lora.trainable > heads.trainable
        assert full.memory > heads.memory > 0
        assert all(one.seconds > 0 for one in found)
        assert torch.equal(torch.get_rng_state(), state)
        same = zip(before, model.network.parameters(), strict=True)
        assert all(torch.equal(old, new) for old, new in same)

    def test_memory_grows_with_the_batch(self, labelled, model):
        load = load_of(labelled, (), model.cutoff)
        small, large = (
            estimate(model, "energy", labelled[:4], load, size, forces=True, stress=False)[0]
            for size in (1, 8)
        )
        assert large.memory > 2 * small.memory

    def test_edges_are_counted(self, labelled, model):
        load = load_of(labelled, (), model.cutoff)
        pairs = Loader(labelled, model.cutoff, batch_size=len(labelled))
        batch = next(iter(pairs)).graph
        assert load.edges == pytest.approx(batch.num_edges)
        assert load.neighbours == pytest.approx(batch.num_edges / batch.num_atoms)


class TestSuggestion:
    """Options that the loader accepts, for any amount of data."""

    @pytest.mark.parametrize(
        ("structures", "forces", "batch", "metric"),
        [
            (10, "on", 5, "forces_mae"),
            (10, "off", 5, "mae_prod"),
            (4, "on", 2, "forces_mae"),
            (50, "on", 5, "mae_prod"),
            (200, "on", 10, "mae_prod"),
        ],
    )
    def test_few_structures_are_batched_and_judged_by_forces(
        self, structures, forces, batch, metric
    ):
        target = {"key": "energy", "unit": "eV", "forces": "off" if forces == "off" else {}}
        load = Load(structures, 9 * structures, 1e3, 8.0, 30, 0.0)
        made = suggest(training_section(["a.xyz"], target), load, checkpoint="b", parameters=10**6)
        training = parse_options(made.options).options.training
        assert (training.batch_size, training.best_model_metric) == (batch, metric)

    def test_where_some_structures_lack_forces_they_do_not_judge(self):
        target = {"key": "energy", "unit": "eV", "forces": {}}
        made = suggest(
            training_section(["a.xyz"], target),
            Load(10, 90, 1e3, 8.0, 30, 0.0),
            checkpoint="b",
            parameters=10**6,
            forced=False,
        )
        assert parse_options(made.options).options.training.best_model_metric == "mae_prod"

    @pytest.mark.parametrize("structures", [5, 30, 152, 5000])
    @pytest.mark.parametrize("parameters", [0, 1_650_000, 100_000_000])
    @pytest.mark.parametrize("atoms", [3, 200])
    def test_is_accepted(self, structures, parameters, atoms):
        section = training_section(["a.xyz"], {"key": "energy", "unit": "eV"})
        total = structures * atoms
        made = suggest(
            section,
            Load(structures, total, 20.0 * total, 20.0, 30, 0.0),
            checkpoint="base.ckpt" if parameters else None,
            parameters=parameters,
            unknown=["Si"] if parameters else [],
            outliers=structures == 30,
        )
        loaded = parse_options(made.options)
        training = loaded.options.training
        assert not loaded.notices
        assert loaded.options.is_finetuning == bool(parameters)
        assert training.batch_size * atoms <= 1500
        assert 50 <= training.num_epochs <= 300
        assert made.reasons
        if parameters:
            many = structures >= 500 and parameters < 20_000_000
            expected = "heads" if structures < 10 else "full" if many else "lora"
            assert loaded.options.finetune.method == expected
