"""Baselines and scales before a run, on data whose answer is known."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from models import SPECIES, property_potential, random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.config.load import parse_options
from pet_finetune.data.loader import Loader
from pet_finetune.errors import CheckpointError, ConfigError, TrainingError
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from pet_finetune.training import baselines
from pet_finetune.training.baselines import prepare_baselines, settled_rows
from pet_finetune.training.loggers import baseline_text
from pet_finetune.training.starting_model import with_stated_numbers
from tiny_data import ATOM_ENERGY, data_section, molecules, structures_of

H, C, O, SI = range(4)  # noqa: E741, RUF100


def options_of(checkpoint="base.ckpt", targets=("energy",), **training):
    section = data_section("train.xyz")
    section["targets"] = dict.fromkeys(targets, section["targets"]["energy"])
    raw = {"training_set": section, "architecture": {"training": training}}
    return parse_options(raw, checkpoint).options


def prepare(model, structures, options, fresh=(), target="energy"):
    loader = Loader(structures, model.cutoff, batch_size=4, dtype=model.dtype)
    (table,) = prepare_baselines(options, model, loader, [target], list(fresh))
    return table


@pytest.fixture
def structures():
    """Ten molecules of three compositions."""
    return structures_of(molecules(10, names=("CH3OH", "H2O", "CH4")))


def labelled(structures, energy):
    """The same structures with energies from a function of each."""
    made = []
    for structure in structures:
        value = torch.tensor(float(energy(structure)), dtype=torch.float64)
        made.append(replace(structure, labels={**structure.labels, "energy": value}))
    return made


def energies_of(model, structures):
    (batch,) = Loader(structures, model.cutoff, batch_size=99, dtype=model.dtype)
    return model.predict(batch.graph, forces=False).energy.detach()


def shifted(model, structures, shifts):
    """Labels: what the model predicts plus a constant for each atom of a species."""
    predicted = dict(zip(map(id, structures), energies_of(model, structures), strict=True))
    return labelled(
        structures,
        lambda s: predicted[id(s)] + sum(shifts[z] for z in s.numbers.tolist()),
    )


SHIFTS = {1: -13.0, 6: -1030.0, 8: -2040.0}


def test_refit_finds_the_shift_between_foundation_and_labels(structures):
    model = random_potential()
    before = model.composition.get("energy").clone()
    structures = shifted(model, structures, SHIFTS)
    table = prepare(model, structures, options_of())
    change = model.composition.get("energy") - before
    expected = torch.tensor([*SHIFTS.values(), 0.0], dtype=torch.float64)
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=0)
    assert table.mode == "refit"
    told = {**vars(table), "rows": [list(row) for row in table.rows]}
    assert settled_rows([told], model) == [told]
    model.composition.get("energy")[C] += 0.5
    (found,) = settled_rows([told], model)
    moves = [new[3] - old[3] for new, old in zip(found["rows"], told["rows"], strict=True)]
    assert moves == pytest.approx([0.0, 0.5, 0.0])
    model.composition.get("energy")[C] -= 0.5
    labels = torch.stack([s.labels["energy"] for s in structures])
    torch.testing.assert_close(energies_of(model, structures), labels, atol=1e-3, rtol=0)


def test_refit_asks_the_model_about_some_of_many(structures, monkeypatch):
    model = random_potential()
    before = model.composition.get("energy").clone()
    structures = shifted(model, structures, SHIFTS)
    asked = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda b, *a, **k: asked.append(b) or predict(b, *a, **k))
    monkeypatch.setattr(baselines, "_ENOUGH", 20)
    many = [one for one in structures for _ in range(60)]
    table = prepare(model, many, options_of())
    change = model.composition.get("energy") - before
    expected = torch.tensor([*SHIFTS.values(), 0.0], dtype=torch.float64)
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=0)
    assert sum(batch.num_structures for batch in asked) < len(many) / 3
    assert sum(count for _, count, *_ in table.rows) == sum(s.num_atoms for s in many)


def test_refit_of_a_single_composition_centres_the_errors():
    model = random_potential()
    structures = structures_of(molecules(6, names=("CH3OH",)))
    prepare(model, structures, options_of())
    labels = torch.stack([s.labels["energy"] for s in structures])
    errors = energies_of(model, structures) - labels
    assert abs(float(errors.mean())) < 1e-6
    assert float(errors.abs().max()) < 10.0  # of energies of thousands of eV


def test_refit_does_not_touch_what_is_not_there(structures):
    model = random_potential()
    before = float(model.composition.get("energy")[SI])
    table = prepare(model, structures, options_of())
    assert float(model.composition.get("energy")[SI]) == before
    assert [row[0] for row in table.rows] == ["H", "C", "O"]
    counts = {row[0]: row[1] for row in table.rows}
    atoms = torch.cat([s.numbers for s in structures])
    assert counts == {"H": int((atoms == 1).sum()), "C": int((atoms == 6).sum()),
                      "O": int((atoms == 8).sum())}  # fmt: skip


def test_the_scale_of_a_trained_head_stays(structures, caplog):
    model = random_potential()
    with caplog.at_level(logging.WARNING):
        table = prepare(model, structures, options_of(fixed_scaling_weights={"energy": 9.0}))
    assert table.scale == float(model.scale.get("energy")) == 2.0
    assert "fixed_scaling_weights has no effect on 'energy'" in caplog.text


def test_keep_keeps(structures):
    model = random_potential()
    before = model.composition.get("energy").clone()
    prepare(model, structures, options_of(baseline={"mode": "keep"}))
    assert torch.equal(model.composition.get("energy"), before)


def test_fit_explains_the_labels_alone(structures):
    structures = labelled(structures, lambda s: sum(SHIFTS[z] for z in s.numbers.tolist()))
    model = random_potential()
    prepare(model, structures, options_of(baseline={"mode": "fit"}))
    expected = torch.tensor([*SHIFTS.values(), 0.0], dtype=torch.float64)
    torch.testing.assert_close(model.composition.get("energy"), expected, atol=1e-4, rtol=0)


def test_structures_without_an_energy_do_not_count(structures):
    structures = labelled(structures, lambda s: sum(SHIFTS[z] for z in s.numbers.tolist()))
    bare = replace(structures[0], labels={})
    model = random_potential()
    prepare(model, [bare, *structures[1:]], options_of(baseline={"mode": "fit"}))
    assert float(model.composition.get("energy")[H]) == pytest.approx(-13.0, abs=1e-4)
    silent = random_potential()
    before = silent.composition.get("energy").clone()
    prepare(silent, [bare], options_of())
    assert torch.equal(silent.composition.get("energy"), before)


def test_values_are_taken_as_given(structures):
    given = {1: -1.0, 6: -2.0, 8: -3.0}
    options = options_of(baseline={"mode": "values"}, atomic_baseline={"energy": given})
    model = random_potential()
    silicon = float(model.composition.get("energy")[SI])
    prepare(model, structures, options)
    assert model.composition.get("energy").tolist() == [-1.0, -2.0, -3.0, silicon]


def test_one_value_for_all_species(structures):
    options = options_of(baseline={"mode": "values"}, atomic_baseline={"energy": -7.0})
    model = random_potential()
    prepare(model, structures, options)
    assert model.composition.get("energy").tolist() == [-7.0] * len(SPECIES)


def test_values_for_another_target_only(structures):
    options = options_of(
        targets=("energy", "other"),
        baseline={"mode": "values"},
        atomic_baseline={"other": -1.0},
    )
    with pytest.raises(TrainingError, match="atomic_baseline names none for 'energy'"):
        prepare(random_potential(), structures, options)


@pytest.mark.parametrize("checkpoint", [None, "base.ckpt"], ids=["fit", "refit"])
def test_given_species_are_fixed_and_the_others_fitted(structures, checkpoint):
    """Oxygen is given at its true value, so hydrogen and carbon come out at theirs."""
    model = random_potential()
    start = torch.zeros(4, dtype=torch.float64)
    if checkpoint is None:
        structures = labelled(structures, lambda s: sum(SHIFTS[z] for z in s.numbers.tolist()))
    else:
        structures = shifted(model, structures, SHIFTS)
        start = model.composition.get("energy").clone()
    given = {8: float(start[O]) + SHIFTS[8], 14: -5.0}
    options = options_of(checkpoint, atomic_baseline={"energy": given})
    prepare(model, structures, options, fresh=[] if checkpoint else ["energy"])
    found = model.composition.get("energy")
    assert found[[O, SI]].tolist() == [given[8], -5.0]
    expected = start[[H, C]] + torch.tensor([SHIFTS[1], SHIFTS[6]], dtype=torch.float64)
    torch.testing.assert_close(found[[H, C]], expected, atol=1e-4, rtol=0)


def test_all_species_given_leaves_nothing_to_fit(structures):
    given = {z: float(z) for z in SPECIES}
    model = random_potential()
    prepare(model, structures, options_of(None, atomic_baseline={"energy": given}), ["energy"])
    assert model.composition.get("energy").tolist() == [1.0, 6.0, 8.0, 14.0]


def scratch():
    return Potential(random_potential().hypers, SPECIES, [TargetSpec("energy")]).double()


def test_a_fresh_head_is_scaled_by_the_spread_of_the_forces(structures):
    model = scratch()
    table = prepare(model, structures, options_of(None), fresh=["energy"])
    forces = torch.cat([s.labels["energy/forces"] for s in structures])
    assert table.scale == pytest.approx(0.05 * float(forces.square().mean().sqrt()))
    assert table.mode == "fit"
    assert float(model.composition.get("energy")[H]) < 0


def test_without_forces_the_energies_less_the_baselines_give_the_scale(structures):
    bare = [replace(s, labels={"energy": s.labels["energy"]}) for s in structures]
    model = scratch()
    table = prepare(model, bare, options_of(None), fresh=["energy"])
    counts = torch.stack([
        torch.tensor([int((s.numbers == z).sum()) for z in SPECIES]) for s in bare
    ]).double()  # fmt: skip
    labels = torch.stack([s.labels["energy"] for s in bare])
    left = labels - counts @ model.composition.get("energy")
    assert table.scale == pytest.approx(float(left.square().mean().sqrt()))


def test_scales_can_be_given_and_switched_off(structures):
    fixed = options_of(None, fixed_scaling_weights={"energy": 3.5})
    assert prepare(scratch(), structures, fixed, ["energy"]).scale == 3.5
    off = options_of(None, scale_targets=False)
    assert prepare(scratch(), structures, off, ["energy"]).scale == 1.0


def test_labels_without_spread_leave_the_scale_at_one(structures):
    flat = [
        replace(s, labels={"energy": torch.tensor(0.0, dtype=torch.float64)}) for s in structures
    ]
    table = prepare(scratch(), flat, options_of(None), ["energy"])
    assert table.scale == 1.0
    assert math.isfinite(table.rows[0][3])


def test_a_new_head_beside_a_trained_one_is_fitted(structures):
    model = random_potential()
    model.add_target(TargetSpec("new"))
    renamed = [
        replace(s, labels={k.replace("energy", "new", 1): v for k, v in s.labels.items()})
        for s in structures
    ]
    table = prepare(model, renamed, options_of(targets=("new",)), fresh=["new"], target="new")
    assert table.mode == "fit"
    assert float(model.scale.get("new")) != 1.0
    assert sum(ATOM_ENERGY.values()) < 0
    assert model.composition.get("new").abs().max() > 100


def with_new_carbon():
    """A model to which carbon is new, and that knows the other elements of the structures."""
    model = random_potential()
    reduced = Potential(model.hypers, (1, 8, 14), [TargetSpec("energy")]).double()
    reduced.composition.set("energy", torch.tensor([-3.0, -7.0, 1.0]))
    reduced.add_species([6], {6: 14})
    return reduced.eval()


@pytest.mark.parametrize("ridge", [1e-5, 100.0])
def test_a_new_element_is_fitted_however_strong_the_ridge(structures, ridge):
    model = with_new_carbon()
    structures = shifted(model, structures, {1: 0.0, 6: -1030.0, 8: 0.0})
    options = options_of(baseline={"ridge": ridge})
    loader = Loader(structures, model.cutoff, batch_size=4, dtype=model.dtype)
    (table,) = prepare_baselines(options, model, loader, ["energy"], [], [6])
    expected = torch.tensor([-3.0, 1.0 - 1030.0, -7.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(model.composition.get("energy"), expected, atol=1e-2, rtol=0)
    assert math.isnan({row[0]: row[2] for row in table.rows}["C"])
    assert "new" in baseline_text(table)


@pytest.mark.parametrize("mode", ["keep", "values"])
def test_a_new_element_is_fitted_where_the_others_are_kept(structures, mode):
    model = with_new_carbon()
    structures = shifted(model, structures, {1: 0.0, 6: -1030.0, 8: 0.0})
    given = {"atomic_baseline": {"energy": {14: 2.0}}} if mode == "values" else {}
    loader = Loader(structures, model.cutoff, batch_size=4, dtype=model.dtype)
    options = options_of(baseline={"mode": mode}, **given)
    prepare_baselines(options, model, loader, ["energy"], [], [6])
    found = model.composition.get("energy")
    assert found[[0, 2, 3]].tolist() == [-3.0, -7.0, 2.0 if given else 1.0]
    assert float(found[1]) == pytest.approx(-1029.0, abs=1e-2)


def test_a_new_element_whose_energy_is_given_is_not_fitted(structures):
    model = with_new_carbon()
    options = options_of(baseline={"mode": "values"}, atomic_baseline={"energy": {6: -2.0}})
    loader = Loader(structures, model.cutoff, batch_size=4, dtype=model.dtype)
    prepare_baselines(options, model, loader, ["energy"], [], [6])
    assert model.composition.get("energy").tolist() == [-3.0, -2.0, -7.0, 1.0]


def test_numbers_of_a_checkpoint(tmp_path):
    """As if they stood in the options, for every target that has some."""
    model = random_potential(targets=("energy", "energy/b"))
    path = str(save_checkpoint(tmp_path / "model.ckpt", model))
    options = options_of(
        None, ("energy", "energy/b"), atomic_baseline=path, fixed_scaling_weights=path
    )
    training = with_stated_numbers(options).training
    for index, name in enumerate(("energy", "energy/b")):
        expected = dict(zip(SPECIES, model.composition.get(name).tolist(), strict=True))
        assert training.atomic_baseline[name] == expected
        assert training.fixed_scaling_weights[name] == 2.0 + index
    assert options.training.atomic_baseline == path
    untouched = options_of(atomic_baseline={"energy": 1.0})
    assert with_stated_numbers(untouched) == untouched


def test_numbers_that_a_checkpoint_lacks(tmp_path):
    path = str(save_checkpoint(tmp_path / "model.ckpt", random_potential()))
    for option in ("atomic_baseline", "fixed_scaling_weights"):
        options = options_of(None, ("energy", "energy/b"), **{option: path})
        with pytest.raises(ConfigError, match=f"{option}: .*for energy/b; it has for energy"):
            with_stated_numbers(options)
        with pytest.raises(CheckpointError, match="gone.ckpt"):
            with_stated_numbers(options_of(None, **{option: "gone.ckpt"}))
    other = property_potential()
    other.targets["energy"] = replace(other.targets["energy"], per_atom=True)
    path = str(save_checkpoint(tmp_path / "other.ckpt", other))
    with pytest.raises(ConfigError, match="a scalar for each structure in eV, but a scalar for ea"):
        with_stated_numbers(options_of(None, atomic_baseline=path))
