"""Several processes: who starts them, what they say together, and how all of them end."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from pet_finetune import launchers, processes
from pet_finetune.data.epochs import deal
from pet_finetune.data.loader import Loader
from pet_finetune.device import choose_device
from pet_finetune.errors import ConfigError, TrainingError
from pet_finetune.training.step import add_gradients
from tiny_data import crystals, molecules, structures_of
from together import together
from trainers import make_trainer

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n0",
            "MASTER_PORT": "29500"}  # fmt: skip
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
         "SLURM_JOB_NODELIST": "gpu[003-004,9],x1", "SLURM_NTASKS": "8"}  # fmt: skip


def test_what_torchrun_says_is_heeded():
    found = launchers.find_launch(environment=TORCHRUN)
    assert found == launchers.Launch(5, 8, 1, "n0", 29500, "torchrun")
    assert launchers.find_launch(environment={**TORCHRUN, **SLURM}) == found
    assert launchers.find_launch(False, environment=TORCHRUN) is None
    assert launchers.find_launch(environment={**TORCHRUN, "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[003-004,9],x1", "gpu003"), ("a1,b[2-3]", "a1"), ("r[1-2]n[03-05],x", "r1n03"),
     ("alone", "alone")],
)  # fmt: skip
def test_what_srun_says_is_heeded(hosts, first):
    environment = {**SLURM, "SLURM_JOB_NODELIST": hosts}
    found = launchers.find_launch(None, 1234, environment)
    assert found == launchers.Launch(5, 8, 1, first, 1234, "srun")


def test_the_script_of_a_slurm_job_is_one_process():
    environment = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NUM_TASKS"}
    assert launchers.find_launch(environment=environment) is None


def test_wanted_processes_that_nobody_started_are_refused():
    with pytest.raises(ConfigError, match=r"distributed: true, but neither torchrun nor srun"):
        launchers.find_launch(True, environment={})


def test_two_processes_on_one_gpu_are_refused():
    processes.check_distinct([("a", "x"), ("b", "x"), ("a", "y"), ("a", ""), ("a", "")])
    with pytest.raises(ConfigError, match="processes 0 and 2 on host 'a' have the same GPU"):
        processes.check_distinct([("a", "x"), ("b", "x"), ("a", "x")])


def test_each_process_has_a_device_of_its_own(monkeypatch):
    assert choose_device("auto", 3) == torch.device("cpu")
    assert choose_device("4") == torch.device("cpu")
    with pytest.raises(ConfigError, match="one device for all processes"):
        choose_device("cuda:1", 0)
    with pytest.raises(ConfigError, match="no GPU for process 3 of this host, torch finds 0"):
        choose_device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="no GPU for process 2 of this host, torch finds 2"):
        choose_device("auto", 2)


def test_structures_are_dealt_out_by_work():
    work = np.array([7, 1, 5, 1, 3, 3])
    hands = deal(work, 2)
    assert sorted(np.concatenate(hands).tolist()) == list(range(6))
    assert [int(work[hand].sum()) for hand in hands] == [10, 10]
    assert [len(hand) for hand in deal(work[:2], 3)] == [1, 1, 0]


def test_the_parts_of_a_batch_are_its_structures_and_know_all_of_it():
    loader = Loader(structures_of([*molecules(4), *crystals(3)]), 3.5, batch_size=7, augment=True)
    whole = next(loader.epoch(2))
    parts = [next(loader.shared(rank, 3).epoch(2)) for rank in range(3)]
    assert sorted(p for part in parts for p in part.whole.positions.tolist()) == list(range(7))
    assert {part.size for part in parts} == {7}
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    for part in parts:
        assert part.where == whole.where
        rows = part.whole.rows(per_atom=True)
        assert torch.equal(part.graph.numbers, whole.graph.numbers[rows])
        assert torch.allclose(part.labels["energy/forces"], whole.labels["energy/forces"][rows])
        for name in whole.labels:
            assert int(part.num_known(name)) == int(whole.num_known(name))
    first = [part.first(3) for part in parts]
    assert sum(one.graph.num_structures for one in first) == 3
    assert {one.size for one in first} == {3}


def test_batches_are_dealt_out_whole():
    loader = Loader(structures_of(molecules(7)), 3.5, batch_size=2)
    frames = [[batch.frames for batch in loader.dealt(rank, 3)] for rank in range(3)]
    assert frames == [[(0, 1), (6,)], [(2, 3)], [(4, 5)]]


def gradients(rank_without):
    """Of three parameters: one has a gradient everywhere, one on some, one nowhere."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + processes.rank())
    if processes.rank() != rank_without:
        parameters[1].grad = torch.ones(2)
    flag = add_gradients(parameters, processes.rank() == 1)
    return [None if p.grad is None else p.grad.tolist() for p in parameters], flag


