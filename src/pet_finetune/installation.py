"""This installation: its version, libraries that only some options need, folders for caches.

Libraries below us (ASE, matplotlib, torch's compiler) ask for the home or the name of the user,
some on import, and raise where there is none (in containers, batch jobs, for service users). So it
is made up for before any of them is imported.
"""

from __future__ import annotations

import getpass
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from pet_finetune.errors import PetFinetuneError

__version__ = "0.1.0"


_logger = logging.getLogger(__name__)

#: The library behind ``quant_bits`` and the extra of the package that installs it.
QUANTIZATION = ("bitsandbytes", "quant")
#: The library behind long-range features and the extra that installs it.
LONG_RANGE = ("torchpme", "long-range")


def missing_extra(library: str, extra: str) -> str | None:
    """Advice if a library is not installed, else None."""
    if find_spec(library) is not None:
        return None
    return (
        f"needs the library {library}, which is not installed. "
        f"Install it with: pip install 'pet-finetune[{extra}]'."
    )


def plotting() -> tuple[Any, Any]:
    """``matplotlib.rc_context`` and ``matplotlib.figure.Figure``.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PetFinetuneError(
            "Plots need matplotlib: pip install 'pet-finetune[plots]'."
        ) from error
    return rc_context, Figure


def drawn(what: str, draw: Callable[[], object]) -> bool:
    """Draw a picture that its run can do without; whatever prevents it is a line in the log.

    Returns:
        Whether it is there.
    """
    try:
        draw()
    except PetFinetuneError as error:
        _logger.info("%s: not drawn. %s", what, error)
        return False
    except Exception as error:  # noqa: BLE001 - hours of work must not end in a picture's error
        _logger.warning("%s: not drawn (%s: %s)", what, type(error).__name__, error)
        return False
    return True


_notices: list[str] = []


def notice() -> str | None:
    """Notice of another place for caches; None if not needed or already shown."""
    return f"{_notices.pop()}: caches are kept in {_temporary()}." if _notices else None


def cache_folders() -> list[Path]:
    """The folders of our caches: the last one can be written, the one before it maybe only read."""
    usual = _usual()
    return [usual / "pet-finetune", *([] if _writable(usual) else [_temporary() / "pet-finetune"])]


def provide_home() -> None:
    """Set ``HOME``, ``USER`` and folders of libraries' caches for this process where they fail."""
    if not hasattr(os, "getuid"):
        return
    user = os.getuid()
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{user}"
    try:
        home = Path.home()
    except RuntimeError:
        problem = f"There is no HOME, and user {user} has no entry that tells it"
    else:
        problem = "" if os.access(home, os.R_OK | os.X_OK) else f"The home {home} is not accessible"
    if problem:
        os.environ["HOME"] = str(_temporary())
    if not _writable(_usual()):
        problem = problem or f"{_usual()} cannot be written"
        os.environ.setdefault("MPLCONFIGDIR", str(_temporary() / "matplotlib"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(_temporary() / "triton"))
    if problem:
        _notices[:] = [problem]


def end_while_importing() -> None:
    """Let Ctrl-C end this process at once while it imports libraries.

    NumPy and torch swallow it there, or are left half imported, which ends in riddles; nothing can
    be lost yet. At any other time it is Python's ``KeyboardInterrupt``, as before.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            shown = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # in place of a bar of ours
            os.write(2, f"{shown}interrupted\n".encode())
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _usual() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or could be once it was made."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
    except OSError:
        return False
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@cache
def _temporary() -> Path:
    """A folder that the next process of this user finds, and that no other user can have made."""
    folder = Path(tempfile.gettempdir()) / f"pet-finetune-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid == os.getuid() and not folder.is_symlink() and _writable(folder):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="pet-finetune-"))
