"""The loop: it learns, stops, goes on exactly, and says what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.loader import Loader
from pet_finetune.errors import TrainingError
from pet_finetune.training.metrics import Metrics
from pet_finetune.training.objectives import best_window
from pet_finetune.training.trainer import Trainer
from trainers import (
    TRAIN,
    assert_identical,
    average_of,
    curve,
    interrupt_after,
    make_trainer,
    watch,
    weights,
    written,
)

KINDS = {
    "full": {},
    "full, rmse": {"best_model_metric": "rmse_prod", "weight_decay": 0.1, "scheduler": "constant"},
    "lora, dropout, ema": {"method": "lora", "config": {"dropout": 0.3}, "ema": 0.9},
    "extra loss": {"extra": True},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "ema": None, "weight_decay": 0.1},
    "heads, ema": {"method": "heads", "ema": 0.9, "best_model_metric": "loss"},
}


@cache
def uninterrupted(kind):
    """The weights, the lines of the epochs and the result of a run that is left alone."""
    torch.manual_seed(11)
    whole, records = make_trainer(**KINDS[kind]), []
    watch(whole, epoch=records.append)
    torch.manual_seed(12)
    result = whole.fit()
    assert result.finished
    assert whole.progress.step == 6
    return weights(whole), curve(records), result


@pytest.mark.few(12)
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_never_stopped(kind, stop):
    torch.manual_seed(11)
    stopped, resumed_records, saved = make_trainer(**KINDS[kind]), [], []
    watch(
        stopped, epoch=resumed_records.append, save=lambda: saved.append(written(stopped.state()))
    )
    interrupt_after(stopped, stop)
    torch.manual_seed(12)
    result = stopped.fit()
    assert not result.finished
    assert result.epochs == (stop - 1) // 3

    torch.manual_seed(99)  # another process has other random numbers
    resumed = make_trainer(**KINDS[kind])
    resumed.load_state(saved[-1])
    watch(resumed, epoch=resumed_records.append)
    result = resumed.fit()
    expected, lines, whole = uninterrupted(kind)
    assert_identical(weights(resumed), expected)
    assert curve(resumed_records) == lines
    assert result == whole


def test_a_run_stopped_after_every_step_is_the_same_too():
    options = KINDS["lora, dropout, ema"]
    torch.manual_seed(11)
    trainer = make_trainer(**options)
    torch.manual_seed(12)
    stops = 0
    while True:
        interrupt_after(trainer, 1)
        if trainer.fit().finished:
            break
        stops += 1
        state = written(trainer.state())
        torch.manual_seed(stops)
        trainer = make_trainer(**options)
        trainer.load_state(state)
    assert stops == 6
    assert_identical(weights(trainer), uninterrupted("lora, dropout, ema")[0])


def test_an_epoch_in_two_parts_reports_all_of_it():
    records = []
    trainer = make_trainer(num_epochs=1)
    interrupt_after(trainer, 2)
    trainer.fit()
    state = written(trainer.state())
    state["progress"]["seconds"] = 100.0
    resumed = make_trainer(num_epochs=1)
    resumed.load_state(state)
    watch(resumed, epoch=records.append)
    resumed.fit()
    assert 100.0 < records[0].seconds < 120.0
    assert records[0].structures_per_second == pytest.approx(7 / 100.0, rel=0.1)
    assert records[0].train["energy"].state()["energy"][2] == 7


def test_it_learns_and_hands_out_the_best_model():
    best = []
    trainer = make_trainer(num_epochs=6, batch_size=2)
    before = trainer._validation_loss()
    watch(trainer, best=lambda record: best.append(record))
    result = trainer.fit()
    assert trainer._validation_loss() < 0.9 * before
    assert [record.best for record in best] == [True] * len(best)
    metrics = [record.metric for record in best]
    assert metrics == sorted(metrics, reverse=True)
    assert (result.best_epoch, result.best_metric) == (best[-1].epoch, metrics[-1])


def test_an_extra_loss_adds_to_the_loss_and_to_its_gradient():
    plain = make_trainer(grad_clip_norm=None)
    trainer, records = make_trainer(extra=True, grad_clip_norm=None), []
    term = trainer.features[0]
    before, losses = weights(plain), []
    for each in (plain, trainer):
        result = each.step([next(each.batches(0))], 1, {"energy": Metrics("energy")})
        losses.append([result.loss, *result.extra.values()])
    assert losses[1] == pytest.approx([losses[0][0] + term.values[0], term.values[0]])
    for name, parameter in trainer.parameters.items():
        own = 0.2 * before[f"now {name}"] if name.startswith("node_last_layers") else 0.0
        torch.testing.assert_close(parameter.grad, plain.parameters[name].grad + own)

    watch(trainer, epoch=records.append)
    trainer.fit()
    assert records[0].extra["shrink"] == pytest.approx(sum(term.values[1:3]) / 3)
    assert records[0].loss > records[0].extra["shrink"]


def test_what_is_frozen_stays():
    trainer = make_trainer("heads")
    before = {n: p.detach().clone() for n, p in trainer.model.network.named_parameters()}
    trainer.fit()
    for name, parameter in trainer.model.network.named_parameters():
        assert torch.equal(parameter, before[name]) is not (name in trainer.parameters), name


def test_the_average_is_what_is_validated_and_kept():
    seen = []
    trainer = make_trainer(ema=0.9, num_epochs=1)
    watch(
        trainer,
        best=lambda record: seen.append(
            {n: p.detach().clone() for n, p in trainer.parameters.items()}
        ),
    )
    trainer.fit()
    assert_identical(seen[0], average_of(trainer))
    current = {n: p.detach() for n, p in trainer.parameters.items()}
    assert not all(torch.equal(seen[0][n], p) for n, p in current.items())


def fixed_metrics(monkeypatch, values):
    """Let validation give these numbers, one an epoch, and then the last one."""
    remaining = list(values)
    monkeypatch.setattr(
        "pet_finetune.training.trainer.best_metric",
        lambda *ignored: remaining.pop(0) if len(remaining) > 1 else remaining[0],
    )


@pytest.mark.parametrize(
    ("metrics", "early", "epochs", "best_epoch"),
    [
        ([5.0, 4.0, 4.5, 4.5, 4.5], {"patience": 2}, 4, 2),
        ([5.0, 4.0, 4.5, 3.9, 4.5, 4.5], {"patience": 2}, 6, 4),
        # Each step is too small to count, but they add up: 5 -> 4.7 -> 4.4.
        ([5.0, 4.7, 4.4, 4.4, 4.4], {"patience": 2, "min_delta": 0.1}, 5, 3),
        ([5.0, 4.9, 4.9], {"patience": 2, "min_delta": 0.1}, 3, 2),
        ([math.inf, math.inf], {"patience": 3}, 4, 1),
    ],
)
def test_patience(monkeypatch, metrics, early, epochs, best_epoch):
    fixed_metrics(monkeypatch, metrics)
    trainer = make_trainer(num_epochs=20, early_stopping=early, best_model_window=1)
    result = trainer.fit()
    assert result.finished
    assert result.stopped_early
    assert (result.epochs, result.best_epoch) == (epochs, best_epoch)


@pytest.mark.parametrize(
    ("window", "metrics", "best_epoch", "best_metric"),
    [
        # The first epoch met its few structures by chance.
        (1, [0.1, 9.0, 3.0, 3.0, 1.5, 3.3], 1, 0.1),
        (3, [0.1, 9.0, 3.0, 3.0, 1.5, 3.3], 5, 2.5),
        # A chance in the middle counts as one of three.
        (3, [9.0, 9.0, 0.1, 9.0, 3.0, 3.0], 5, 12.1 / 3),
        # Windows that are not full are beaten by whatever comes.
        (9, [0.1, 9.0, 3.0, 3.0, 1.5, 3.3], 6, 19.9 / 6),
    ],
)
def test_the_best_is_picked_by_a_mean_over_epochs(
    monkeypatch, window, metrics, best_epoch, best_metric
):
    fixed_metrics(monkeypatch, metrics)
    trainer = make_trainer(num_epochs=6, best_model_window=window)
    resumed = make_trainer(num_epochs=6, best_model_window=window)
    watch(trainer, save=lambda: resumed.load_state(written(trainer.state())))
    result = trainer.fit()
    assert result.best_epoch == best_epoch
    assert result.best_metric == pytest.approx(best_metric)
    assert resumed.progress == trainer.progress


@pytest.mark.parametrize(("epochs", "window"), [(1, 1), (19, 1), (20, 2), (50, 5), (1000, 5)])
def test_longer_runs_pick_by_more_epochs(epochs, window):
    assert best_window(TrainingOptions(num_epochs=epochs)) == window
    assert best_window(TrainingOptions(num_epochs=epochs, best_model_window=3)) == 3


def test_a_run_that_stopped_early_does_not_go_on_when_resumed(monkeypatch):
    fixed_metrics(monkeypatch, [1.0])
    options = {"num_epochs": 10, "early_stopping": {"patience": 1}}
    trainer = make_trainer(**options)
    trainer.fit()
    resumed = make_trainer(**options)
    resumed.load_state(written(trainer.state()))
    result = resumed.fit()
    assert result.stopped_early
    assert result.epochs == 2
    assert_identical(weights(resumed), weights(trainer))


@pytest.mark.parametrize(("seconds", "saved"), [(600.0, [1, 3, 5]), (0.0, [1, 2, 3, 4, 5])])
def test_saves_at_first_every_few_epochs_and_minutes_and_at_the_end(monkeypatch, seconds, saved):
    monkeypatch.setattr("pet_finetune.training.trainer._SECONDS_BETWEEN_SAVES", seconds)
    epochs = []
    trainer = make_trainer(num_epochs=5, checkpoint_interval=3)
    watch(trainer, save=lambda: epochs.append(trainer.progress.epoch))
    trainer.fit()
    assert epochs == saved


@pytest.mark.parametrize(("label", "value"), [("energy", 1e300), ("energy/forces", 1e25)])
def test_a_loss_that_is_not_finite_names_the_structures(label, value):
    """The square of such a label overflows; the message names the structures of its batch."""
    broken = list(TRAIN)
    labels = {**broken[4].labels, label: torch.full_like(broken[4].labels[label], value)}
    broken[4] = replace(broken[4], labels=labels)
    trainer = make_trainer(train=broken)
    seen = []
    watch(trainer, step=lambda *ignored: seen.append(trainer.progress.batch))
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert f"not a finite number in epoch 1, batch {len(seen) + 1}:" in message
    frames = next(list(batch.frames) for batch in trainer.training.epoch(0) if 4 in batch.frames)
    assert f"frames {', '.join(map(str, frames))} of tiny.xyz" in message
    assert "lower learning_rate" in message


def test_a_gradient_that_is_not_finite_is_caught_before_the_step():
    trainer = make_trainer()
    before = weights(trainer)
    name = next(iter(trainer.parameters))
    trainer.parameters[name].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match="gradient of the loss is not a finite number"):
        trainer.fit()
    assert_identical(weights(trainer), before)


def test_a_state_of_other_parameters_is_refused():
    state = written(make_trainer("heads").state())
    with pytest.raises(TrainingError, match="saved run trains other parameters"):
        make_trainer("lora").load_state(state)


def test_options_that_leave_nothing_to_do_are_refused():
    trainer = make_trainer()
    loader = Loader(TRAIN, 3.5, max_atoms_per_batch=6, min_atoms_per_batch=50)
    options = TrainingOptions(max_atoms_per_batch=6, min_atoms_per_batch=50)
    with pytest.raises(TrainingError, match=r"min_atoms_per_batch \(50\) leaves out every batch"):
        Trainer(trainer.model, trainer.objectives, loader, loader, options, 1e-3)


def _packed(num_epochs, **more):
    """A trainer whose epochs differ in length."""
    trainer = make_trainer()
    loader = Loader(TRAIN, 3.5, max_atoms_per_batch=8, shuffle=True, seed=2)
    options = TrainingOptions(max_atoms_per_batch=8, num_epochs=num_epochs, **more)
    return Trainer(trainer.model, trainer.objectives, loader, trainer.validation, options, 1e-3)


def test_no_epoch_is_planned_before_its_time(monkeypatch):
    planned = []
    plain = Loader._order
    monkeypatch.setattr(Loader, "_order", lambda own, k: planned.append(k) or plain(own, k))
    trainer = _packed(1000, warmup_fraction=0.1, scheduler="cosine")
    seen = []
    watch(trainer, step=lambda *ignored: seen.append(set(planned)))
    interrupt_after(trainer, trainer.num_steps(0) + 1)
    trainer.fit()
    assert seen[0] == {0}
    assert seen[-1] == {0, 1}
    assert len(planned) < 10


def test_epochs_that_differ_in_length_are_equal_parts_of_the_schedule():
    trainer = _packed(8)
    lengths = [trainer.num_steps(epoch) for epoch in range(8)]
    assert len(set(lengths)) > 1, "they are to differ"
    places = []
    for epoch, length in enumerate(lengths):
        for batch in range(length):
            trainer.progress.epoch, trainer.progress.batch = epoch, batch
            places.append(trainer._scheduled_step() / trainer.total_steps)
            assert places[-1] == pytest.approx((epoch + batch / length) / 8)
    assert places == sorted(places)
    assert places[0] == 0.0
    even = make_trainer(num_epochs=3)
    even.progress.epoch, even.progress.batch = 2, 1
    assert even._scheduled_step() == 2 * even.num_steps(0) + 1


def test_gradients_are_clipped_and_biases_do_not_decay():
    trainer = make_trainer(grad_clip_norm=1e-9, weight_decay=0.5, num_epochs=1)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() <= 1 for p in groups[1]["params"])
    trainer.fit()
    norms = [p.grad.norm() for p in trainer.parameters.values() if p.grad is not None]
    assert float(torch.stack(norms).norm()) <= 1.01e-9