def test_gradients_are_added_and_what_nobody_has_stays_away():
    expected = ([[3.0, 3.0], [1.0, 1.0], None], True)
    assert together(2, gradients, 0) == [expected, expected]
    assert gradients(5) == ([[1.0, 1.0], [1.0, 1.0], None], False)


def by_itself():
    own = processes.gathered(processes.rank())
    with processes.alone():
        inside = (processes.size(), processes.rank(), processes.first(), processes.gathered("x"))
    numbers = [processes.next_number("n")]
    return own, inside, processes.from_first(processes.rank()), processes.leader(), numbers


def test_processes_speak_together_or_work_by_themselves():
    first, second = together(2, by_itself)
    assert first[:4] == ([0, 1], (1, 0, True, ["x"]), 0, True)
    assert second[:4] == ([0, 1], (1, 0, True, ["x"]), 0, False)
    assert sorted(first[4] + second[4]) == [0, 1]


@pytest.fixture
def impatient(monkeypatch, tmp_path):
    """What takes a minute at most takes two seconds; the file of the error's text."""
    short = {"_BEAT": 0.1, "_SILENCE": 1.5, "_SUSPICIOUS_SILENCE": 1.0, "_TO_TELL": 0.3}
    for name, seconds in short.items():
        monkeypatch.setattr(processes, name, seconds)
    monkeypatch.setenv(processes.ERROR_FILE, str(tmp_path / "error.txt"))
    return tmp_path / "error.txt"


def fail_alone():
    if processes.rank() == 1:
        raise TrainingError("this one is broken")
    processes.barrier()


def be_killed(rank):
    processes.barrier()  # all have met; before that, they wait for each other for minutes
    if processes.rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


def be_silent():
    """As when a host is gone: no sign of life, and no connection that closes."""
    processes.barrier()
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.barrier()


def test_an_error_of_one_ends_all_with_its_message(impatient):
    began = time.monotonic()
    assert together(2, fail_alone) == [1, 1]
    assert impatient.read_text() == "process 1 of 2: this one is broken"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("end", [be_killed, pytest.param(be_silent, marks=pytest.mark.slow)])
def test_the_end_of_one_ends_all(impatient, end):
    found = together(3, end, *([1] if end is be_killed else []))
    assert (found[0], found[2]) == (1, 1)
    assert impatient.read_text().startswith("process 1 of 3 gives no sign of life any more")


def test_the_end_of_the_first_ends_all(impatient, capfd):
    assert together(2, be_killed, 0) == [-signal.SIGKILL, 1]
    assert "error: process 0 is gone" in capfd.readouterr().err


def diverge():
    made = make_trainer(method="lora")
    rank, size = processes.rank(), processes.size()
    made.training = made.training.shared(rank, size)
    made.training._prepared[0].labels["energy"].fill_(float("inf"))  # one of them has it
    made.fit()


def test_a_number_that_is_none_on_one_is_an_error_of_all(impatient):
    assert together(2, diverge)[1] == 1
    assert "The loss is not a finite number in epoch 1, batch" in impatient.read_text()
    assert "frames" in impatient.read_text()
