"""The worker that measures pet-finetune: ``python -m benchmarks.speed.worker_ours``."""

from __future__ import annotations

from pathlib import Path

import yaml
from benchmarks.speed.protocol import serve
from benchmarks.speed.worker import Bench, Tool

import pet_finetune
from pet_finetune.api import evaluate_files, train
from pet_finetune.calculator import PETCalculator
from pet_finetune.config.load import load_options
from pet_finetune.training.soap import LightOptimizer


class PetFinetune(Tool):
    """What ``pet-finetune train``, ``pet-finetune eval`` and scripts with ASE run."""

    epoch_logger = "pet_finetune.training.loggers"
    optimizer = LightOptimizer

    def versions(self) -> dict[str, str]:
        return {"pet-finetune": pet_finetune.__version__}

    def train(self, options: Path, folder: Path) -> None:
        loaded = load_options(options)
        train(loaded.options, folder, notices=loaded.notices, source=options)

    def calculator(self, model: Path, device: str) -> PETCalculator:
        return PETCalculator(model, device=device)

    def evaluate(self, model: Path, options: Path, batch_size: int, device: str) -> None:
        # The batches of `pet-finetune eval` have one size; `rows.EVALUATION_BATCH` is that.
        structures = yaml.safe_load(options.read_text())["systems"]["read_from"]
        evaluate_files(model, [structures], device=device)


if __name__ == "__main__":
    serve(Bench(PetFinetune()))
