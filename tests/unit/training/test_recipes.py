"""The ways of training that can be combined: each does what it says, and resumes exactly."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from pet_finetune.errors import TrainingError
from pet_finetune.training.loss_features import add_label_noise
from pet_finetune.training.metrics import Metrics
from pet_finetune.training.objectives import batch_loss
from pet_finetune.training.soap import SOAP
from trainers import (
    assert_identical,
    average_of,
    curve,
    interrupt_after,
    make_trainer,
    watch,
    weights,
    written,
)

UNFREEZE = {"stages": {0: "heads", 1: ["gnn_layers.1", "combination_mlps.0"], 2: "all"}}
RECIPES = {
    "swa, own rate": {"swa": {"start": 0.3, "learning_rate": 1e-3}, "best_model_metric": "loss"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "noise": {"label_noise": {"energy": 0.1, "forces": 0.2}},
    "rotations": {"rotational_consistency": {"weight": 3.0, "fraction": 0.5}},
    "loss schedule": {
        "loss_schedule": [{"start": 0.0, "forces": 0.5}, {"start": 0.6, "energy": 9}]
    },
    "layer decay": {"finetune": {"config": {"layer_decay": 0.5}}},
    "unfreeze": {"finetune": {"unfreeze": UNFREEZE}},
    "lora+": {"method": "lora", "finetune": {"config": {"loraplus_lr_ratio": 8.0}}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "soap, unfreeze": {
        "optimizer": "soap",
        "finetune": {"unfreeze": UNFREEZE, "config": {"layer_decay": 0.5}},
    },
    "soap, lora+, accumulation": {
        "method": "lora",
        "optimizer": "soap",
        "finetune": {"config": {"loraplus_lr_ratio": 4.0}},
        "gradient_accumulation_steps": 2,
    },
    "all with full": {
        "finetune": {"unfreeze": {"every": 1}, "config": {"layer_decay": 0.7}},
        "ema": 0.9,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "label_noise": {"forces": 0.1},
        "rotational_consistency": 2,
        "loss_schedule": {"start": 0.5, "energy": 10.0},
        "extra": True,
        "precision": "bf16-mixed",
        "early_stopping": 2,
    },
    "all with lora": {
        "method": "lora",
        "config": {"dropout": 0.3},
        "finetune": {"config": {"loraplus_lr_ratio": 4.0}},
        "swa": {"start": 0.5, "learning_rate": 1e-3},
        "gradient_accumulation_steps": 2,
        "label_noise": {"energy": 0.1},
        "gradient_checkpointing": True,
        "extra": True,
        "scheduler": "constant",
        "early_stopping": 3,
    },
}
EPOCHS = 3


def trainer_of(recipe, seed):
    torch.manual_seed(seed)
    return make_trainer(**{"num_epochs": EPOCHS, **RECIPES[recipe]})


@cache
def uninterrupted(recipe):
    trainer, records = trainer_of(recipe, 11), []
    watch(trainer, epoch=records.append)
    torch.manual_seed(12)
    result = trainer.fit()
    assert result.finished
    return weights(trainer), curve(records), result, trainer.progress.step


@pytest.mark.few(13)
@pytest.mark.parametrize("stop", ["early", "late"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_goes_on_as_the_run_that_never_stopped(recipe, stop):
    expected, lines, whole, steps = uninterrupted(recipe)
    stopped, records, saved = trainer_of(recipe, 11), [], []
    watch(stopped, epoch=records.append, save=lambda: saved.append(written(stopped.state())))
    interrupt_after(stopped, {"early": 1, "late": steps - 1}[stop])
    torch.manual_seed(12)
    assert not stopped.fit().finished

    resumed = trainer_of(recipe, 99)  # another process has other random numbers
    resumed.load_state(saved[-1])
    watch(resumed, epoch=records.append)
    assert resumed.fit() == whole
    assert_identical(weights(resumed), expected)
    assert curve(records) == lines


@pytest.mark.few(6)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_makes_another_model(recipe):
    """An option that is read and then forgotten would pass every other test."""
    same = {
        key: value
        for key, value in RECIPES[recipe].items()
        if key in ("method", "config", "best_model_metric", "scheduler")
    }
    torch.manual_seed(11)
    plain = make_trainer(num_epochs=EPOCHS, **same)
    torch.manual_seed(12)
    plain.fit()
    changed = uninterrupted(recipe)[0]
    ours = {
        name: changed[name.replace("now", "average") if f"average {name[4:]}" in changed else name]
        for name in weights(plain)
    }
    assert any(not torch.equal(value, ours[name]) for name, value in weights(plain).items())


def test_the_mean_of_the_weights_is_that_of_every_step_of_the_last_epochs():
    # Until the window is full each epoch is the best so far.
    trainer, seen, validated = (
        make_trainer(num_epochs=4, swa={"start": 0.5}, best_model_window=4), [], []
    )  # fmt: skip
    watch(
        trainer,
        step=lambda *ignored: seen.append(weights(trainer)),
        best=lambda record: validated.append(
            (record.epoch, {f"now {n}": p.detach().clone() for n, p in trainer.parameters.items()})
        ),
    )
    trainer.fit()
    late = seen[6:]
    for name in trainer.parameters:
        mean = torch.stack([state[f"now {name}"] for state in late]).double().mean(0)
        found = average_of(trainer)[name].double()
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
    assert {epoch <= 2 for epoch, _ in validated} == {True, False}
    for epoch, kept in validated:
        if epoch <= 2:
            assert_identical({n: seen[3 * epoch - 1][n] for n in kept}, kept)
        else:
            assert all(not torch.equal(seen[3 * epoch - 1][n], kept[n]) for n in kept)


def test_swa_may_have_its_own_learning_rate():
    trainer, rates = make_trainer(num_epochs=4, swa={"start": 0.5, "learning_rate": 7e-4}), []
    watch(trainer, epoch=lambda record: rates.append(record.learning_rate))
    trainer.fit()
    assert rates[2:] == [7e-4, 7e-4]
    assert rates[0] > rates[1] > 7e-4


def test_an_update_from_many_batches_has_their_mean_gradient():
    gradients = []
    for steps in (1, 2, 3):
        trainer = make_trainer(gradient_accumulation_steps=steps, grad_clip_norm=None)
        batches = list(trainer.batches(0))[:steps]
        result = trainer.step(iter(batches), steps, {"energy": Metrics("energy")})
        assert (result.batches, result.structures) == (
            steps,
            sum(b.graph.num_structures for b in batches),
        )
        gradients.append({n: p.grad.clone() for n, p in trainer.parameters.items()})
        losses = [
            float(batch_loss(b, make_trainer().model.predict_many(b.graph, trainer.wanted),
                             trainer.objectives))
            for b in batches
        ]  # fmt: skip
        assert [result.loss, *result.extra.values()] == pytest.approx([sum(losses)], rel=1e-4)
    fresh = make_trainer(gradient_accumulation_steps=1, grad_clip_norm=None)
    parts = []
    for batch in list(fresh.batches(0))[:2]:
        found = fresh.model.predict_many(batch.graph, fresh.wanted, create_graph=True)
        loss = batch_loss(batch, found, fresh.objectives)
        parts.append(torch.autograd.grad(loss, list(fresh.parameters.values())))
    for name, *single in zip(fresh.parameters, *parts, strict=True):
        expected = sum(single) / 2
        size = float(expected.abs().max()) + 1e-3
        torch.testing.assert_close(
            gradients[1][name] / size, expected / size, rtol=0, atol=1e-3, msg=name
        )


def test_the_last_update_of_an_epoch_takes_what_is_left():
    trainer, done = make_trainer(gradient_accumulation_steps=2, num_epochs=2), []
    watch(trainer, step=lambda batches, *rest: done.append(batches))
    trainer.fit()
    assert done == [2, 3, 2, 3]
    assert trainer.progress.step == trainer.total_steps == 4


def test_batches_that_are_not_finite_are_told_apart_within_an_update():
    trainer = make_trainer(gradient_accumulation_steps=3)
    first, second, third = trainer.batches(0)
    second.labels["energy"].fill_(1e300)
    with pytest.raises(TrainingError, match="loss is not a finite number in epoch 1, batch 2: "):
        trainer.step([first, second, third], 3, {"energy": Metrics("energy")})
    name = next(iter(trainer.parameters))
    trainer.parameters[name].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match="gradient of the loss .* epoch 1, batches 1 to 2: "):
        trainer.step([first, third], 2, {"energy": Metrics("energy")})


def test_the_loss_changes_its_weights_at_the_stage_and_the_metric_has_the_last_ones():
    schedule = [{"start": 0.3, "forces": 0.0}, {"start": 0.6, "energy": 5.0}]
    options = {"best_model_metric": "loss", "loss_schedule": schedule, "label_noise": {}}
    trainer, losses = make_trainer(num_epochs=3, **options), []
    batch = next(trainer.batches(0))
    parts = {}
    for kind in ("energy", "forces"):
        single = {"energy": 0.0, "forces": 0.0, kind: 1.0, "start": 0.0}
        only = make_trainer(loss_schedule=single)
        parts[kind] = only.step([batch], 1, {"energy": Metrics("energy")}).loss
        last = only._validation_loss()
        assert last == pytest.approx(only._validation_loss())
    for epoch in range(3):
        fresh = make_trainer(num_epochs=3, **options)
        fresh.progress.epoch = epoch
        losses.append(fresh.step([batch], 1, {"energy": Metrics("energy")}).loss)
    energy, forces = parts["energy"], parts["forces"]
    assert losses == pytest.approx([energy + forces, energy, 5.0 * energy + forces], rel=1e-4)
    at_the_end = make_trainer(loss_schedule={"start": 0.0, "energy": 5.0})
    assert trainer._validation_loss() == pytest.approx(at_the_end._validation_loss())


def test_noise_is_of_the_stated_size_and_belongs_to_the_batch():
    trainer = make_trainer(label_noise={"energy": 0.5, "forces": 0.25}, batch_size=7)
    (batch,) = trainer.batches(0)
    noise, drawn = trainer.options.label_noise, {"energy": [], "energy/forces": []}
    for index in range(200):
        noisy = add_label_noise(batch, ["energy"], noise, (3, 0, index))
        for name, errors in drawn.items():
            errors.append((noisy.labels[name] - batch.labels[name]).double())
    energy = torch.stack(drawn["energy"]) / batch.graph.atoms_per_structure
    assert float(energy.std()) == pytest.approx(0.5, rel=0.1)
    assert abs(float(energy.mean())) < 0.05
    forces = torch.stack(drawn["energy/forces"])
    assert float(forces.std()) == pytest.approx(0.25, rel=0.03)
    assert not torch.equal(drawn["energy/forces"][0], drawn["energy/forces"][1])
    again = add_label_noise(batch, ["energy"], noise, (3, 0, 0)).labels["energy"]
    assert torch.equal((again - batch.labels["energy"]).double(), drawn["energy"][0])


def test_noise_is_not_in_the_errors_that_are_shown():
    errors = []
    for noise in ({}, {"energy": 10.0, "forces": 10.0}):
        trainer, metrics = make_trainer(label_noise=noise), {"energy": Metrics("energy")}
        trainer.step([next(trainer.batches(0))], 1, metrics)
        errors.append(metrics["energy"].as_dict())
    assert errors[0] == errors[1]


def test_labels_that_are_missing_stay_missing():
    trainer = make_trainer(label_noise={"energy": 0.5})
    batch = next(trainer.batches(0))
    batch.labels["energy"][1] = math.nan
    noisy = add_label_noise(batch, ["energy"], trainer.options.label_noise, (0, 0, 0))
    assert noisy.labels["energy"].isnan().tolist() == [False, True, False]
    assert noisy.labels["energy/forces"] is batch.labels["energy/forces"]


def depth_rates(trainer):
    """The learning rate of each parameter relative to the run's."""
    names = {id(p): n for n, p in trainer.parameters.items()}
    return {
        names[id(p)]: group["lr"] / trainer.optimizer.param_groups[0]["lr"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


def test_layers_further_from_the_heads_learn_more_slowly():
    rates = depth_rates(uninterrupted_trainer({"finetune": {"config": {"layer_decay": 0.5}}}))
    for start, expected in (
        ("node_heads", 1.0),
        ("edge_last_layers", 1.0),
        ("gnn_layers.1", 0.5),
        ("combination_norms.1", 0.5),
        ("gnn_layers.0", 0.25),
        ("combination_mlps.0", 0.25),
        ("edge_embedder", 0.125),
        ("node_embedders", 0.125),
    ):
        found = {rate for name, rate in rates.items() if name.startswith(start)}
        assert list(found) == [pytest.approx(expected)] * len(found), start
        assert found, start


def uninterrupted_trainer(options):
    trainer = make_trainer(num_epochs=1, **options)
    trainer.fit()
    return trainer


def test_the_factors_b_of_lora_learn_faster():
    options = {"method": "lora", "finetune": {"config": {"loraplus_lr_ratio": 16.0}}}
    trainer = uninterrupted_trainer(options)
    for name, rate in depth_rates(trainer).items():
        assert rate == pytest.approx(16.0 if name.endswith("lora_B") else 1.0), name
    decays = {g["weight_decay"] for g in make_trainer(weight_decay=0.5, **options)
              .optimizer.param_groups if g["factor"] == 16.0}  # fmt: skip
    assert decays == {0.5}


def test_other_groups_are_refused_and_other_decays_taken_over():
    state = written(uninterrupted_trainer({"weight_decay": 0.5}).state())
    with pytest.raises(
        TrainingError, match=r"groups its parameters.*training\.optimizer, and layer_decay"
    ):
        make_trainer(finetune={"config": {"layer_decay": 0.5}}).load_state(state)
    resumed = make_trainer(weight_decay=0.25)
    resumed.load_state(state)
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.25, 0.0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_muon_takes_the_matrices_between_features_and_adamw_the_rest(method, monkeypatch):
    monkeypatch.setattr("pet_finetune.training.optimizer._FEWEST", 5)  # the tiny heads are 6 wide
    trainer = make_trainer(method, optimizer="muon", weight_decay=0.5, learning_rate=1e-3)
    muon, adamw = trainer.optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    names = {id(p): n for n, p in trainer.parameters.items()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    left = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken | left == set(trainer.parameters)
    assert not taken & left
    assert all(n.endswith(".weight") and trainer.parameters[n].dim() == 2 for n in taken)
    kept_out = ("lora_", "embedder", "last_layers", "norm", "bias")
    assert not [n for n in taken if any(word in n for word in kept_out)]
    heads = {n for n in taken if "_heads." in n}
    assert heads
    assert (taken == heads) == (method == "lora")
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("method", ["full", "lora", "heads"])
def test_soap_takes_all_matrices_and_adamw_the_rest(method):
    trainer = make_trainer(method, optimizer="soap", weight_decay=0.5, learning_rate=1e-3)
    soap, adamw = trainer.optimizer.parts
    assert isinstance(soap, SOAP)
    assert isinstance(adamw, torch.optim.AdamW)
    taken = {id(p) for group in soap.param_groups for p in group["params"]}
    assert taken == {id(p) for p in trainer.parameters.values() if p.dim() == 2}
    left = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert left == {id(p) for p in trainer.parameters.values()} - taken
    assert {group["weight_decay"] for group in soap.param_groups} == {0.5}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.95, 0.95)}


def test_muon_evens_out_the_directions_of_an_update():
    """Singular values come to 0.7 to 1.2, times a length that is AdamW's (arXiv:2502.16982)."""
    trainer = make_trainer(optimizer="muon")
    (name,) = [n for n in trainer.parameters if n.endswith("gnn_layers.0.compress.2.weight")]
    weight = trainer.parameters[name]
    before = weight.detach().clone()
    turn = torch.linalg.qr(torch.randn(weight.shape))[0]
    weight.grad = turn * torch.logspace(0, -2, weight.shape[1])  # a hundred times as long one way
    trainer.optimizer.step()
    moved = torch.linalg.svdvals(weight.detach() - before)
    length = 3e-3 * 0.2 * math.sqrt(max(weight.shape))
    assert float((moved / length).min()) > 0.5
    assert float((moved / length).max()) < 1.3


def test_another_optimiser_is_refused_on_restart_and_an_old_torch_on_start(monkeypatch):
    state = written(uninterrupted_trainer({"optimizer": "muon"}).state())
    for other, words in {"soap": "SOAP and AdamW", "adamw": "AdamW"}.items():
        message = rf"another optimiser, Muon and AdamW, and these options say {words}: keep arch"
        with pytest.raises(TrainingError, match=message):
            make_trainer(optimizer=other).load_state(state)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(TrainingError, match="muon needs torch 2.9 or newer"):
        make_trainer(optimizer="muon")


def test_parts_train_one_after_the_other(caplog):
    trainer = make_trainer(num_epochs=4, ema=0.5, weight_decay=0.5, optimizer="adamw",
                           finetune={"unfreeze": {"every": 1}})  # fmt: skip
    before = weights(trainer)
    changed = []

    def look(record):
        now = weights(trainer)
        changed.append({n.split(" ")[1] for n in now if not torch.equal(now[n], before[n])})

    watch(trainer, epoch=look)
    with caplog.at_level("INFO", "pet_finetune"):
        trainer.fit()
    parts = [{".".join(n.split(".")[: 2 if n.startswith(("gnn", "comb")) else 1]) for n in names}
             for names in changed]  # fmt: skip
    heads = {"node_heads", "edge_heads", "node_last_layers", "edge_last_layers"}
    last = {"gnn_layers.1", "combination_norms.1", "combination_mlps.1"}
    first = {"gnn_layers.0", "combination_norms.0", "combination_mlps.0"}
    embeddings = {"node_embedders", "edge_embedder"}
    assert parts == [heads, heads | last, heads | last | first, heads | last | first | embeddings]
    lines = [r.getMessage() for r in caplog.records if "unfreeze" in r.getMessage()]
    assert len(lines) == 4
    assert lines[0].startswith("unfreeze: from epoch 1 on ")
    assert lines[1].endswith("parameters train: heads, gnn_layers.1")
    state = trainer.optimizer.state
    deep = next(p for n, p in trainer.parameters.items() if n.startswith("edge_embedder"))
    assert int(state[deep]["step"]) == 3


def test_what_is_frozen_costs_no_gradient():
    trainer = make_trainer(finetune={"unfreeze": {"every": 1}})
    trainer.step([next(trainer.batches(0))], 1, {"energy": Metrics("energy")})
    for name, parameter in trainer.parameters.items():
        heads = name.split(".")[0].endswith(("heads", "last_layers"))
        assert parameter.requires_grad is heads, name
        assert (parameter.grad is not None) is heads, name


def test_stages_that_name_nothing_are_refused():
    stages = {0: "heads", 1: "gnn_layer.1"}
    with pytest.raises(TrainingError, match=r"called 'gnn_layer.1'. Did you mean 'gnn_layers.1'"):
        make_trainer(finetune={"unfreeze": {"stages": stages}})


def test_parts_that_never_begin_are_told(caplog):
    make_trainer(num_epochs=3, finetune={"unfreeze": {"every": 1}})
    assert "unfreeze: embeddings will never train, the run has 3 epochs" in caplog.text


def test_fewer_digits_change_training_only_and_are_told(caplog):
    with caplog.at_level("INFO", "pet_finetune"):
        trainer = make_trainer(precision="bf16-mixed", num_epochs=1)
        plain = make_trainer(num_epochs=1)
        assert trainer._validation_loss() == plain._validation_loss()
        trainer.fit()
    (line,) = [r.getMessage() for r in caplog.records if "bf16" in r.getMessage()]
    assert line.startswith("bf16-mixed: first batch against float32: energy ")
    assert "meV/A RMS" in line
    assert "energy 0.00 meV" not in line
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in trainer.parameters.values()} == {torch.float32}
    plain.fit()
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name], rtol=0.1, atol=0.02)


def test_computing_parts_again_is_the_same_training():
    plain, again = (
        make_trainer(num_epochs=1, optimizer="adamw"),
        make_trainer(num_epochs=1, optimizer="adamw", gradient_checkpointing=True),
    )
    assert again.model.network.recompute
    for trainer in (plain, again):
        trainer.fit()
    for name, parameter in again.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name], rtol=1e-3, atol=1e-4)
