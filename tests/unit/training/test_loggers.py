"""What is shown of a run is new once a second and at an epoch's end, as far as the run is."""

from __future__ import annotations

from contextlib import closing

from pet_finetune.training import loggers
from pet_finetune.training.loggers import RunDisplay
from pet_finetune.training.step import StepProgress


def test_the_text_is_new_once_a_second_and_at_the_end_of_an_epoch(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now)
    with closing(RunDisplay(num_epochs=2, log_interval=1, epochs_done=1)) as display:
        watch = display._watch
        for done, later in ((1, 0.0), (2, 0.1), (3, 1.0), (4, 0.1)):
            now += later
            display.step_ended(StepProgress(done, 4, done / 10, {}, 10.0))
            assert (
                watch.what == f"epoch 2/2, loss {0.1 if done == 2 else done / 10}, 10 structures/s"
            )
            assert (watch.done, watch.total) == (4 + done, 8)


def test_what_never_began_is_closed_too():
    RunDisplay(num_epochs=2, log_interval=1).close()
