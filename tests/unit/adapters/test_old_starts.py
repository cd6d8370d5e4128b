"""Files of adapters that started from PiSSA's or OLoRA's factors, which once were methods here.

They were written by the last release that had them; what it predicted is beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models import ethanol
from pet_finetune.adapters.peft_files import load_adapter
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import CheckpointError

FILES = Path(__file__).with_name("pissa")
EXPECTED = json.loads((FILES / "predictions.json").read_text())


def assert_predicts(model, name):
    found = model.predict(batch_from_atoms(ethanol(), model.cutoff, model.dtype))
    for what in ("energy", "forces"):
        expected = torch.tensor(EXPECTED[name][what], dtype=torch.float64)
        torch.testing.assert_close(getattr(found, what), expected, rtol=0, atol=1e-9)
    assert abs(EXPECTED[name]["energy"][0] - EXPECTED["base"]["energy"][0]) > 0.1


@pytest.mark.parametrize("name", ["pissa", "olora", "dora"])
def test_an_old_adapter_opens_as_plain_lora_of_twice_the_rank(name):
    model = load_checkpoint(FILES / "base.ckpt").model
    config = load_adapter(model, FILES / name)
    assert config.rank == 4  # it trained with 2
    assert_predicts(model, name)


def test_the_checkpoint_of_an_interrupted_run_opens_and_does_not_go_on():
    assert_predicts(load_checkpoint(FILES / "run.ckpt").model, "pissa")
    with pytest.raises(CheckpointError, match="Start a new run from the file with -c"):
        load_checkpoint(FILES / "run.ckpt", keep_adapter=True)
