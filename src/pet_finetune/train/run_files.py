"""What a run leaves behind, as it goes: ``train.csv``, ``best_model.ckpt``, ``last.ckpt``."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from pet_finetune.adapters import active_adapter, save_adapter
from pet_finetune.checkpoint import save_checkpoint
from pet_finetune.errors import TrainingError
from pet_finetune.model import Potential

from .trainer import EpochRecord

BEST = "best_model.ckpt"
LAST = "last.ckpt"
ADAPTER = "adapter"
TABLE = "train.csv"


class RunFiles:
    """Writes the files of one run.

    Args:
        folder: the run's folder; made where it does not exist.
        base_name: what the model that the run started from is called.
        provenance: goes into every checkpoint.

    Raises:
        TrainingError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, base_name: str, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.base_name = base_name
        self.provenance = provenance
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TrainingError(
                f"Cannot write to the output folder '{folder}': {error.strerror}. "
                "Choose another with -o FOLDER."
            ) from error

    @property
    def best(self) -> Path:
        """The best model so far, adapters merged."""
        return self.folder / BEST

    @property
    def last(self) -> Path:
        """All that is needed to go on."""
        return self.folder / LAST

    @property
    def adapter(self) -> Path:
        """The folder of the best adapter."""
        return self.folder / ADAPTER

    def keep_best(self, model: Potential, record: EpochRecord) -> None:
        """Write the best model and, where there is one, its adapter."""
        provenance = {**self.provenance, "epoch": record.epoch, "metric": record.metric}
        if active_adapter(model) is not None:
            save_adapter(model, self.adapter, self.base_name)
        save_checkpoint(self.best, model, provenance=provenance)

    def keep_last(self, model: Potential, training: dict[str, Any]) -> None:
        """Write the state of the run."""
        save_checkpoint(self.last, model, provenance=self.provenance, training=training)

    def add_row(self, record: EpochRecord) -> None:
        """Add an epoch to ``train.csv``; the heading is written with the first."""
        row: dict[str, Any] = {
            "epoch": record.epoch,
            "learning_rate": f"{record.learning_rate:.3e}",
            "loss": f"{record.loss:.6g}",
            "metric": f"{record.metric:.6g}",
            "best": int(record.best),
            "seconds": f"{record.seconds:.3f}",
            "structures_per_second": f"{record.structures_per_second:.2f}",
        }
        for prefix, group in (("train", record.train), ("validation", record.validation)):
            for target, metrics in group.items():
                for name, value in metrics.as_dict().items():
                    row[f"{prefix}/{target}/{name}"] = f"{value:.6g}"
        path = self.folder / TABLE
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, row.keys())
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def drop_rows_after(self, epoch: int) -> None:
        """Forget rows of epochs that a resumed run will do again."""
        path = self.folder / TABLE
        if not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        kept = [row for row in rows[1:] if row and int(row[0]) <= epoch]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([rows[0], *kept])
        partial = path.with_suffix(".partial")
        partial.write_text(text.getvalue(), encoding="utf-8")
        os.replace(partial, path)
