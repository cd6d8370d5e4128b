"""The report of a run, ``report.html``: at the end of training, or again at any time."""

from __future__ import annotations

from pathlib import Path

from pet_finetune.errors import PetFinetuneError
from pet_finetune.log import get_logger
from pet_finetune.training.run_files import (
    ABOUT,
    DIMERS,
    OPTIONS,
    PREDICTIONS,
    REPORT,
    RESULTS,
    TABLE,
    RunFiles,
)
from pet_finetune.version import __version__

from .page import render
from .reading import read_run

_logger = get_logger(__name__)
#: What a page can do without.
_DAMAGEABLE = (RESULTS, ABOUT, TABLE, OPTIONS, f"{DIMERS}.csv", PREDICTIONS)


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Make the page of a run from what lies in its folder.

    Args:
        folder: of the run, finished or not, of one model or of an ensemble.
        output: where the page goes, a file, or a folder for ``report.html`` in it; without it the
            run's own folder.

    Returns:
        The file.

    Raises:
        DataError: the folder holds no run.
        TrainingError: the file cannot be written.
    """
    path = Path(folder if output is None else output)
    path = path / REPORT if path.is_dir() or output is None else path
    page = page_of(Path(folder)).encode(
        errors="replace"
    )  # a damaged file may hold half a character
    RunFiles(path.parent).write(path.name, page)
    return path


def page_of(folder: Path) -> str:
    """The page of a run, without what a damaged file of it says.

    The files are plain JSON and tables, which anyone can change: what they hold is used as it
    stands, and the file that breaks the page is found by leaving one out after another.
    """
    try:
        return render(read_run(folder), __version__)
    except PetFinetuneError:
        raise
    except Exception as error:  # whatever the content of a file leads to
        for left_out in [*((name,) for name in _DAMAGEABLE), _DAMAGEABLE]:
            try:
                page = render(read_run(folder, left_out), __version__)
            except Exception:  # noqa: BLE001 - it is another file, or none of them
                continue
            names = ", ".join(f"'{folder / name}'" for name in left_out)
            reason = f"{type(error).__name__}: {error}"
            _logger.warning("damaged and left out of the report: %s (%s)", names, reason)
            return page
        raise


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
