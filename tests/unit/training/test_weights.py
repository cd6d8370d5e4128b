"""The average of the weights: its recursion, and lending it to the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pet_finetune.training.weights import Averaging


def make(decay=0.9):
    parameters = {"w": nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))}
    average = Averaging()
    options = SimpleNamespace(ema=decay)
    average.start(SimpleNamespace(parameters=parameters, options=options), None)
    return parameters, average


def test_the_recursion_with_its_quick_start():
    parameters, average = make(decay=0.3)
    expected = parameters["w"].detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            parameters["w"] += n
        average.after_update(0)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameters["w"].detach()
    torch.testing.assert_close(average.average["w"], expected)
    assert average.updates == 29


def test_the_model_gets_its_own_weights_back_bit_for_bit():
    parameters, average = make()
    with torch.no_grad():
        parameters["w"] *= 1 / 3
    average.after_update(0)
    before = parameters["w"].detach().clone()

    def fail():
        with average.weights():
            assert torch.equal(parameters["w"], average.average["w"])
            assert not torch.equal(parameters["w"], before)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(parameters["w"], before)


def test_goes_on_from_a_saved_average():
    parameters, whole = make()
    saved = None
    for n in range(6):
        if n == 3:
            average = {k: v.clone() for k, v in whole.average.items()}
            saved = {"average": average, "updates": whole.updates}
        with torch.no_grad():
            parameters["w"] += 0.1 * n
        whole.after_update(0)
    parameters, resumed = make()
    resumed.load_state(saved)
    for n in range(6):
        with torch.no_grad():
            parameters["w"] += 0.1 * n
        if n >= 3:
            resumed.after_update(0)
    assert torch.equal(resumed.average["w"], whole.average["w"])
