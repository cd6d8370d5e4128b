"""The average of the weights, its recursion and lending it to the model; the last baselines."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ase.data import chemical_symbols
from torch import nn

from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.training import TrainingOptions
from pet_finetune.training.prepare import own_features
from pet_finetune.training.run_files import RunFiles
from pet_finetune.training.weights import Averaging, SettledBaselines
from trainers import CELLS, TRAIN, make_trainer


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


def settled_files(trainer, folder):
    """The files of a run that ends with the model as it stands."""
    (feature,) = (f for f in trainer.features if isinstance(f, SettledBaselines))
    files = RunFiles(folder)
    row = [chemical_symbols[trainer.model.species[0]], 1, 0.0, 0.0]
    files.tell({"baselines": [{"target": "energy", "rows": [row]}]})
    files.keep_best(trainer.model, SimpleNamespace(epoch=1, metric=0.0))
    feature.complete(load_checkpoint(files.best), files)
    return load_checkpoint(files.best).model, read_adapter(files.adapter)


def test_the_best_model_and_its_adapter_get_baselines_that_fit_what_is_left_over(tmp_path):
    trainer = make_trainer("lora", train=CELLS)
    trainer.model.composition.get("energy").add_(0.5)
    best, adapter = settled_files(trainer, tmp_path)
    numbers = torch.tensor(best.species)
    counts = torch.stack([(s.numbers[:, None] == numbers).sum(0) for s in TRAIN]).double()
    said = torch.cat([best.predict(b.graph).energy for b in trainer.training.view()]).detach()
    left = torch.stack([s.labels["energy"] for s in TRAIN]) - said
    atoms = counts.sum(1)
    left_over = (counts / atoms[:, None]).T @ (left / atoms)
    torch.testing.assert_close(left_over, torch.zeros_like(left_over), rtol=0, atol=1e-4)
    assert torch.equal(adapter.targets[0].composition, best.composition.get("energy"))
    ((*_, told),) = RunFiles(tmp_path).about()["baselines"][0]["rows"]
    assert told == best.composition.get("energy")[0]


def test_baselines_stay_where_no_energy_is_known_or_of_molecules_or_they_are_given(tmp_path):
    forces = [replace(s, labels={"energy/forces": s.labels["energy/forces"]}) for s in CELLS]
    for name, structures in (("forces", forces), ("molecules", [*CELLS, TRAIN[0]])):
        trainer = make_trainer("lora", train=structures)
        best, _ = settled_files(trainer, tmp_path / name)
        assert torch.equal(best.composition.get("energy"), trainer.model.composition.get("energy"))
    for given in ({"baseline": {"mode": "keep"}}, {"atomic_baseline": {"energy": 0.0}}):
        features = own_features(TrainingOptions.model_validate(given))
        assert not any(isinstance(f, SettledBaselines) for f in features)
