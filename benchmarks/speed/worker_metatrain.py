"""The worker that measures metatrain: ``python -m benchmarks.speed.worker_metatrain``.

Runs in metatrain's environment, which need not have pet-finetune. Which device metatrain
evaluates on cannot be chosen, so the parent hides the GPU where it must not be used.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path

from benchmarks.speed.protocol import serve
from benchmarks.speed.worker import Bench, Tool
from metatomic_ase import MetatomicCalculator
from metatrain.cli.eval import eval_model
from metatrain.cli.train import train_model
from metatrain.utils.io import load_model
from omegaconf import OmegaConf


class Metatrain(Tool):
    """What ``mtt train``, ``mtt eval`` and scripts with the exported model run."""

    epoch_logger = ""  # the root

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("metatrain", "metatomic-torch", "metatomic-ase")}

    def train(self, options: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        train_model(
            OmegaConf.load(options),
            output=folder / "model.pt",
            extensions=folder / "extensions",
            checkpoint_dir=folder,
        )

    def calculator(self, model: Path, device: str) -> MetatomicCalculator:
        return MetatomicCalculator(model, device=device)

    def evaluate(self, model: Path, options: Path, batch_size: int, device: str) -> None:
        # Without the ten extra batches of its warm-up, which are there for timing.
        os.chdir(options.parent)  # predictions are written to the working directory
        loaded = load_model(model)
        content = OmegaConf.load(options)
        eval_model(loaded, content, "predicted.xyz", batch_size=batch_size, warm_up=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    serve(Bench(Metatrain()))
