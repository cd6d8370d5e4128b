"""The report of a run, ``report.html``: written at its end, served while it goes on."""

from __future__ import annotations

import html
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pet_finetune.errors import PetFinetuneError
from pet_finetune.installation import __version__
from pet_finetune.log import get_logger
from pet_finetune.training.run_files import (
    ABOUT,
    DIMERS,
    LOG,
    OPTIONS,
    PREDICTIONS,
    REPORT,
    RESULTS,
    TABLE,
    RunFiles,
)

from .page import render
from .run_record import is_running, read_run

_logger = get_logger(__name__)
#: What a page can do without.
_DAMAGEABLE = (RESULTS, ABOUT, TABLE, OPTIONS, f"{DIMERS}.csv", PREDICTIONS)


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Make the page of a run from what lies in its folder.

    Args:
        folder: of the run, finished or not, of one model or of an ensemble.
        output: where the page goes, a file or a folder; without it the run's own folder.

    Raises:
        DataError: the folder holds no run.
        TrainingError: the file cannot be written.
    """
    path = Path(folder if output is None else output)
    path = path / REPORT if path.is_dir() or output is None else path
    # A damaged file may hold half a character.
    RunFiles(path.parent).write(path.name, page_of(Path(folder)).encode(errors="replace"))
    return path


def page_of(folder: Path) -> str:
    """The page of a run, without damaged files.

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
    """Write the report of a finished run; an error becomes a warning."""
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


_HOST = "127.0.0.1"
_HEAD = '<meta charset="utf-8">'


class ReportServer(ThreadingHTTPServer):
    """Serves the page of a run on ``127.0.0.1`` and makes it anew when the run has written.

    Args:
        folder: of the run; it may be yet to be made.
        port: where to listen; 0 for any that is free.
        every: seconds after which the browser asks again while the run goes on.

    Attributes:
        address: of the page.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 0, every: int = 5) -> None:
        super().__init__((_HOST, port), _Handler)
        self._folder, self._every = Path(folder), every
        self._making = threading.Lock()
        self._made: tuple[object, str] = (None, "")
        self.address = f"http://{_HOST}:{self.server_address[1]}/"

    def page(self) -> str:
        """The page as the files are now; with a refresh while the run is not at its end."""
        with self._making:
            state = self._state()
            if self._made[0] != state or state is None:
                self._made = state, self._page()
            return self._made[1]

    def _state(self) -> object:
        """State of the page's sources; None if there is nothing to show yet."""
        files = [f for name in (TABLE, RESULTS, LOG) for f in sorted(self._folder.rglob(name))]
        try:
            times = [(file, file.stat().st_mtime_ns) for file in files]
        except OSError:  # replaced this moment
            return None
        return (times, is_running(self._folder)) if times else None

    def _page(self) -> str:
        try:
            page = page_of(self._folder)
        except PetFinetuneError as error:  # not begun yet
            page = f"<!doctype html>\n<head>\n{_HEAD}\n</head>\n<p>{html.escape(str(error))}</p>\n"
        if (self._folder / RESULTS).exists():
            return page
        refresh = f'<meta http-equiv="refresh" content="{self._every}">'
        return page.replace(_HEAD, f"{_HEAD}\n{refresh}", 1)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer with the page; a name that is not this computer's is refused."""
        # A page of the web could otherwise point a name of its own here and read the report.
        if self.headers.get("Host", "").rpartition(":")[0] not in (_HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            content = self.server.page().encode(errors="replace")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        """Log nothing, because a browser asks every few seconds."""
