"""The report of a run, ``report.html``: at the end of training, or again at any time."""

from __future__ import annotations

from pathlib import Path

from pet_finetune.log import get_logger
from pet_finetune.training.run_files import REPORT, RunFiles
from pet_finetune.version import __version__

from .page import render
from .reading import read_run

_logger = get_logger(__name__)


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Make the page of a run from what lies in its folder.

    Args:
        folder: of the run, finished or not, of one model or of an ensemble.
        output: where the page goes; ``report.html`` in the folder without it.

    Returns:
        The file.

    Raises:
        DataError: the folder holds no run.
        TrainingError: the file cannot be written.
    """
    path = Path(output) if output is not None else Path(folder) / REPORT
    page = render(read_run(Path(folder)), __version__)
    RunFiles(path.parent).write(path.name, page)
    return path


def report_or_warn(folder: Path) -> None:
    """Write the report of a run that has just ended; whatever goes wrong, the run stands."""
    try:
        path = write_report(folder)
    except Exception as error:  # noqa: BLE001 - hours of training must not end in a page's error
        _logger.warning(
            "the report was not written (%s: %s); the run is complete without it. Try again with: "
            "pet-finetune report %s",
            type(error).__name__,
            error,
            folder,
        )
        return
    _logger.info("report: %s", path)
