"""Files that a command line names are looked at before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pet_finetune.files import check_checkpoint, check_file

if TYPE_CHECKING:  # pydantic takes longer to import than --help may take
    from pet_finetune.config.dataset import DatasetOptions

__all__ = ["check_data", "check_models", "check_sets"]


def check_models(*checkpoints: str | Path | None) -> None:
    """Refuse checkpoints that are not there.

    Raises:
        CheckpointError: the first of them.
    """
    for checkpoint in checkpoints:
        if checkpoint is not None:
            check_checkpoint(Path(checkpoint))


def check_data(*files: str | Path) -> None:
    """Refuse files of structures that are not there.

    Raises:
        DataError: the first of them.
    """
    for file in files:
        check_file(Path(file), "data file")


def check_sets(datasets: Iterable[DatasetOptions]) -> None:
    """Refuse files of data sets that are not there.

    Raises:
        DataError: the first of them.
    """
    for dataset in datasets:
        targets = dataset.targets.values()
        check_data(dataset.systems.read_from, *(t.read_from for t in targets if t.read_from))
